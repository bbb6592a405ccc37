"""What trials are of: which bundles, from how many starts, in which order. Fixed before the first run, in plan.json.

trial 1   start ── B ── A          a trial is a start, from which every bundle runs once
trial 2   start ── A ── B
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np

from action_diffusion.errors import InputError
from action_diffusion.files import atomic_path
from action_diffusion.options import Evaluate
from action_diffusion.policy.spec import PolicySpec, env_words
from action_diffusion.schema import Between, Section, Sized, check, shown

NAME = "plan.json"
FORMAT = 1
ELSE = "give another output_dir"
STREAM = 20
"""Of random numbers: other ones than the policies' noise of the same seed."""
KEPT = (
    *("robot", "seed", "trials", "scheduling", "execution_horizon", "dry_run", "safety"),
    *("sampler", "extensions", "intents", "precision"),
)
"""Options that all runs of a plan have in common."""


@dataclass(frozen=True, kw_only=True)
class Contender:
    """A bundle; sha256: of all that is in it."""

    path: str
    sha256: str


@dataclass(frozen=True, kw_only=True)
class Plan:
    """See the module. orders: of each trial, the bundles' numbers as they run. settings: options, see `KEPT`.

    made: how many of them, the first ones, are to be made where somebody ends early; None: all, as in the file.
    """

    format: Annotated[int, Between(FORMAT, FORMAT)]
    bundles: Annotated[list[Contender], Sized(1, 100)]
    orders: Annotated[list[list[int]], Sized(1, 10_000)]
    settings: Section
    made: Annotated[int, Between(1)] | None = None

    def __post_init__(self) -> None:
        every = list(range(len(self.bundles)))
        for number, order in enumerate(self.orders, 1):
            if sorted(order) != every:
                raise InputError(f"trial {number} of the plan is {shown(order)}: every bundle runs once in each")

    @property
    def trials(self) -> int:
        """From how many starts."""
        return self.made or len(self.orders)

    def seed(self, trial: int) -> int:
        """The start of `trial`, in a simulator, and of the policies' noise: all bundles meet the same."""
        return int(self.settings["seed"]) + trial


def planned(config: Evaluate, folder: Path | None) -> Plan:
    """The plan that is in `folder`, with fewer trials where fewer are asked for; else a new one, not written yet.

    Raises `InputError` for a bundle that is there twice, a folder that holds another plan or another evaluation, and a
    plan that cannot be read.
    """
    paths = config.paths
    for path in paths:
        if [Path(one).resolve() for one in paths].count(Path(path).resolve()) > 1:
            raise InputError(f"bundles= names {path} twice")
    kept = json.loads(json.dumps({name: _plain(getattr(config, name)) for name in KEPT}))
    bundles = [Contender(path=path, sha256=fingerprint(Path(path))) for path in paths]
    seeds = [
        config.seed,
        *(int(one.sha256[:8], 16) for one in bundles),
    ]  # whoever knows another plan does not know this
    orders = shuffled(len(paths), config.trials, *seeds)
    new = Plan(format=FORMAT, bundles=bundles, orders=orders, settings=kept)
    if folder is None:
        return new
    if not (folder / NAME).exists():
        for name in ("results.json", "trials.jsonl"):
            if (folder / name).exists():
                raise InputError(f"{folder} holds {name} and no {NAME}: {ELSE}")
        return new
    old = read_plan(folder / NAME)
    if config.trials < len(old.orders):
        old = replace(old, made=config.trials)
    _check_same(new, old, folder)
    return old


def read_plan(path: Path) -> Plan:
    """Raises `InputError` for what is none."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} cannot be read: {error}") from None
    try:
        plan: Plan = check({**data, "made": None} if isinstance(data, dict) else data, Plan, str(path))
    except InputError as error:
        raise InputError(f"{path} is no plan of trials: {error}") from None
    return plan


def write_plan(plan: Plan, folder: Path) -> None:
    """It appears only when it is complete."""
    with atomic_path(folder / NAME) as temporary:
        temporary.write_text(json.dumps(asdict(plan), indent=2) + "\n", encoding="utf-8")


def shuffled(bundles: int, trials: int, *seeds: int) -> list[list[int]]:
    """Of each trial, the order of the bundles' numbers: random, and the same for the same numbers.

    Over all trials each bundle comes first, second, … equally often, or nearly so where the numbers do not divide:
    whoever resets gets better at it, and light and motors change. Which trials have which order is left to chance, so
    that nobody who has seen some knows the next.
    """
    random = np.random.default_rng([STREAM, *seeds])
    orders: list[list[int]] = []
    while len(orders) < trials:
        drawn = random.permutation(bundles)
        orders += [np.roll(drawn, turn).tolist() for turn in range(bundles)]
    return [orders[index] for index in random.permutation(trials)]


def check_together(specs: Mapping[str, PolicySpec]) -> None:
    """Raises `InputError` where policies, by their bundles' paths, cannot act on one robot from the same starts."""
    (first, one), *others = specs.items()
    for path, spec in others:
        pairs: list[tuple[str, object, object]] = [("control_rate", one.control_rate, spec.control_rate)]
        pairs += [("an action of shape", list(one.action.shape), list(spec.action.shape))]
        pairs += [("an action in", one.action.unit, spec.action.unit)] * bool(one.action.unit and spec.action.unit)
        if one.env is not None and spec.env is not None:
            pairs += [("the simulator", env_words(one.env), env_words(spec.env))]
        for key in set(one.observations) & set(spec.observations):
            seen, other = one.observations[key], spec.observations[key]
            pairs += [(f"observation {key},", f"{seen.kind} {[*seen.shape]}", f"{other.kind} {[*other.shape]}")]
        for what, mine, theirs in pairs:
            if mine != theirs:
                raise InputError(f"{first} has {what} {mine}, {path} {theirs}: they cannot run on the same robot")


def fingerprint(bundle: Path) -> str:
    """SHA-256 of the names and contents of a bundle's files, or of the one that it is (ONNX)."""
    digest = hashlib.sha256()
    for path in sorted(path for path in (bundle, *bundle.rglob("*")) if path.is_file()):
        digest.update(path.relative_to(bundle).as_posix().encode() + b"\0")
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def _plain(value: Any) -> Any:
    return vars(value) if hasattr(value, "__dict__") else value


def _check_same(new: Plan, old: Plan, folder: Path) -> None:
    """Raises `InputError` where `new` is not what was planned in `folder`."""
    bundles = list(zip(new.bundles, old.bundles, strict=False))
    changed = [one.path for one, other in bundles if one.path == other.path and one.sha256 != other.sha256]
    if changed:
        raise InputError(f"{changed[0]} has changed since the trials in {folder} began: {ELSE}")
    if [one.sha256 for one in new.bundles] != [one.sha256 for one in old.bundles]:
        names, others = (",".join(one.path for one in plan.bundles) for plan in (new, old))
        raise InputError(f"{folder} holds trials of [{others}], not of [{names}]: {ELSE}")
    for name, value in new.settings.items():
        if value != old.settings.get(name) and not (name == "trials" and old.made):
            raise InputError(f"{folder} holds trials with {_option(name, old.settings.get(name), value)}: {ELSE}")


def _option(name: str, was: Any, value: Any) -> str:
    """What differs, as it is typed."""
    if isinstance(was, Mapping) and isinstance(value, Mapping):
        key = next((key for key in value if value[key] != was.get(key)), "")
        return _option(f"{name}.{key}", was.get(key), value.get(key))
    return f"{name}={json.dumps(was)}, not {json.dumps(value)}"
