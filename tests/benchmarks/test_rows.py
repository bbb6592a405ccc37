"""Rows of benchmarks that claim something: each file has one, under a name of its own."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.rows.command import main
from benchmarks.rows.system import systems

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("package", ["benchmarks.systems", "benchmarks.reward"])
def test_each_file_of_rows_has_one(package, capsys):
    files = [file for file in (ROOT / Path(*package.split("."))).glob("*.py") if not file.stem.startswith("__")]
    assert len(systems(package)) == len(files)
    assert all(system.what and system.bar for system in systems(package).values())
    with pytest.raises(SystemExit) as left:
        main(["--help"], package, "What it is.")
    assert left.value.code == 0
    assert f"python -m {package}" in capsys.readouterr().out
