"""Work in other processes, in turn."""

from __future__ import annotations

import os

import numpy as np
import pytest
from conftest import demonstrations

from action_diffusion.datasets.parallel import cores, in_order
from action_diffusion.datasets.sources import with_images


def square(x: int) -> tuple[int, int]:
    return x * x, os.getpid()


def fail_at_three(x: int) -> int:
    if x == 3:
        raise ValueError("three")
    return x


def picture(states: np.ndarray) -> np.ndarray:
    """[n, S] → uint8 [n, 2, 2, 3]"""
    return np.broadcast_to(states[:, 0].astype(np.uint8)[:, None, None, None], (len(states), 2, 2, 3)).copy()


def test_results_come_in_the_order_of_the_items_from_other_processes():
    found = list(in_order(square, range(12), 2, "squaring", ahead=2))
    assert [value for value, _ in found] == [x * x for x in range(12)]
    assert os.getpid() not in {pid for _, pid in found}
    assert list(in_order(square, range(3), 1, "squaring")) == [(x * x, os.getpid()) for x in range(3)]


def test_what_is_raised_there_is_raised_here():
    found = in_order(fail_at_three, range(6), 2, "failing")
    assert [next(found) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(ValueError, match="three"):
        list(found)


def test_pictures_are_the_same_from_any_number_of_processes(tmp_path, monkeypatch):
    buffer = demonstrations()
    alone = with_images(buffer, picture, cache_dir=tmp_path / "a")["img"][:]
    monkeypatch.setattr("action_diffusion.datasets.sources._RENDER_ALONE", 10)
    monkeypatch.setattr("action_diffusion.datasets.sources._RENDER_ROWS", 50)
    monkeypatch.setattr("action_diffusion.datasets.sources.cores", lambda: 2)
    np.testing.assert_array_equal(with_images(buffer, picture, cache_dir=tmp_path / "b")["img"][:], alone)
    assert cores() >= 1
