"""A buffer that grows while it is recorded: whole rows, whenever somebody looks."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from action_diffusion.datasets.storage.growing import GrowingBuffer, read_table
from action_diffusion.datasets.storage.replay_buffer import ReplayBuffer
from action_diffusion.errors import InputError

DATA = {"image": ("u1", (24, 24, 3)), "state": ("f4", (5,))}
TABLES = {"steps": {"time": ("f8", ()), "held": ("?", ())}}


def rows(first: int, n: int) -> dict[str, Any]:
    numbers = np.arange(first, first + n)
    images = np.repeat((numbers % 251 + 1).astype(np.uint8), 24 * 24 * 3).reshape(n, 24, 24, 3)
    return {"image": images, "state": np.repeat(numbers, 5).reshape(n, 5).astype(np.float32)}


@pytest.mark.slow
@settings(deadline=None, max_examples=10)
@given(st.lists(st.tuples(st.integers(1, 700), st.booleans()), min_size=1, max_size=5))
def test_it_opens_after_every_commit(tmp_path_factory, blocks):
    """A block goes on with the last episode, or begins one; what is there afterwards is what was added so far."""
    path = tmp_path_factory.mktemp("growing") / "record.zarr"
    growing = GrowingBuffer.create(path, data=DATA, tables=TABLES, attrs={"kind": "deployment"})
    ends: list[int] = []
    for n, begins in blocks:
        first = growing.data.n_rows
        growing.data.add(rows(first, n))
        growing.tables["steps"].add({"time": 1.0 + np.arange(first, first + n), "held": np.arange(n) % 2 == 0})
        if begins or not ends:
            ends.append(first + n)
        ends[-1] = first + n
        growing.commit(ends)
        check(ReplayBuffer.open(path), ends)
        assert len(read_table(path, "steps")["held"]) == first + n
    growing.finish(ends)
    buffer = ReplayBuffer.open(path)
    check(buffer, ends)
    assert read_table(path, "steps")["time"].tolist() == (1.0 + np.arange(ends[-1])).tolist()
    buffer.append(rows(ends[-1], 3))
    check(ReplayBuffer.open(path), [*ends, ends[-1] + 3])


def check(buffer: ReplayBuffer, ends: list[int]) -> None:
    assert buffer.episode_ends.tolist() == ends
    expected = rows(0, ends[-1])
    for key, values in expected.items():
        np.testing.assert_array_equal(buffer[key][:], values)


WRITER = """
import itertools, sys, time
from pathlib import Path
from test_growing import DATA, GrowingBuffer, TABLES, rows
growing = GrowingBuffer.create(Path(sys.argv[1]), data=DATA, tables=TABLES, attrs={})
for n in itertools.count():
    growing.data.add(rows(7 * n, 7))
    growing.tables["steps"].add({"time": [1.0] * 7, "held": [True] * 7})
    growing.commit([7 * n + 7])
    print(7 * n + 7, flush=True)
"""


@pytest.mark.slow
def test_a_kill_at_any_moment_leaves_what_was_committed(tmp_path):
    random = np.random.default_rng(0)
    for number in range(6):
        path = tmp_path / f"{number}.zarr"
        words = [sys.executable, "-c", WRITER, str(path)]
        env = os.environ | {"PYTHONPATH": str(Path(__file__).parent)}
        writer = subprocess.Popen(words, stdout=subprocess.PIPE, text=True, env=env)
        assert writer.stdout is not None
        writer.stdout.readline()
        time.sleep(random.uniform(0, 0.3))
        writer.send_signal(signal.SIGKILL)
        said = writer.stdout.read().split()
        writer.wait()
        buffer = ReplayBuffer.open(path)
        check(buffer, [buffer.n_steps])
        assert buffer.n_steps >= int(said[-1] if said else 7)


def test_what_is_there_is_not_overwritten(tmp_path):
    GrowingBuffer.create(tmp_path / "a.zarr", data=DATA, tables={}, attrs={})
    with pytest.raises(InputError, match="exists"):
        GrowingBuffer.create(tmp_path / "a.zarr", data=DATA, tables={}, attrs={})


def test_a_table_that_is_not_there(tmp_path):
    ReplayBuffer.from_arrays(rows(0, 3), [3]).save(tmp_path / "a.zarr")
    with pytest.raises(InputError, match="has no steps: it is no record of a deployment"):
        read_table(tmp_path / "a.zarr", "steps")
