"""What a policy scores that thinks for some control steps, and how far the arm jumps where its chunks meet.

    python -m benchmarks.scores.latency bundle=DIR output=FILE.json [scheduling=rtc,naive] [delay=0,4] [n_episodes=50]

Every cell of scheduling × delay runs the same starts with the same noise, on a virtual clock: a chunk takes exactly so
many control steps, however long it really takes. FILE.json gets a row a cell, FILE.png the picture:

    score  mean over the episodes, with a 95 % interval over starts
    jump   99th percentile, over all swaps, of the distance between the new command and the command that the running
           chunk had for the same instant, in the data's units

More options: seed=100000, execution_horizon=8 (the bundle's n_action_steps), rtc.method=…, rtc.mask=…, rtc.beta=…,
rtc.rounds=…, any of the sampler's as sampler.num_inference_steps=…, processes=2 (a core each). Exit code: 0, 2 for bad
input, 130 after Ctrl-C, which keeps the cells that are done.
"""

from __future__ import annotations

import functools
import multiprocessing
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml

from action_diffusion.deploy.loop.prediction import Guidance
from action_diffusion.deploy.loop.virtual import run_episodes
from action_diffusion.deploy.robot import robots
from action_diffusion.errors import InputError, unknown
from action_diffusion.parallel import cores
from action_diffusion.policy import bundle as bundles
from action_diffusion.policy.action_queue import SCHEDULINGS, check_room
from action_diffusion.progress import progress
from benchmarks.command import command, whole
from benchmarks.scores.latency_report import Cell, CellResult, show, write

DELAYS = (0, 1, 2, 4, 8)
OPTIONS = (
    *("bundle", "output", "scheduling", "delay", "n_episodes", "seed", "execution_horizon"),
    *("rtc.method", "rtc.mask", "rtc.overlap", "rtc.beta", "rtc.rounds", "rtc.pin", "processes"),
)
COST = {"rtc": 3}
"""How much longer than of the others a control step takes, for the order and the time left."""


@dataclass(frozen=True, kw_only=True)
class LatencySettings:
    """What is the same in all cells."""

    bundle: Path
    n_episodes: int
    seed: int
    execution_horizon: int
    guidance: Guidance
    sampler: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class LatencyPlan:
    """What is asked for."""

    settings: LatencySettings
    cells: list[Cell]
    output: Path
    processes: int


def parse(words: Sequence[str]) -> LatencyPlan:
    """From `name=value` words. Raises `InputError`, also for cells that the policy's chunks are too short for."""
    given: dict[str, str] = {}
    for word in words:
        name, equals, value = word.partition("=")
        if not equals:
            raise InputError(
                f"{word!r} is not of the form name=value; they stand at the top of benchmarks/scores/latency.py"
            )
        if name not in OPTIONS and not name.startswith("sampler."):
            raise unknown("option", name, OPTIONS)
        given[name] = value
    for name in ("bundle", "output"):
        if not given.get(name):
            raise InputError(f"{name} is required: python -m benchmarks.scores.latency bundle=DIR output=FILE.json")
    output = Path(given["output"])
    if output.is_dir() or output.suffix != ".json":
        raise InputError(f"output={output} must be a file named *.json")
    spec = bundles.read_spec(Path(given["bundle"]))
    settings = LatencySettings(
        bundle=Path(given["bundle"]),
        n_episodes=_whole(given, "n_episodes", 50, least=1),
        seed=_whole(given, "seed", 100_000, least=0),
        execution_horizon=_whole(given, "execution_horizon", spec.n_action_steps, least=1),
        guidance=Guidance(
            method=given.get("rtc.method", Guidance.method),
            mask=given.get("rtc.mask", Guidance.mask),
            beta=_number(given, "rtc.beta", Guidance.beta),
            rounds=_whole(given, "rtc.rounds", Guidance.rounds, least=0),
            overlap=_whole(given, "rtc.overlap", 0, least=0) if "rtc.overlap" in given else Guidance.overlap,
            pin=_switch(given, "rtc.pin", Guidance.pin),
        ),
        sampler={name[8:]: yaml.safe_load(value) for name, value in given.items() if name.startswith("sampler.")},
    )
    cells = _cells(given)
    for cell in cells:
        steps = {"execution_horizon": settings.execution_horizon, "delay": cell.delay}
        check_room(cell.scheduling, horizon=spec.horizon, n_obs_steps=spec.n_obs_steps, **steps)
    return LatencyPlan(
        settings=settings,
        cells=cells,
        output=output,
        processes=_whole(given, "processes", min(cores(), len(cells)), least=1),
    )


def _cells(given: Mapping[str, str]) -> list[Cell]:
    delays = [
        _whole({"delay": word}, "delay", 0, least=0)
        for word in _several(given, "delay", [str(delay) for delay in DELAYS])
    ]
    schedulings = _several(given, "scheduling", SCHEDULINGS)
    for scheduling in schedulings:
        if scheduling not in SCHEDULINGS:
            raise unknown("scheduling", scheduling, SCHEDULINGS)
    return [Cell(scheduling, delay) for scheduling in schedulings for delay in delays]


def _several(given: Mapping[str, str], name: str, default: Sequence[str]) -> list[str]:
    """The values of an option, separated by commas, in brackets or not; each once."""
    words = given.get(name, ",".join(default)).strip("[]").split(",")
    return list(dict.fromkeys(word.strip() for word in words))


def _number(given: Mapping[str, str], name: str, default: float) -> float:
    try:
        return float(given.get(name, default))
    except ValueError:
        raise InputError(f"{name}={given[name]} must be a number") from None


def _whole(given: Mapping[str, str], name: str, default: int, *, least: int) -> int:
    return whole(name, given.get(name, str(default)), least)


def _switch(given: Mapping[str, str], name: str, default: bool) -> bool:
    word = given.get(name, str(default)).lower()
    if word not in ("true", "false"):
        raise InputError(f"{name}={given[name]} must be true or false")
    return word == "true"


# Running.


class Bench:
    """A loaded policy on its simulator, one core."""

    def __init__(self, settings: LatencySettings) -> None:
        torch.set_num_threads(1)  # a process a core, and the same bits however many processes there are
        self._settings = settings
        # Nothing is trained, and guidance differentiates with respect to chunks alone.
        self._policy = bundles.load(settings.bundle, sampler=settings.sampler or None).requires_grad_(False)
        self._robot = functools.partial(
            robots.make, _robot_name(self._policy.spec.env), robots.RobotTask.of(self._policy.spec)
        )

    def run(self, cell: Cell, advance: Callable[[int], None]) -> CellResult:
        settings = self._settings
        began = time.monotonic()
        episodes = run_episodes(
            policy=self._policy,
            make_robot=self._robot,
            seeds=range(settings.seed, settings.seed + settings.n_episodes),
            keys=list(self._policy.spec.observations),
            scheduling=cell.scheduling,
            delay=cell.delay,
            execution_horizon=settings.execution_horizon,
            guidance=settings.guidance,
            progress=lambda steps: advance(steps * COST.get(cell.scheduling, 1)),
        )
        return CellResult.of(cell, episodes, time.monotonic() - began)


def _robot_name(env: Mapping[str, Any] | None) -> str:
    name = "" if env is None else f"sim_{env.get('name')}"
    if name not in robots.ROBOTS:
        raise InputError(f"the bundle's task has no simulated robot: {', '.join(robots.ROBOTS)} is there")
    return name


def results(plan: LatencyPlan) -> Iterator[CellResult]:
    """Every cell as it is done, the slow ones first; on as many cores as there are processes."""
    bench = Bench(plan.settings)  # what cannot be loaded is said here, once
    robot = bench._robot()
    robot.close()
    cells = sorted(plan.cells, key=lambda cell: (-COST.get(cell.scheduling, 1), -cell.delay))
    total = robot.max_steps * plan.settings.n_episodes * sum(COST.get(cell.scheduling, 1) for cell in cells)
    with progress("latency", total) as advance:
        if plan.processes == 1:
            for cell in cells:
                yield bench.run(cell, advance)
        else:
            yield from _in_processes(plan, cells, advance)


def _in_processes(plan: LatencyPlan, cells: Sequence[Cell], advance: Callable[[int], None]) -> Iterator[CellResult]:
    context = multiprocessing.get_context("spawn")
    done, stop, told = context.Value("q", 0), context.Event(), 0
    with ProcessPoolExecutor(
        plan.processes, mp_context=context, initializer=_begin, initargs=(plan.settings, done, stop)
    ) as pool:
        try:
            waiting = {pool.submit(_run, cell) for cell in cells}
            while waiting:
                finished, waiting = wait(waiting, timeout=1.0, return_when=FIRST_COMPLETED)
                advance(done.value - told)
                told = done.value
                for future in finished:
                    yield future.result()
        finally:
            stop.set()
            pool.shutdown(wait=False, cancel_futures=True)


_process: dict[str, Any] = {}


def _begin(settings: LatencySettings, done: Any, stop: Any) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent tells us
    _process.update(bench=Bench(settings), done=done, stop=stop)


def _run(cell: Cell) -> CellResult:
    def advance(steps: int) -> None:
        if _process["stop"].is_set():
            raise RuntimeError("stopped")
        with _process["done"].get_lock():
            _process["done"].value += steps

    return _process["bench"].run(cell, advance)


@command
def main(words: Sequence[str]) -> int:
    """Measure, show, write; returns the exit code."""
    plan, found = parse(words), list[CellResult]()
    try:
        for result in results(plan):
            found.append(result)
            print(result.line(), file=sys.stderr)
    finally:
        found.sort(key=lambda result: plan.cells.index(result.cell))
        if found:
            write(plan.output, found, plan.settings)
            show(found)
            print(f"rows: {plan.output}, picture: {plan.output.with_suffix('.png')}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
