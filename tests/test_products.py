"""The benchmark of convolutions by fewer products: both ways run, and it says how fast each was."""

from __future__ import annotations

from dataclasses import replace

from action_diffusion.policy import tiles
from benchmarks import products


def test_a_step_is_measured_both_ways(monkeypatch, capsys):
    small = replace(products.STEPS["train_state"], settings={"image": False, "channels": (32, 64, 256), "batch": 256})
    monkeypatch.setitem(products.STEPS, "train_state", small)
    called = []
    real = tiles.conv1d
    monkeypatch.setattr(tiles, "conv1d", lambda *a: called.append(1) or real(*a))
    with products.all_products():
        assert products.main(["rows=train_state", "seconds=0.01"]) == 0
    assert called == []
    assert products.main(["rows=train_state", "seconds=0.01"]) == 0
    assert called
    assert capsys.readouterr().out.count("with fewer products") == 2


def test_an_unknown_row_is_refused(capsys):
    assert products.main(["rows=train_stat"]) == 2
    assert "did you mean train_state" in capsys.readouterr().err
