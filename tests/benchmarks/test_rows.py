"""Rows of benchmarks that claim something: each file has one, under a name of its own."""

from __future__ import annotations

from pathlib import Path

import pytest
from rich.console import Console

from action_diffusion.errors import InputError
from benchmarks.rows.command import main, run
from benchmarks.rows.system import System, systems

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


def test_a_package_that_is_missing_is_said_before_anything_is_measured():
    measured: list[int] = []
    first = System(name="first", what="-", bar="-", measure=measured.append)
    second = System(
        name="second", what="-", bar="-", measure=measured.append, needs={"nowhere_at_all": "pip install x"}
    )
    with pytest.raises(InputError, match=r"the row second needs nowhere_at_all: pip install x, or name the other rows"):
        run([first, second], 0, None, Console())
    assert not measured
