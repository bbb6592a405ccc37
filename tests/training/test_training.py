"""Training, as a user runs it: budgets, metrics, checkpoints, resuming after a kill, and what is left behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import numpy as np
import processes
import pytest
import torch
import yaml
from accelerate.state import AcceleratorState
from processes import Forked
from safetensors.torch import load_file, save_file
from tiny import demonstrations

from action_diffusion import choice
from action_diffusion import policy as policy_package
from action_diffusion.cli import main
from action_diffusion.datasets.storage.replay_buffer import ReplayBuffer
from action_diffusion.errors import InputError
from action_diffusion.options import TrainSettings
from action_diffusion.options.configuration import load
from action_diffusion.policy.spec import ActionSpec, ObservationSpec, PolicySpec
from action_diffusion.training import checkpoints, run
from action_diffusion.training.data import prepare
from action_diffusion.training.trainer import lr_factor

SMALL = [
    "device=cpu",
    "policy.denoiser.channels=[8,16]",
    "policy.denoiser.time_dim=16",
    "train.batch_size=16",
    "train.validate_every=10",
    "train.rollout_every=0",
    "train.tensorboard=false",
    "dataset.val_windows=16",
    "dataset.val_fraction=0.2",
]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("data") / "demos.zarr"
    demonstrations().save(path)
    return path


def arguments(data: Path, output: Path, *extra: str) -> list[str]:
    return ["train", f"data={data}", f"output_dir={output}", "evaluation.n_episodes=0", *SMALL, *extra]


def lines(output: Path) -> list[dict]:
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def state_of(output: Path) -> tuple[dict, dict, dict, dict]:
    """(bundle weights, last raw weights, optimiser, state without times)."""
    newest = checkpoints.checkpoint_folders(output)[-1]
    weights, optimizer, state = checkpoints.load_checkpoint(newest)
    return load_file(output / "bundle" / "model.safetensors"), weights, optimizer, state


def assert_same_run(a: Path, b: Path) -> None:
    for first, second in zip(state_of(a)[:3], state_of(b)[:3], strict=True):
        assert first.keys() == second.keys()
        for name in first:
            assert torch.equal(first[name], second[name]), name
    one, other = state_of(a)[3], state_of(b)[3]
    assert (one["step"], one["ema_step"], one["merit"]) == (other["step"], other["ema_step"], other["merit"])


@pytest.mark.slow
def test_a_run_leaves_what_the_readme_promises(data, tmp_path, capsys):
    output = tmp_path / "run"
    words = [w for w in arguments(data, output, "train.max_steps=25") if not w.startswith("evaluation")]
    assert main([*words, "evaluation.n_episodes=2", "evaluation.n_videos=1", "train.rollout_every=20",
                 "train.rollout_episodes=1", "train.tensorboard=true", "task.env.max_steps=60"]) == 0  # fmt: skip
    rows = lines(output)
    logged = [row["step"] for row in rows if "loss" in row]
    assert logged == [10, 20, 25]
    assert all(np.isfinite(row["loss"]) for row in rows if "loss" in row)
    assert {"validation_loss", "action_error"} <= {key for row in rows for key in row}
    assert any("rollout_score" in row for row in rows)
    results = json.loads((output / "evaluation" / "results.json").read_text())
    assert results["n_episodes"] == 2
    assert results["task"] == "pusht_state"
    assert results["seeds"] == [100000, 100001]
    assert (output / "evaluation" / "report.html").stat().st_size > 1000
    assert list((output / "evaluation" / "videos").glob("*.mp4"))
    assert list((output / "tensorboard").glob("events*"))
    printed = capsys.readouterr()
    assert "mean_score" in printed.out
    assert "this task's own settings train for 2,200 steps" in " ".join(printed.err.split())
    policy = policy_package.load(output / "bundle", verify=True)
    assert policy.predict({"state": np.full((2, 5), 100, np.float32)})["action"].shape == (8, 2)


@pytest.mark.slow
def test_resuming_after_kill_9_is_bit_exact(data, tmp_path):
    """The same weights, EMA, optimiser and metrics as a run that was never stopped."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    extra = ["train.max_steps=40", "train.checkpoint_every=7", "policy.objective.noise_draws=2"]
    choice.forget()  # each run measures and reads as a process of its own does
    assert main(arguments(data, whole, *extra)) == 0
    process = Forked("-m", "action_diffusion", *arguments(data, killed, *extra), stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while len(checkpoints.checkpoint_folders(killed)) < 2 and time.monotonic() < deadline:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    stopped_at = int(checkpoints.checkpoint_folders(killed)[-1].name.split("_")[1])
    assert 0 < stopped_at < 40
    (killed / "metrics.jsonl").open("a").write('{"step": 1')  # a line cut short by the kill
    before = (killed / "metrics.jsonl").read_text()
    choice.forget()
    # Only the folder is needed: what the run was started with is kept beside it.
    assert main(["train", f"output_dir={killed}", "resume=true"]) == 0
    assert_same_run(whole, killed)
    after = (killed / "metrics.jsonl").read_text()
    assert after.startswith(before + "\n")
    tail = [json.loads(line) for line in after[len(before) + 1 :].splitlines()]
    fresh = {row["step"]: row["loss"] for row in lines(whole) if "loss" in row}
    resumed = {row["step"]: row["loss"] for row in tail if "loss" in row}
    assert resumed[40] == fresh[40]


@pytest.mark.slow
def test_resuming_a_run_killed_before_its_first_checkpoint_starts_over(data, tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert main(arguments(data, whole, "train.max_steps=12")) == 0
    assert main(arguments(data, killed, "train.max_steps=12", "resume=true")) == 0
    assert_same_run(whole, killed)


@pytest.mark.slow
def test_ctrl_c_saves_and_says_how_to_go_on(data, tmp_path):
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    extra = ["train.max_steps=100", "train.checkpoint_every=0"]
    assert main(arguments(data, whole, *extra)) == 0
    process = Forked("-m", "action_diffusion", *arguments(data, stopped, *extra), stderr=subprocess.PIPE)
    deadline = time.monotonic() + 120
    metrics = stopped / "metrics.jsonl"
    while not (metrics.exists() and metrics.read_text().count('"loss"') >= 1) and time.monotonic() < deadline:
        time.sleep(0.005)
    process.send_signal(signal.SIGINT)
    assert process.stderr is not None
    errors = process.stderr.read()
    assert process.wait(60) == 130
    assert f"output_dir={stopped} resume=true" in errors
    assert "Traceback" not in errors
    assert main(["train", f"output_dir={stopped}", "resume=true"]) == 0
    assert_same_run(whole, stopped)


@pytest.mark.slow
def test_two_processes_train_one_policy(data, tmp_path):
    output = tmp_path / "two"
    words = arguments(data, output, "train.max_steps=12", "train.num_processes=2", "train.checkpoint_every=5")
    done = processes.run("-m", "action_diffusion", *words, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    assert [r["step"] for r in lines(output) if "loss" in r] == [10, 12]
    policy_package.load(output / "bundle", verify=True)
    # Two processes of 16 see what one of 32 sees: the epoch advances twice as fast as with one of 16.
    assert lines(output)[0]["epoch"] == pytest.approx(10 / (len_windows(data) // 32), abs=1e-3)


def len_windows(data: Path) -> int:
    from action_diffusion.datasets.batches.windows import make_windows, split_episodes

    buffer = ReplayBuffer.open(data)
    train, _ = split_episodes(buffer.n_episodes, 0.2, 0)
    return len(make_windows(buffer.episode_ends, episodes=train, horizon=12, n_obs_steps=2, n_action_steps=8))


@pytest.mark.slow
def test_training_from_another_policy_starts_with_its_weights(data, tmp_path):
    assert main(arguments(data, tmp_path / "first", "train.max_steps=10")) == 0
    first = tmp_path / "first" / "bundle"
    assert main(arguments(data, tmp_path / "second", "train.max_steps=1", "train.lr=1e-9", f"init={first}")) == 0
    a, b = load_file(first / "model.safetensors"), load_file(tmp_path / "second" / "bundle" / "model.safetensors")
    assert all(torch.allclose(a[name], b[name], atol=1e-6) for name in a)
    spec = [json.loads((tmp_path / n / "bundle" / "spec.json").read_text())["normalizer"] for n in ("first", "second")]
    assert spec[0] == spec[1]


@pytest.fixture(scope="module")
def corrections(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("data") / "corrections.zarr"
    demonstrations(2, 30, seed=1).save(path)
    return path


def mixed(data: Path, corrections: Path, output: Path, *extra: str) -> list[str]:
    words = arguments(data, output, *extra)[2:]
    return ["train", f"data=[{data},{corrections}]", *words]


@pytest.mark.slow
def test_a_mixture_is_resumed_bit_for_bit_and_the_bundle_names_it(data, corrections, tmp_path, capsys):
    weights = "dataset.weights=[0.25,0.75]"
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    choice.forget()
    assert main(mixed(data, corrections, whole, "train.max_steps=4", "train.lr_schedule=constant", weights)) == 0
    said = [line.split() for line in capsys.readouterr().err.splitlines()]
    assert ["demos.zarr", "5", "1", "185", "0.25", "25.0", "%"] in said  # 40 rows: 37 windows
    assert ["corrections.zarr", "1", "1", "27", "0.75", "75.0", "%"] in said
    choice.forget()
    assert main(mixed(data, corrections, halves, "train.max_steps=2", "train.lr_schedule=constant", weights)) == 0
    choice.forget()
    assert main(["train", f"output_dir={halves}", "resume=true", "train.max_steps=4"]) == 0
    assert_same_run(whole, halves)
    measured = [row for row in lines(whole) if "action_error" in row][-1]
    parts = [measured[f"action_error/{name}.zarr"] for name in ("demos", "corrections")]
    assert measured["action_error"] == pytest.approx(0.25 * parts[0] + 0.75 * parts[1])
    config = yaml.safe_load((whole / "bundle" / "config.yaml").read_text())
    assert config["data"] == [str(data), str(corrections)]
    assert config["dataset"]["weights"] == [0.25, 0.75]


@pytest.mark.slow
def test_corrections_are_one_command(data, corrections, tmp_path):
    """What the bundle's policy and task are need not be said again; its statistics stay as they are."""
    words = arguments(data, tmp_path / "first", "train.max_steps=4", "task.horizon=16", "train.lr=5e-4")
    assert main([*words, "policy.action_frame=null", "train.weight_decay=0.5"]) == 0
    first, output = tmp_path / "first" / "bundle", tmp_path / "second"
    data_words = [f"data=[{data},{corrections}]", "dataset.weights=[0.5,0.5]", "evaluation.n_episodes=0"]
    assert main(["train", f"init={first}", *data_words, "train.max_steps=1", f"output_dir={output}"]) == 0
    assert main(["train", f"output_dir={output}", "resume=true", "train.max_steps=2"]) == 0
    one, two = (yaml.safe_load((path / "config.yaml").read_text()) for path in (first, output / "bundle"))
    for section in ("task", "policy"):
        assert one[section] == two[section]
    assert (two["train"]["lr"], two["train"]["weight_decay"], two["train"]["max_steps"]) == (5e-4, 0.5, 2)
    assert two["dataset"]["val_fraction"] == 0.05
    specs = [json.loads((path / "spec.json").read_text()) for path in (first, output / "bundle")]
    assert specs[0]["normalizer"] == specs[1]["normalizer"]


@pytest.mark.slow
def test_actions_that_an_initialisation_cannot_do_are_said(data, tmp_path, capsys):
    assert main(arguments(data, tmp_path / "first", "train.max_steps=1", "policy.action_frame=null")) == 0
    buffer, first = ReplayBuffer.open(data), tmp_path / "first" / "bundle"
    arrays = {"state": buffer["state"][:], "action": buffer["action"][:] + np.float32(1000)}
    ReplayBuffer.from_arrays(arrays, buffer.episode_ends).save(tmp_path / "far.zarr")
    capsys.readouterr()
    for path, told in ((tmp_path / "far.zarr", True), (data, False)):
        words = arguments(path, tmp_path / path.stem, "train.max_steps=1", f"init={first}")
        assert main([*words, "policy.action_frame=null"]) == 0
        said = "100 % of the actions are beyond what the policy can do" in capsys.readouterr().err
        assert said == told


FORKING = """
import functools, sys
import torch.multiprocessing
from action_diffusion import cli
from action_diffusion.training import run
run.spawn = functools.partial(torch.multiprocessing.start_processes, start_method="fork")
sys.exit(cli.main(sys.argv[1:]))
"""
"""`action-diffusion` whose several processes do not import everything again, as the test above has them do."""


@pytest.mark.slow
def test_an_error_in_one_of_two_processes_is_one_line(data, tmp_path):
    words = arguments(data, tmp_path / "two", "train.max_steps=2", "train.num_processes=2", "task.horizon=17")
    done = processes.run("-c", FORKING, *words)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert done.stderr.count("error: horizon=17 must be divisible by 2") == 1


@pytest.mark.slow
def test_a_policy_of_another_shape_is_not_an_initialisation(data, tmp_path, capsys):
    assert main(arguments(data, tmp_path / "first", "train.max_steps=1")) == 0
    words = arguments(data, tmp_path / "b", "train.max_steps=1", f"init={tmp_path / 'first' / 'bundle'}")
    assert main([*words, "policy.denoiser.channels=[16,16]"]) == 2
    assert "does not belong to the policy configured here" in capsys.readouterr().err


@pytest.mark.slow
def test_a_budget_in_minutes_stops_in_time(data, tmp_path):
    began = time.monotonic()
    assert main(arguments(data, tmp_path / "run", "train.max_minutes=0.05", "train.validate_every=0")) == 0
    assert time.monotonic() - began < 30
    rows = [row for row in lines(tmp_path / "run") if "loss" in row]
    assert rows[-1]["seconds"] >= 3.0
    assert rows[-1]["lr"] < 0.1 * max(row["lr"] for row in rows)


@pytest.mark.slow
def test_a_budget_in_epochs_counts_windows(data, tmp_path):
    assert main(arguments(data, tmp_path / "run", "train.max_epochs=2")) == 0
    assert lines(tmp_path / "run")[-1]["step"] == 2 * (len_windows(data) // 16)


@pytest.mark.slow
def test_the_newest_the_best_and_no_others_survive(data, tmp_path):
    extra = ["train.max_steps=60", "train.checkpoint_every=10", "train.keep_best=2"]
    assert main(arguments(data, tmp_path / "run", *extra)) == 0
    folders = checkpoints.checkpoint_folders(tmp_path / "run")
    assert len(folders) == 3
    assert folders[-1].name == "step_00000060"
    assert not list((tmp_path / "run" / "checkpoints").glob(".*"))
    for folder in folders:
        policy_package.load(folder / "bundle")


def test_the_best_are_kept_by_their_merit(tmp_path):
    for step, merit in enumerate([0.1, 0.9, None, 0.5, 0.2]):
        folder = tmp_path / "checkpoints" / f"step_{step:08d}"
        folder.mkdir(parents=True)
        (folder / "state.json").write_text(json.dumps({"merit": merit}))
    checkpoints.prune(tmp_path, keep_best=2)
    assert [f.name[-1] for f in checkpoints.checkpoint_folders(tmp_path)] == ["1", "3", "4"]


@pytest.mark.slow
def test_a_full_disk_while_saving_keeps_earlier_checkpoints(data, tmp_path, monkeypatch, capsys):
    output = tmp_path / "run"
    real, calls = save_file, list[int]()

    def full(*args, **kwargs):
        calls.append(1)
        if len(calls) > 2:  # the second checkpoint
            raise OSError(28, "No space left on device")
        return real(*args, **kwargs)

    monkeypatch.setattr(checkpoints, "save_file", full)
    assert main(arguments(data, output, "train.max_steps=30", "train.checkpoint_every=10")) == 2
    assert "No space left on device" in capsys.readouterr().err
    assert [f.name for f in checkpoints.checkpoint_folders(output)] == ["step_00000010"]
    monkeypatch.undo()
    assert main(["train", f"output_dir={output}", "resume=true"]) == 0


def test_a_loss_that_explodes_is_said(data, tmp_path, capsys):
    code = main(arguments(data, tmp_path / "run", "train.max_steps=200", "train.lr=1e18", "train.warmup=0",
                          "train.max_grad_norm=0"))  # fmt: skip
    assert code == 1
    assert "the loss became" in capsys.readouterr().err


@pytest.mark.slow
def test_an_existing_run_is_not_overwritten(data, tmp_path, capsys):
    words = arguments(data, tmp_path / "run", "train.max_steps=1")
    assert main(words) == 0
    assert main(words) == 2
    assert "already holds a run: give resume=true" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "needs a budget"),
        ({"max_steps": 0}, "train.max_steps=0 must be above 0"),
        ({"max_steps": 1, "log_every": 50}, "must be at most 10"),
        ({"max_steps": 1, "batch_size": 0}, "batch_size=0 must be at least 1"),
        ({"max_steps": 1, "mixed_precision": "fp8"}, "choose from no, bf16, fp16, auto"),
        ({"max_steps": 1, "keep_best": -1}, "must not be negative"),
    ],
)
def test_settings_that_make_no_sense_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        TrainSettings(**options)


def test_the_learning_rate_warms_up_and_follows_the_budget():
    settings = TrainSettings(max_steps=1000, warmup=100)
    assert lr_factor(0, 0.0, settings) == pytest.approx(0.01)
    assert lr_factor(99, 0.0, settings) == pytest.approx(1.0)
    assert lr_factor(500, 0.5, settings) == pytest.approx(0.5)
    assert lr_factor(1000, 1.0, settings) == pytest.approx(0.0)
    assert lr_factor(1000, 1.0, TrainSettings(max_steps=1, lr_schedule="constant")) == 1.0


def test_a_budget_that_is_asked_for_replaces_the_task_s_own():
    assert load("train", ["train.max_minutes=5"])["train"]["max_steps"] is None
    assert load("train", [])["train"]["max_steps"] == 2200


def test_a_named_subset_of_the_episodes_is_trained_on(tmp_path, capsys):
    buffer = demonstrations()
    names = [f"demo_{i}" for i in range(6)]
    demo = np.repeat(np.arange(6, dtype=np.int32), 40)
    arrays = {"state": buffer["state"][:], "action": buffer["action"][:], "demo": demo}
    attrs = {"demos": names, "subsets": {"train": ["demo_1", "demo_4", "demo_5"]}}
    ReplayBuffer.from_arrays(arrays, buffer.episode_ends, attrs).save(tmp_path / "demos.zarr")
    settings: dict[str, Any] = {"n_obs_steps": 2, "horizon": 16, "n_action_steps": 8}
    spec = PolicySpec(
        observations={"state": ObservationSpec(shape=(5,), source="state")},
        action=ActionSpec(shape=(2,)),
        control_rate=10.0,
        **settings,
    )
    opened = ReplayBuffer.open(tmp_path / "demos.zarr")
    found = prepare(opened, spec, device=torch.device("cpu"), val_fraction=0.34, seed=0, subset="train")
    assert found.held_out is not None
    seen = {*(found.train_rows // 40), *(found.held_out.windows.first // 40)}
    assert seen == {1, 4, 5}
    assert main([*arguments(tmp_path / "demos.zarr", tmp_path / "run"), "dataset.subset=trian"]) == 2
    assert "unknown subset 'trian'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("amx", "avx512", "expected"), [(True, False, "bf16"), (False, True, "bf16"), (False, False, "no")]
)
def test_automatic_precision_is_half_where_a_cpu_has_instructions_for_it(amx, avx512, expected, monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512)
    AcceleratorState._reset_state(True)
    try:
        accelerator = run._accelerator({"device": "cpu"}, TrainSettings(max_steps=1, mixed_precision="auto"))
        assert accelerator.mixed_precision == expected
    finally:
        AcceleratorState._reset_state(True)
