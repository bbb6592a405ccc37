"""What a deployment leaves behind: a record that opens whatever happened, and replays to the same commands."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from deployments import add_guard, deploy, read_log, save_bundle
from processes import Forked

from action_diffusion import choice, cli
from action_diffusion.datasets.storage.growing import read_table
from action_diffusion.datasets.storage.replay_buffer import ReplayBuffer
from action_diffusion.deploy.acting import ways
from action_diffusion.deploy.hardware.limits import Limits
from action_diffusion.deploy.ipc.rings import RingReader, shared_folder
from action_diffusion.deploy.records.reader import open_record, plain_limits, read_limits
from action_diffusion.deploy.run import run
from action_diffusion.deploy.serve.policies import DeployedPolicy, open_policy
from action_diffusion.errors import InputError
from action_diffusion.policy.action_queue import SCHEDULINGS
from benchmarks.robustness.kills import child_of


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_bundle(tmp_path_factory.mktemp("recording") / "bundle", horizon=16)


def replayed(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str]:
    capsys.readouterr()
    code = cli.main(["deploy", *words])
    return code, capsys.readouterr().out


SAME = "every command is the recorded one, bit for bit"


@pytest.mark.slow
@pytest.mark.parametrize("scheduling", SCHEDULINGS)
def test_a_run_is_recorded_and_replays_to_the_same_commands(bundle, tmp_path, capsys, scheduling):
    """From the recorded chunks, and from those that the policy predicts once more from the recorded observations."""
    options = [f"scheduling={scheduling}", "delay=1", "n_episodes=2", "rtc.beta=20", "page=false"]
    assert run(deploy(bundle, tmp_path, *options)) == 0
    rows = read_log(tmp_path)
    buffer = ReplayBuffer.open(tmp_path / "record.zarr")
    assert buffer.keys == ["action", "state"]
    assert buffer.n_steps == len(rows) == 24
    assert buffer.episode_ends.tolist() == [12, 24]
    steps = read_table(tmp_path / "record.zarr", "steps")
    assert steps["held"].tolist() == [row["held"] for row in rows]
    assert steps["seed"].tolist() == [row["seed"] for row in rows]
    assert steps["lateness_ms"].tolist() == [row["lateness_ms"] for row in rows]
    commanded = [index for index, row in enumerate(rows) if row["action"] is not None]
    assert steps["commanded"].nonzero()[0].tolist() == commanded
    assert [buffer["action"][index].tolist() for index in commanded] == [rows[index]["action"] for index in commanded]
    assert np.isfinite(buffer["action"][:]).all()
    setpoints = read_table(tmp_path / "record.zarr", "setpoints")
    assert len(setpoints["time"]) > 300
    assert read_table(tmp_path / "record.zarr", "episodes")["seed"].tolist() == [100000, 100001]
    for source in ([], [f"bundle={bundle}", "device=cpu"]):
        code, out = replayed(capsys, f"replay={tmp_path}", *source)
        assert (code, SAME in out) == (0, True), out


@pytest.mark.slow
@pytest.mark.parametrize("action", ["slow", "hold"])
def test_what_a_guard_did_replays(tmp_path, capsys, action):
    """By the recorded levels: the replay needs no guard."""
    bundle = save_bundle(tmp_path / "bundle", horizon=16)
    add_guard(bundle, horizon=16)
    out = tmp_path / "run"
    options = [f"guard.action={action}", "extensions=[guard]", "scheduling=naive", "page=false"]
    assert run(deploy(bundle, out, *options)) == 0
    rows, steps = read_log(out), read_table(out / "record.zarr", "steps")
    assert steps["guard_alarm"].tolist() == [row["guard_alarm"] for row in rows]
    assert steps["guard_alarm"].any()
    assert steps["held"][steps["guard_alarm"]].any()
    known = [(index, row["guard_level"]) for index, row in enumerate(rows) if row["guard_level"] is not None]
    assert [steps["guard_level"][index] for index, _ in known] == [level for _, level in known]
    for source in ([], [f"bundle={bundle}", "device=cpu"]):
        code, said = replayed(capsys, f"replay={out}", *source)
        assert (code, SAME in said) == (0, True), said


@pytest.mark.slow
def test_a_replay_computes_with_as_many_threads_as_the_run(bundle, tmp_path, capsys, monkeypatch):
    """With others, sums are added up in another order and the last bits of a chunk are others."""
    before = torch.get_num_threads()
    try:
        monkeypatch.setattr("action_diffusion.deploy.acting.choose_threads", lambda _: torch.set_num_threads(3) or 3)
        assert run(deploy(bundle, tmp_path, "page=false")) == 0
        torch.set_num_threads(1)
        code, out = replayed(capsys, f"replay={tmp_path}", f"bundle={bundle}", "device=cpu")
        assert torch.get_num_threads() == 3
        assert (code, SAME in out) == (0, True), out
    finally:
        torch.set_num_threads(before)


@pytest.mark.slow
def test_a_replay_computes_with_the_kernels_and_extensions_of_the_run(tmp_path, capsys, monkeypatch):
    bundle = save_bundle(tmp_path / "bundle", horizon=16)
    add_guard(bundle, horizon=16)
    out = tmp_path / "run"
    asked = []

    def met(policy: DeployedPolicy) -> dict:
        """The kernels so far, of which one is met while the robot moves."""
        asked.append(policy)
        return {**ways(policy), "ways": choice.table().taken | ({"met later": "torch"} if len(asked) > 1 else {})}

    monkeypatch.setattr("action_diffusion.deploy.run.ways", met)
    assert run(deploy(bundle, out, "extensions=[guard]", "page=false")) == 0
    kept = ReplayBuffer.open(out / "record.zarr").attrs["config"]
    assert choice.table().taken
    assert kept["ways"] == {**choice.table().taken, "met later": "torch"}
    opened, taken = [], []
    monkeypatch.setattr(choice.Table, "take", lambda _, ways: taken.append(ways))
    monkeypatch.setattr(
        "action_diffusion.deploy.records.command.open_policy",
        lambda config: opened.append(config) or open_policy(config),
    )
    code, said = replayed(capsys, f"replay={out}", f"bundle={bundle}", "device=cpu", f"output_dir={tmp_path / 'again'}")
    assert (code, SAME in said) == (0, True), said
    assert [list(config.extensions) for config in opened] == [["guard"]]
    assert taken == [kept["ways"]]
    assert cli.main(["deploy", f"replay={out}", f"output_dir={tmp_path / 'again'}"]) == 2
    assert "again already holds a replay: give another output_dir" in capsys.readouterr().err


@pytest.mark.slow
def test_other_settings_show_what_would_have_been_commanded(bundle, tmp_path, capsys):
    assert run(deploy(bundle, tmp_path, "scheduling=naive", "delay=2", "page=false")) == 0
    record = f"replay={tmp_path / 'record.zarr'}"
    code, out = replayed(capsys, record, "scheduling=ensemble")  # asks at the same steps: the recorded chunks will do
    assert code == 0
    assert "other commands would have been sent" in out
    words = ["scheduling=sync", f"bundle={bundle}", "device=cpu", f"output_dir={tmp_path / 'replay'}"]
    code, out = replayed(capsys, record, *words)
    assert code == 0
    assert "other commands would have been sent" in out
    lines = [json.loads(line) for line in (tmp_path / "replay" / "replay.jsonl").read_text().splitlines()]
    assert len(lines) == 12
    assert [line["recorded"] for line in lines if line["recorded"]] == [
        row["action"] for row in read_log(tmp_path) if not row["held"]
    ]
    held = "".join("-" if line["action"] is None else "x" for line in lines)
    assert re.match(r"--+x{4}--+x", held), held  # sync holds while it waits
    assert cli.main(["deploy", record, "scheduling=sync"]) == 2
    assert "no chunk was recorded for it; give bundle=" in capsys.readouterr().err
    assert cli.main(["deploy", record, "robot=sim_pusht"]) == 2
    assert "unknown option 'robot'" in capsys.readouterr().err


@pytest.mark.slow
def test_another_policy_is_told(bundle, tmp_path, capsys):
    import torch

    assert run(deploy(bundle, tmp_path / "run", "page=false")) == 0
    other = save_bundle(tmp_path / "other", horizon=16, n_obs_steps=1)
    assert cli.main(["deploy", f"replay={tmp_path / 'run'}", f"bundle={other}", "device=cpu"]) == 2
    weights = tmp_path / "another"
    torch.manual_seed(0)
    save_bundle(weights, horizon=16, n_action_steps=5)
    code, out = replayed(capsys, f"replay={tmp_path / 'run'}", f"bundle={weights}", "device=cpu")
    assert code == 0, out  # the same weights: how many actions are executed is the record's to say


def test_a_demonstration_is_no_record(tmp_path, capsys):
    ReplayBuffer.from_arrays({"action": np.zeros((3, 2))}, [3]).save(tmp_path / "a.zarr")
    assert cli.main(["deploy", f"replay={tmp_path / 'a.zarr'}"]) == 2
    assert "no record of a deployment" in capsys.readouterr().err


def test_limits_survive_json():
    limits = Limits(low=np.zeros(2), high=np.ones(2), max_step=np.array([np.inf, 0.1]))
    again = read_limits(json.loads(json.dumps(plain_limits(limits), allow_nan=False)))
    assert again.max_step is not None
    assert again.max_step.tolist() == [np.inf, 0.1]


# Deaths.


def until(condition: Callable[[], Any], seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.fixture
def running(bundle, tmp_path):
    """`action-diffusion deploy` in a process of its own, and its shared memory, once the arm moves."""
    words = [f"bundle={bundle}", f"output_dir={tmp_path / 'run'}", "device=cpu", "page=false", "n_episodes=100"]
    process = Forked("-m", "action_diffusion", "deploy", *words, stderr=subprocess.PIPE)
    try:
        pattern = f"action-diffusion-{process.pid}-*"
        until(lambda: list(shared_folder().glob(f"{pattern}/recorder.json")))
        folder = next(shared_folder().glob(pattern))
        steps = RingReader(folder / "steps")
        until(lambda: steps.count > 15)
        until((tmp_path / "run" / "record.zarr").exists)
        recorded = steps.count
        until(lambda: steps.count > recorded + 10)
        yield process, steps
    finally:
        process.kill()
        process.wait()
        assert process.stderr is not None
        process.stderr.close()


@pytest.mark.slow
@pytest.mark.alone
def test_kill_of_the_loop_leaves_all_of_it(running, tmp_path):
    process, steps = running
    recorder = child_of(process.pid, "records.recorder")
    process.kill()
    process.wait()
    count = steps.count
    until(lambda: not Path(f"/proc/{recorder}").exists())
    path = tmp_path / "run" / "record.zarr"
    buffer = ReplayBuffer.open(path)
    assert buffer.n_steps == count
    assert np.isfinite(buffer["state"][:]).all()
    events = [bytes(row).rstrip(b"\0").decode() for row in read_table(path, "events")["text"]]
    assert any("loop" in line and "died" in line for line in events)
    _, episodes = open_record(path)
    assert sum(len(episode.steps["step"]) for episode in episodes) == count


@pytest.mark.slow
@pytest.mark.alone
def test_kill_of_everything_loses_less_than_a_second(running, tmp_path):
    process, steps = running
    recorder = child_of(process.pid, "records.recorder")
    os.kill(recorder, signal.SIGKILL)
    count, killed = steps.count, time.monotonic()
    process.kill()
    path = tmp_path / "run" / "record.zarr"
    buffer, recorded = ReplayBuffer.open(path), read_table(path, "steps")
    assert buffer.n_steps >= count - 10
    assert killed - recorded["time"][buffer.n_steps - 1] < 1.0
    np.testing.assert_array_equal(recorded["step"], np.arange(len(recorded["step"])) % 12)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
@pytest.mark.alone
def test_the_loop_does_not_mind_what_becomes_of_the_recorder(running, tmp_path, number):
    process, steps = running
    recorder = child_of(process.pid, "records.recorder")
    os.kill(recorder, number)
    before = steps.count
    until(lambda: steps.count > before + 15)
    rows = read_log(tmp_path / "run")[before : before + 15]
    assert [row["interventions"] for row in rows] == [[]] * 15
    assert sum(row["missed_ticks"] for row in rows) <= 1
    if number == signal.SIGKILL:
        assert process.stderr is not None
        assert "the recorder's process has died" in process.stderr.readline()
    else:
        os.kill(recorder, signal.SIGCONT)


@pytest.mark.slow
def test_without_a_record(bundle, tmp_path):
    assert run(deploy(bundle, tmp_path, "record=false", "page=false")) == 0
    assert not (tmp_path / "record.zarr").exists()


@pytest.mark.slow
def test_a_record_is_not_overwritten(bundle, tmp_path):
    (tmp_path / "record.zarr").mkdir()
    with pytest.raises(InputError, match=r"record\.zarr exists: give another output_dir"):
        run(deploy(bundle, tmp_path, "page=false"))
