"""What a sweep is made of: words that all runs share, options that take several values, and their combinations.

DIR/sweep.json          what it is, so that another sweep is not mixed into it
DIR/runs/NAME/          a run as its command leaves it, log.txt, and run.json: how it ended
DIR/summary.json, report.html
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from hydra.core.override_parser.types import IntervalSweep, Override
from hydra.errors import HydraException

from action_diffusion.errors import InputError, unknown
from action_diffusion.files import atomic_path
from action_diffusion.options.configuration import alternatives_in, load
from action_diffusion.training.resuming import composed

MOST_RUNS = 1000
_OWN = {"output_dir": "give the sweep's", "resume": "run the same words again: a sweep always goes on"}
_LONGEST = 80


class CommandOutput(NamedTuple):
    """What a command that can be swept leaves in its output folder; "" for what it does not.

    makes: one of these is there when it ends well. results: of its evaluation. curves: numbers while it runs, a JSON
    object a line, over `clock`; budget: the option that says where the clock ends. begun: what is there as soon as
    `resume=true` can go on with it. seeded: whether its seed draws another policy, over which an interval is wanted
    (that of `evaluate` is its first start).
    """

    makes: tuple[str, ...]
    results: str
    curves: str = ""
    clock: str = "step"
    budget: str = ""
    begun: str = ""
    seeded: bool = True


KINDS = {
    "train": CommandOutput(
        ("bundle",), "evaluation/results.json", "metrics.jsonl", "step", "train.max_steps", "config.yaml"
    ),
    "finetune": CommandOutput(
        ("bundle",), "evaluation/results.json", "progress.jsonl", "env_steps", "budget.env_steps", "checkpoint"
    ),
    "evaluate": CommandOutput(("results.json", "summary.json"), "results.json", seeded=False),
}


@dataclass(frozen=True)
class SweepRun:
    """One of the combinations: what is its own, by option, in words; the folder's name; how long, in
    `CommandOutput.clock`."""

    settings: Mapping[str, str]
    name: str
    length: float | None = None


@dataclass(frozen=True)
class Sweep:
    """A command, the words that all its runs share, and the options that take several values, as Hydra reads them."""

    command: str
    fixed: tuple[str, ...]
    axes: tuple[Override, ...]
    config_dir: str | None = None

    @property
    def kind(self) -> CommandOutput:
        return KINDS[self.command]

    @property
    def names(self) -> list[str]:
        return [axis.key_or_group for axis in self.axes]

    def words(self, settings: Mapping[str, str]) -> list[str]:
        return [*self.fixed, *(f"{key}={value}" for key, value in settings.items())]

    def combinations(self) -> Iterator[dict[str, str]]:
        """Every combination, the last option varies fastest. Raises `InputError` for more than MOST_RUNS."""
        values = [self._values(axis) for axis in self.axes]
        if math.prod(map(len, values)) > MOST_RUNS:
            raise InputError(f"more than {MOST_RUNS:,} runs: sweep fewer values at a time")
        for chosen in itertools.product(*values):
            yield dict(zip(self.names, chosen, strict=True))

    def extremes(self) -> Iterator[dict[str, str]]:
        """For a sweeper that chooses itself: every value of each option, or the ends of its range, with the others at
        their first."""
        values = list(map(self._ends, self.axes))
        first = {name: value[0] for name, value in zip(self.names, values, strict=True)}
        yield first
        for name, found in zip(self.names, values, strict=True):
            yield from (first | {name: value} for value in found[1:])

    def run(self, settings: Mapping[str, str]) -> tuple[SweepRun, dict[str, Any]]:
        """The run of these settings, and its configuration. Raises `InputError` where that cannot be.

        Its name is made of the settings, and of a hash of the whole configuration: the same one is the same folder,
        in whatever order it is typed.
        """
        settings = dict(sorted(settings.items(), key=lambda item: (item[0] == "seed", item[0])))
        words = self.words(settings)
        compose = composed if self.command == "train" else self._load
        config = compose(words, self.config_dir)
        kept = {key: value for key, value in config.items() if key not in _OWN}
        digest = hashlib.sha256(json.dumps(kept, sort_keys=True, default=str).encode()).hexdigest()[:8]
        said = "_".join(f"{short}-{_plain(settings[key])}" for key, short in shortened(list(settings)).items())
        length: Any = config
        for part in self.kind.budget.split("."):
            length = length.get(part) if isinstance(length, Mapping) else None
        return SweepRun(settings, f"{said[:_LONGEST]}{'-' * bool(said)}{digest}", length), config

    def _load(self, words: Sequence[str], config_dir: str | None) -> dict[str, Any]:
        return load(self.command, words, config_dir)

    def _values(self, axis: Override) -> list[str]:
        if isinstance(axis.value(), IntervalSweep):
            raise InputError(f"{axis.input_line}: a grid takes single values; ranges are for sweeper=optuna")
        found = list(itertools.islice(axis.sweep_string_iterator(), MOST_RUNS + 1))
        if not found:
            raise InputError(f"{axis.input_line}: no value is in it")
        for number, value in enumerate(found):
            if value in found[:number]:
                raise InputError(f"{axis.input_line}: {value} is given twice")
        return found

    def _ends(self, axis: Override) -> list[str]:
        value = axis.value()
        return [str(value.start), str(value.end)] if isinstance(value, IntervalSweep) else self._values(axis)


def read(command: str, words: Sequence[str], config_dir: str | None) -> Sweep:
    """The sweep that words of a command ask for. Raises `InputError` for what cannot be read."""
    if command not in KINDS:
        raise unknown("command to sweep", command, KINDS)
    fixed, axes = list[str](), list[Override]()
    seen = set[str]()
    for word in words:
        one = alternatives_in(command, word)
        key = one.key_or_group
        if key in _OWN:
            raise InputError(f"{key}= of single runs is the sweep's own: {_OWN[key]}")
        if key in seen:
            raise InputError(f"{key}= is given twice: write its values with commas, {key}=a,b")
        seen.add(key)
        if not one.is_sweep_override():
            fixed.append(word)
            continue
        try:
            list(itertools.islice(one.sweep_string_iterator(), 1)) if one.is_discrete_sweep() else one.value()
        except (HydraException, ValueError, TypeError) as error:
            raise InputError(f"{word!r} cannot be read ({' '.join(str(error).split())[:200]})") from None
        axes.append(one)
    return Sweep(command, tuple(fixed), tuple(axes), config_dir)


def claim(folder: Path, sweep: Sweep) -> None:
    """Make `folder` the sweep's, or find that it is; more values of the same options may be added to it.

    Raises `InputError` for a folder that holds another sweep, or something else.
    """
    about = {
        "command": sweep.command,
        "shared": sorted(sweep.fixed),
        "swept": sorted(sweep.names),
        "config_dir": sweep.config_dir,
    }
    file = folder / "sweep.json"
    if file.is_file():
        try:
            there = json.loads(file.read_text(encoding="utf-8"))
        except (ValueError, RecursionError):
            raise InputError(f"{file} cannot be read: give another output_dir") from None
        if there != about:
            was = there if isinstance(there, dict) else {}
            shared, swept = (value if isinstance(value, list) else [] for value in map(was.get, ("shared", "swept")))
            said = " ".join(map(str, [was.get("command"), *shared, *(f"{name}=…" for name in swept)]))
            raise InputError(f"{folder} holds another sweep ({said}): give another output_dir")
    elif folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"{folder} holds something else than a sweep: give another output_dir")
    else:
        with atomic_path(file) as partial:
            partial.write_text(json.dumps(about, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def default_folder(sweep: Sweep) -> Path:
    """The same for the same words, whatever values the swept options take."""
    about = json.dumps([sweep.command, sorted(sweep.fixed), sorted(sweep.names), sweep.config_dir])
    return Path("outputs") / f"sweep-{sweep.command}-{hashlib.sha256(about.encode()).hexdigest()[:8]}"


def shortened(names: Sequence[str]) -> dict[str, str]:
    """The last part of each option's name, or all of it where two would be the same."""
    last = [name.rpartition(".")[2] for name in names]
    return {name: short if last.count(short) == 1 else name for name, short in zip(names, last, strict=True)}


def _plain(value: str) -> str:
    """A value in a folder's name."""
    return re.sub(r"[^\w.+]+", "-", value).strip("-")
