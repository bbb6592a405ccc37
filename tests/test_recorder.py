"""Recording that cannot be spoiled: what was kept is there, whatever happens afterwards."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from action_diffusion.datasets.recorder import Recorder
from action_diffusion.datasets.replay_buffer import ReplayBuffer
from action_diffusion.errors import InputError

FIELDS = {"image": ("u1", (24, 24, 3)), "state": ("f4", (5,))}
ATTRS = {"control_rate": 10.0}


def step(number: int) -> dict[str, Any]:
    return {"image": np.full((24, 24, 3), number % 251, np.uint8), "state": np.full(5, number, np.float32)}


def test_keep_discard_undo(tmp_path):
    path = tmp_path / "demos.zarr"
    with Recorder.open(path, FIELDS, ATTRS) as recorder:
        for first, n, kept in ((0, 3, True), (3, 4, False), (3, 2, True), (5, 6, True)):
            for number in range(first, first + n):
                recorder.add(step(number))
            assert recorder.n_steps == n
            recorder.keep() if kept else recorder.discard()
            assert recorder.n_steps == 0
        assert recorder.undo() == 2
    buffer = ReplayBuffer.open(path)
    assert buffer.episode_ends.tolist() == [3, 5]
    for key in FIELDS:
        np.testing.assert_array_equal(buffer[key][:], np.stack([step(number)[key] for number in range(5)]))
    assert buffer.attrs == ATTRS


def test_the_second_writer_is_told_who_the_first_is(tmp_path):
    with (
        Recorder.open(tmp_path / "a.zarr", FIELDS, ATTRS),
        pytest.raises(InputError, match=r"is being recorded by process \d+ \(.*pytest"),
    ):
        Recorder.open(tmp_path / "a.zarr", FIELDS, ATTRS)
    Recorder.open(tmp_path / "a.zarr", FIELDS, ATTRS).close()
