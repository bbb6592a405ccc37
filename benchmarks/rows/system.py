"""A row of `python -m benchmarks.systems`: a claim, how it is checked, and what came of it."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from action_diffusion.errors import InputError


@dataclass(frozen=True)
class Measured:
    """measured, baseline: numbers by name, of the system, and of what it is held against. passed: the bar holds."""

    measured: Mapping[str, float]
    baseline: Mapping[str, float]
    passed: bool


@dataclass(frozen=True, kw_only=True)
class System:
    """name: of the row. what: one sentence. bar: what must hold, in words and numbers. measure: the check, of at most
    five minutes on two cores, from a seed that it is given. needs: a module that must be there → what to install."""

    name: str
    what: str
    bar: str
    measure: Callable[[int], Measured]
    needs: Mapping[str, str] = field(default_factory=dict)

    def check(self) -> None:
        """Raises `InputError` for a package that is missing, before anything is measured."""
        for module, command in self.needs.items():
            if importlib.util.find_spec(module) is None:
                raise InputError(f"the row {self.name} needs {module}: {command}, or name the other rows (--only)")

    def row(self, seed: int) -> dict[str, Any]:
        """Measure, as JSON has it."""
        found = self.measure(seed)
        return {
            "name": self.name,
            "what": self.what,
            "measured": dict(found.measured),
            "bar": self.bar,
            "passed": bool(found.passed),
            "baseline": dict(found.baseline),
        }


def systems(package: str = "benchmarks.systems") -> dict[str, System]:
    """All of them by name: the `SYSTEM` of each file in the folder of `package` that has one."""
    here = Path(__file__).parents[2] / Path(*package.split("."))
    names = sorted(file.stem for file in here.glob("*.py") if not file.stem.startswith("__"))
    modules = [importlib.import_module(f"{package}.{name}") for name in names]
    found = [module.SYSTEM for module in modules if hasattr(module, "SYSTEM")]
    return {system.name: system for system in found}
