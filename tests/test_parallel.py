"""Work in other processes, in turn."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest
from elsewhere import fail_at_three, picture, square
from tiny import demonstrations

from action_diffusion.datasets.batches.sources import with_images
from action_diffusion.parallel import cores, in_order


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
    monkeypatch.setattr("action_diffusion.datasets.batches.sources._RENDER_ALONE", 10)
    monkeypatch.setattr("action_diffusion.datasets.batches.sources._RENDER_ROWS", 50)
    monkeypatch.setattr("action_diffusion.datasets.batches.sources.cores", lambda: 2)
    np.testing.assert_array_equal(with_images(buffer, picture, cache_dir=tmp_path / "b")["img"][:], alone)
    assert cores() >= 1


@pytest.mark.slow
def test_a_script_without_a_main_guard_is_told_so(tmp_path):
    (tmp_path / "script.py").write_text(
        "from action_diffusion.datasets.batches import sources\n"
        "from action_diffusion.envs.pusht.simulator import render_states\n"
        "sources._RENDER_ALONE, sources.cores = 0, lambda: 2\n"
        "sources.with_images(sources.open_data('pusht_expert'), render_states)\n"
    )
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path)}
    found = subprocess.run(
        [sys.executable, "script.py"], cwd=tmp_path, env=environment, text=True, capture_output=True, timeout=120
    )
    assert found.returncode == 1
    assert "ChildProcessError: a process rendering ended" in found.stderr
    assert 'if __name__ == "__main__":' in found.stderr
