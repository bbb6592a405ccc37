"""The floors: what is counted is what the layers do."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
floors = import_module("benchmarks.speed.floors")

conv = import_module("action_diffusion.policy.model.conv")


@pytest.mark.parametrize(
    ("layer", "shape", "operations"),
    [
        (conv.Conv1d(6, 4, 5), (8, 3, 6), 2 * 8 * 3 * (5 * 6) * 4),
        (conv.Halve(6), (8, 3, 6), 2 * 4 * 3 * (3 * 6) * 6),
        (conv.Double(6), (8, 3, 6), 2 * 16 * 3 * (2 * 6) * 6),
    ],
)
def test_operations_are_rows_times_columns_times_two(layer, shape, operations):
    rows = floors._Rows(torch.nn.Sequential(layer))
    layer(torch.zeros(shape))
    assert rows.operations == operations
    assert rows.bytes == layer.weight.numel() * 4


@pytest.mark.slow
def test_nothing_is_faster_than_its_floor(tmp_path):
    on, found = floors.Machine(bandwidth=1e12, peak=1e14), []
    found += floors.chunk("small", on, tmp_path, 0.01)
    encoder, step, whole = found
    assert whole.gflop == pytest.approx(encoder.gflop + 10 * step.gflop)
    assert whole.megabytes == pytest.approx(encoder.megabytes + 10 * step.megabytes)
    assert whole.measured_ms > step.measured_ms > 0
    assert all(0 < work.share < 1 for work in found)


@pytest.mark.parametrize(
    ("word", "message"), [("sizes=tiny", "tiny"), ("seconds=x", "seconds=x"), ("seconds=0", "above 0"), ("a=b", "'a'")]
)
def test_bad_input_is_one_line_and_code_2(word, message, capsys):
    assert floors.main([word]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1
