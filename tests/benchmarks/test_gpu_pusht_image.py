"""The ten-minute run of a GPU, small and on a CPU: the same command, from demonstrations to a score."""

from __future__ import annotations

import json
import os
import subprocess
from importlib import import_module
from pathlib import Path

import processes
import pytest

gpu_pusht_image = import_module("benchmarks.speed.gpu_pusht_image")
ROOT = Path(__file__).resolve().parents[2]


def run(*command: str, cache: Path) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"XDG_CACHE_HOME": str(cache)}
    return processes.run("-m", *command, cwd=ROOT, env=environment)


@pytest.mark.slow
def test_the_run_goes_from_demonstrations_to_a_score(tmp_path):
    data = tmp_path / "two.zarr"
    collected = run(
        "action_diffusion",
        "collect",
        "task=pusht_state",
        "agent=expert",
        "episodes=2",
        f"output={data}",
        cache=tmp_path,
    )
    assert collected.returncode == 0, collected.stderr
    small = (
        *("device=cpu", "train.max_minutes=null", "train.max_steps=2", "train.batch_size=2"),
        *("train.mixed_precision=no", "train.cuda_graph=false", "train.warmup=0"),
        *("evaluation.n_episodes=1", "evaluation.n_envs=1", "evaluation.policy_batch=1", "evaluation.n_videos=0"),
        *("policy.sampler.num_inference_steps=1", "policy.denoiser.channels=[16,32]", "task.env.max_steps=20"),
    )
    out = tmp_path / "run"
    found = run("benchmarks.speed.gpu_pusht_image", f"output_dir={out}", f"data={data}", *small, cache=tmp_path)
    assert found.returncode == 0, found.stderr
    outcome = json.loads((out / "benchmark.json").read_text())
    assert outcome["steps"] == 2
    assert outcome["n_episodes"] == 1
    assert 0 <= outcome["mean_score"] <= 1
    assert outcome["seconds"] > 0
    assert "score" in found.stdout


@pytest.mark.slow
def test_without_a_folder_it_says_so(tmp_path):
    found = run("benchmarks.speed.gpu_pusht_image", "device=cpu", cache=tmp_path)
    assert found.returncode == 2
    assert found.stderr.startswith("error: output_dir is required")


def test_a_run_without_an_evaluation_says_so(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(gpu_pusht_image.subprocess, "run", lambda *_, **__: subprocess.CompletedProcess([], 0))
    assert gpu_pusht_image.main([f"output_dir={tmp_path}", "evaluation.n_episodes=0"]) == 2
    said = capsys.readouterr().err
    assert "nothing was evaluated, see evaluation.n_episodes" in said
    assert said.count("\n") == 1
