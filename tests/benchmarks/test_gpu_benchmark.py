"""The benchmark of a GPU, small and on a CPU: the same works, from random demonstrations to a table."""

from __future__ import annotations

import json
from importlib import import_module

import numpy as np
import pytest

gpu = import_module("benchmarks.speed.gpu")


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Few demonstrations, which fill a quarter of a gigabyte otherwise, and a small network."""
    monkeypatch.setattr(gpu, "EPISODES", 3)
    monkeypatch.setattr(gpu, "LENGTH", 30)
    monkeypatch.setitem(gpu.SIZES, "small", [16, 32])


@pytest.mark.slow
def test_the_table_is_measured(tmp_path, capsys):
    out = tmp_path / "gpu.json"
    words = ["device=cpu", "size=small", "batch=2", "seconds=0.01", "compile=false", f"output={out}"]
    assert gpu.main(words) == 0
    rows = json.loads(out.read_text())["rows"]
    assert [row["work"] for row in rows if row["options"] == "as it is"] == ["chunk, small"]
    assert any(row["options"].startswith("plain: fp32, DataLoader") for row in rows)
    assert all(row["ms"] > 0 for row in rows)
    assert "times plain" in capsys.readouterr().out


@pytest.mark.slow
def test_a_plain_loader_gives_what_a_resident_source_gives():
    arrays, windows = gpu.demonstrations()
    image, position, action, mask = gpu.SlicedFrames(arrays, windows)[7]
    rows = windows.rows(np.array([7]))[0]
    np.testing.assert_array_equal(image, arrays["image"][rows[:2]])
    np.testing.assert_array_equal(position, arrays["agent_pos"][rows[:2]])
    np.testing.assert_array_equal(action, arrays["action"][rows])
    assert mask.shape == (16,)


@pytest.mark.parametrize(
    ("word", "message"), [("size=tiny", "tiny"), ("batch=0", "batch=0"), ("compile=x", "compile"), ("a=b", "'a'")]
)
def test_bad_input_is_one_line_and_code_2(word, message, capsys):
    assert gpu.main(["device=cpu", word]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1
