"""The benchmark of kernels beside torch: both ways run, and it says how fast each was."""

from __future__ import annotations

import os
from dataclasses import replace

import pytest

from action_diffusion import choice
from action_diffusion.policy.kernels import winograd
from benchmarks.speed import products

MODE = "ACTION_DIFFUSION_KERNELS"


@pytest.mark.slow
def test_a_step_is_measured_both_ways(monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    choice.forget()
    small = replace(products.STEPS["train_state"], settings={"image": False, "channels": (32, 64, 256), "batch": 256})
    monkeypatch.setitem(products.STEPS, "train_state", small)
    called = []
    real = winograd.conv1d
    monkeypatch.setattr(winograd, "conv1d", lambda *a: called.append(os.environ[MODE]) or real(*a))
    assert products.main(["rows=train_state", "seconds=0.01"]) == 0
    assert set(called) == {"auto"}  # measured, at least
    choice.forget()
    assert "with kernels" in capsys.readouterr().out


def test_an_unknown_row_is_refused(capsys):
    assert products.main(["rows=train_stat"]) == 2
    assert "did you mean train_state" in capsys.readouterr().err
