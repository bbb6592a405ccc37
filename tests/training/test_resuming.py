"""Going on with a run: with its own configuration and statistics, whatever the data and the defaults are by now."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml
from tiny import demonstrations

from action_diffusion.cli import main
from action_diffusion.datasets.storage.replay_buffer import ReplayBuffer
from action_diffusion.errors import InputError
from action_diffusion.options.configuration import override
from action_diffusion.training.resuming import changed_data, configured

SMALL = [
    "device=cpu",
    "policy.denoiser.channels=[8,16]",
    "policy.denoiser.time_dim=16",
    "train.batch_size=16",
    "train.validate_every=0",
    "train.rollout_every=0",
    "train.tensorboard=false",
    "evaluation.n_episodes=0",
]


@pytest.fixture(scope="module")
def first(tmp_path_factory) -> Path:
    """A run of three steps, and the data that it began with."""
    folder = tmp_path_factory.mktemp("first")
    demonstrations().save(folder / "demos.zarr")
    words = ["train", f"data={folder}/demos.zarr", f"output_dir={folder}/run", "train.max_steps=3", *SMALL]
    assert main(words) == 0
    return folder


@pytest.fixture
def run(first, tmp_path) -> Path:
    shutil.copytree(first / "run", tmp_path / "run")
    return tmp_path / "run"


def statistics(run: Path) -> dict:
    return json.loads((run / "bundle" / "spec.json").read_text())["normalizer"]


def grown(path: Path, *, columns: int = 5) -> None:
    """The same episodes and as many more, three times as wide; or with other columns."""
    old = demonstrations()
    state = np.concatenate([old["state"][:], 3 * old["state"][:]])
    state = np.concatenate([state, state], axis=1)[:, :columns]
    action = np.concatenate([old["action"][:], 3 * old["action"][:]])
    ends = np.concatenate([old.episode_ends, old.episode_ends + old.episode_ends[-1]])
    ReplayBuffer.from_arrays({"state": state, "action": action}, ends).save(path)


@pytest.mark.slow
def test_statistics_are_the_checkpoint_s_own_where_the_data_has_grown(run, tmp_path, capsys):
    before = statistics(run)
    grown(tmp_path / "demos.zarr")
    words = [f"output_dir={run}", "resume=true", f"data={tmp_path}/demos.zarr", "train.max_steps=4"]
    assert main(["train", *words]) == 0
    assert statistics(run) == before
    said = " ".join(capsys.readouterr().err.split())
    assert "the data changed since this run began: 6 episodes, 240 steps, now 12 episodes, 480 steps" in said


@pytest.mark.slow
@pytest.mark.parametrize(
    ("columns", "words", "message"),
    [
        (7, ["train.max_steps=4"], r"cannot go on from .*step_00000003.*\(7,\)"),
        (5, ["train.max_steps=4", "policy.denoiser.channels=[16,32]"], r"has shape \[.*the configured policy has"),
        (
            5,
            ["train.max_steps=4", "scheduler=flow"],
            "scheduler=flow: the parts that it began with are in",
        ),
    ],
)
def test_another_shape_is_refused_in_one_line(run, tmp_path, capsys, columns, words, message):
    grown(tmp_path / "demos.zarr", columns=columns)
    data = f"data={tmp_path}/demos.zarr"
    features = ["policy.features=null", "policy.action_frame=null"] if columns != 5 else []
    assert main(["train", f"output_dir={run}", "resume=true", data, *features, *words]) == 2
    assert re.search(message, capsys.readouterr().err)


def test_the_configuration_is_the_one_that_a_run_began_with(run, monkeypatch):
    """Other defaults of a later version do not matter, what is given now does."""
    file = run / "config.yaml"
    config = yaml.safe_load(file.read_text())
    config["train"]["lr"], config["policy"]["objective"]["noise_draws"] = 0.125, 3  # as an older version had them
    del config["dataset"]["subset"]  # which an older version did not have
    file.write_text(yaml.safe_dump(config))
    now = configured([f"output_dir={run}", "resume=true", "train.weight_decay=0.5", "train.max_minutes=2"], None)
    assert now["train"]["lr"] == 0.125
    assert now["policy"]["objective"]["noise_draws"] == 3
    assert now["dataset"]["subset"] is None
    assert now["train"]["weight_decay"] == 0.5
    assert (now["train"]["max_minutes"], now["train"]["max_steps"]) == (2, None)
    assert now["policy"]["denoiser"]["channels"] == [8, 16]
    assert configured([f"output_dir={run}", "resume=true"], "/no/such/folder")["train"]["max_steps"] == 3


def test_the_same_words_again_are_no_other_parts(tmp_path):
    words = ["task=pusht_image", "encoder=resnet18_small", f"output_dir={tmp_path}"]
    config = configured(words, None)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    again = configured([*words, "resume=true"], None)
    assert again == config | {"resume": True}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c["train"].update(lr="fast"), r"config.yaml: train.lr=fast: expected a number"),
        (lambda c: c.update(train=5), "config.yaml: train=5: expected a section"),
        (lambda c: c.pop("policy"), "config.yaml: policy is missing"),
        (lambda c: c["dataset"].update(subsett=1), "unknown option 'subsett' in dataset"),
        (lambda c: c.update(seed=[1]), "seed=.*expected a whole number"),
        (lambda c: c["task"].update(horizon=10**6), "task.horizon=1000000 must be at most 1,024"),
        (lambda c: c["policy"].update(encoder={"_target_": "os.system"}), "_target_ .* is not allowed"),
    ],
)
def test_a_configuration_that_somebody_broke_is_refused(run, change, message):
    config = yaml.safe_load((run / "config.yaml").read_text())
    change(config)
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    with pytest.raises(InputError, match=message):
        configured([f"output_dir={run}", "resume=true"], None)


def test_what_is_given_now_is_checked_as_ever(run):
    config = yaml.safe_load((run / "config.yaml").read_text())
    for word in ("train.lrr=3", "train.lr=-1", "train.lr=1,2", "train=3", "policy.encoder.crop.x=1", "data=${seed}x"):
        with pytest.raises(InputError):
            override("train", config, [word], "config.yaml")


def test_data_is_known_by_its_hash(tmp_path):
    one = demonstrations()
    assert changed_data(tmp_path, one, ["state", "action"]) is None
    assert changed_data(tmp_path, one, ["action", "state", "state"]) is None
    arrays = {key: one[key][:].copy() for key in ("state", "action")}
    arrays["action"][3, 1] += 1
    other = ReplayBuffer.from_arrays(arrays, one.episode_ends)
    said = changed_data(tmp_path, other, ["state", "action"])
    assert said is not None
    assert said.startswith("the data changed since this run began: 6 episodes, 240 steps, now 6 episodes")
    assert changed_data(tmp_path, other, ["state", "action"]) == said
