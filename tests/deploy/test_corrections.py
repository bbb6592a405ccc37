"""What a person did after taking over becomes demonstrations: the right rows, and nothing of the policy's."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from deployments import Deployment, save_bundle, until
from websockets.sync.client import connect

from action_diffusion import cli
from action_diffusion.datasets.storage.growing import TIME, GrowingBuffer, read_table
from action_diffusion.datasets.storage.replay_buffer import ReplayBuffer
from action_diffusion.deploy.collect.corrections import taken_over
from action_diffusion.deploy.records.stream import STEPS


def steps(operator: str, **changes: Any) -> dict[str, np.ndarray]:
    """A table of steps. operator: p is the policy, h a person, _ a person who says nothing."""
    n = len(operator)
    table = {key: np.zeros(n, np.dtype(dtype)) for key, (dtype, _) in STEPS.items() if not dtype.startswith("S")}
    table["operator"] = np.array([letter != "p" for letter in operator])
    table["held"] = np.array([letter == "_" for letter in operator])
    table["commanded"][:] = True
    table["control_step"] = table["step"] = np.arange(n)
    table["fresh"][1:] = np.diff(table["operator"].astype(int)) != 0
    return table | {key: np.asarray(value) for key, value in changes.items()}


@pytest.mark.parametrize(
    ("operator", "ends", "parts"),
    [
        ("pppp", [4], []),
        ("pphhhpp", [7], [(2, 5)]),
        ("pp__hh_h__p", [11], [(4, 8)]),
        ("____", [4], []),
        ("hhhh", [2, 4], [(0, 2), (2, 4)]),
        ("phhpphp", [7], [(1, 3), (5, 6)]),
    ],
)
def test_which_rows_are_a_persons(operator, ends, parts):
    found = taken_over(steps(operator), np.array(ends))
    assert [(part.start, part.stop) for part in found] == parts


def test_a_missed_step_and_a_pause_end_a_part():
    table = steps("phhhhhh", control_step=np.array([0, 1, 2, 4, 5, 6, 7]))
    table["fresh"][5] = True
    assert [(part.start, part.stop) for part in taken_over(table, np.array([7]))] == [(1, 3), (3, 5), (5, 7)]


def test_before_the_first_command_nothing_counts():
    table = steps("hhh", commanded=np.array([False, True, True]))
    assert [(part.start, part.stop) for part in taken_over(table, np.array([3]))] == [(1, 3)]


def write(path: Path, operator: str) -> np.ndarray:
    """A record of one episode; returns its states."""
    n = len(operator)
    table = {**steps(operator), TIME: np.arange(1.0, n + 1), "observed": np.arange(1.0, n + 1)}
    fields = {key: (value.dtype.str, ()) for key, value in table.items()}
    data = {"state": ("f4", (5,)), "action": ("f8", (2,))}
    attrs = {"kind": "deployment", "task": "pusht_state", "control_rate": 10.0}
    record = GrowingBuffer.create(path, data=data, tables={"steps": fields}, attrs=attrs)
    states = np.random.default_rng(0).uniform(0, 512, (n, 5)).astype(np.float32)
    record.data.add({"state": states, "action": states[:, :2]})
    record.tables["steps"].add(table)
    record.finish([n])
    return states


def test_the_command(tmp_path, capsys):
    states = write(tmp_path / "run" / "record.zarr", "pppp_hhhhhhppphhpp")
    words = ["collect", "agent=corrections", f"from={tmp_path}/run", f"output={tmp_path}/more.zarr"]
    assert cli.main(words) == 0
    out = capsys.readouterr().out
    assert "episodes: 1\nsteps: 6\nleft_out: 1 of fewer than 5 steps" in out
    buffer = ReplayBuffer.open(tmp_path / "more.zarr")
    np.testing.assert_array_equal(buffer["state"][:], states[5:11])
    np.testing.assert_array_equal(buffer["action"][:], states[5:11, :2])
    assert buffer["action"].dtype == np.float32
    assert set(buffer.keys) == {"state", "action", "reward"}
    assert (buffer.attrs["source"], buffer.attrs["first_steps"]) == ("corrections of a person", [5])
    assert cli.main(words) == 2
    assert "exists" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("operator", "words", "message"),
    [
        ("pppp", [], "nobody took over"),
        ("phhp", [], "none of 1 take-overs has min_steps=5"),
        ("phhp", ["from=null"], "agent=corrections needs from=DIR"),
    ],
)
def test_nothing_to_collect(tmp_path, capsys, operator, words, message):
    write(tmp_path / "record.zarr", operator)
    given = [f"from={tmp_path}", f"output={tmp_path}/more.zarr", *words]
    assert cli.main(["collect", "agent=corrections", *given]) == 2
    assert message in capsys.readouterr().err


def test_a_buffer_is_no_record(tmp_path, capsys):
    demonstrations = ReplayBuffer.from_arrays({"action": np.zeros((3, 2), np.float32)}, np.array([3]), {})
    demonstrations.save(tmp_path / "demos.zarr")
    assert cli.main(["collect", "agent=corrections", f"from={tmp_path}/demos.zarr", f"output={tmp_path}/a.zarr"]) == 2
    assert "no record of a deployment" in capsys.readouterr().err


@pytest.mark.slow
def test_a_person_takes_over_and_what_they_did_trains(tmp_path, capsys):
    """Through the page's socket, as its buttons and its pointer send it."""
    bundle = save_bundle(tmp_path / "bundle", horizon=16, env={"name": "pusht", "max_steps": 600})
    run = Deployment(bundle, tmp_path / "run", "scheduling=naive", "n_episodes=1")
    try:
        until(lambda: run.steps.count > 5)
        with connect(run.url.replace("http", "ws") + "/live", proxy=None) as socket:
            socket.send('{"order": "take_over"}')
            for index in range(40):
                socket.send(json.dumps({"order": "point", "values": [220 + index, 250]}))
                time.sleep(0.05)
            socket.send('{"order": "start"}')
            run.goes_on(5)
        assert run.end() == 130
    finally:
        run.process.kill()
        run.process.wait()
    path = tmp_path / "more.zarr"
    words = [f"from={tmp_path}/run", f"output={path}", "min_steps=1"]
    assert cli.main(["collect", "agent=corrections", *words]) == 0
    buffer = ReplayBuffer.open(path)
    assert f"episodes: {buffer.n_episodes}\nsteps: {buffer.n_steps}\n" in capsys.readouterr().out
    table = read_table(tmp_path / "run" / "record.zarr", "steps")
    missed = int((np.diff(table["control_step"][table["operator"]]) > 1).sum())  # none, where nothing else runs
    assert 1 <= buffer.n_episodes <= 1 + missed, "one take-over, divided only by control steps that were missed"
    assert 12 <= buffer.n_steps <= 25
    assert (buffer["action"][:, 1] == 250).all()
    assert (np.diff(buffer["action"][:, 0]) >= 0).all()
    words = [f"data={path}", f"output_dir={tmp_path}/train", "device=cpu", "train.max_steps=2", "train.batch_size=4"]
    words.append("policy.denoiser.channels=[8,16]")
    assert cli.main(["train", "task=pusht_state", *words, "train.validate_every=0", "evaluation.n_episodes=0"]) == 0
