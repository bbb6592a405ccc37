"""A sweep of real trainings, as small as they can be."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tiny import demonstrations

from action_diffusion.cli import main
from action_diffusion.policy import bundle

SMALL = [
    "device=cpu",
    "policy.denoiser.channels=[8,16]",
    "policy.denoiser.time_dim=16",
    "train.batch_size=16",
    "train.validate_every=1",
    "train.rollout_every=0",
    "train.tensorboard=false",
    "train.max_steps=2",
    "evaluation.n_episodes=2",
    "evaluation.n_videos=0",
    "evaluation.policy_batch=2",
]


@pytest.mark.slow
def test_two_trainings_are_on_one_page_and_are_not_done_again(tmp_path: Path, capsys) -> None:
    demonstrations().save(tmp_path / "demos.zarr")
    words = ["sweep", "train", "seed=0,1", f"data={tmp_path}/demos.zarr", f"output_dir={tmp_path}/sweep", *SMALL]
    assert main(words) == 0
    bundles = sorted((tmp_path / "sweep").glob("runs/*/bundle"))
    assert [bundle.load(path, "cpu").spec.task for path in bundles] == ["pusht_state"] * 2
    (group,) = json.loads((tmp_path / "sweep/summary.json").read_text())["groups"]
    assert len(group["runs"]) == 2
    assert group["over_starts"][0] <= group["mean_score"] <= group["over_starts"][1]
    assert "Validation loss" in (tmp_path / "sweep/report.html").read_text()

    stamps = {path: path.stat().st_mtime_ns for path in (tmp_path / "sweep/runs").rglob("*")}
    assert main(words) == 0
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "sweep/runs").rglob("*")} == stamps
    assert "0 runs to do, 2 finished already" in capsys.readouterr().err
