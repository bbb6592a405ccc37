"""What a policy scores when it denoises in few steps, and how long a chunk then takes.

    python -m benchmarks.scores.few_steps bundle=DIR[,DIR…] output=FILE.json [n_episodes=50] [seed=100000]
        [steps=1,2,4,8]

Every bundle is sampled in every way that its training allows: one trained as diffusion by DDPM in 100 steps, DDIM in
16, DDIM and DPM-Solver++ in few; one trained by flow matching by Euler steps. All meet the same starts with the same
noise. FILE.json gets a row each, FILE.png the picture:

    score       mean over the episodes, with a 95 % interval over starts
    latency_ms  of one chunk at batch 1, its median over rounds in which every way has one turn

Exit code: 0, 2 for bad input, 130 after Ctrl-C, which keeps the rows that are done.
"""

from __future__ import annotations

import functools
import json
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from action_diffusion import envs
from action_diffusion.envs.rollout import generators, rollout
from action_diffusion.errors import InputError
from action_diffusion.files import atomic_path
from action_diffusion.policy import bundle as bundles
from action_diffusion.policy.diffusion.process import Diffusion
from action_diffusion.policy.objectives.distillation import Distillation
from action_diffusion.policy.policy import DiffusionPolicy
from action_diffusion.progress import progress
from action_diffusion.statistics import bootstrap_interval
from action_diffusion.training.evaluation.rollouts import BATCH
from benchmarks.command import command, options, whole
from benchmarks.report import machine

DEFAULTS = {"bundle": "", "output": "", "n_episodes": "50", "seed": "100000", "steps": "1,2,4,8"}
REFERENCES: dict[str, list[dict[str, Any]]] = {
    "diffusion": [
        {"scheduler": "ddpm", "num_inference_steps": 100},
        {"scheduler": "ddim", "num_inference_steps": 16},
    ],
    "flow": [],
    "mip": [],
}
FEW = {"diffusion": ("ddim", "dpm_solver++"), "flow": ("flow",), "mip": ("mip",)}
MOST = {"mip": 2}
"""Steps that a family can have, where that is few."""
ROUNDS = 25


@dataclass(frozen=True, kw_only=True)
class FewStepsPlan:
    bundles: list[Path]
    output: Path
    n_episodes: int
    seed: int
    steps: list[int]


@dataclass(kw_only=True)
class Way:
    """One way to sample one bundle, and what came of it."""

    name: str
    sampler: dict[str, Any]
    policy: DiffusionPolicy
    latency_ms: float = 0.0
    scores: Sequence[float] = ()

    def row(self) -> dict[str, Any]:
        return {
            "policy": self.name,
            "scheduler": self.sampler["scheduler"],
            "num_inference_steps": self.sampler["num_inference_steps"],
            "prediction": self.policy.process.prediction,
            "score": float(np.mean(self.scores)),
            "score_interval": list(bootstrap_interval(self.scores)),
            "success_rate": float(np.mean(np.asarray(self.scores) >= 1)),
            "latency_ms": self.latency_ms,
            "n_episodes": len(self.scores),
        }


def parse(words: Sequence[str]) -> FewStepsPlan:
    """From `name=value` words. Raises `InputError`."""
    given = options(words, DEFAULTS)
    if not given["bundle"] or not given["output"].endswith(".json"):
        raise InputError(
            "bundle and output are required: python -m benchmarks.scores.few_steps bundle=DIR output=FILE.json"
        )
    return FewStepsPlan(
        bundles=[Path(word) for word in given["bundle"].strip("[]").split(",")],
        output=Path(given["output"]),
        n_episodes=whole("n_episodes", given["n_episodes"]),
        seed=whole("seed", given["seed"], least=0),
        steps=[whole("steps", word) for word in given["steps"].strip("[]").split(",")],
    )


def ways(plan: FewStepsPlan) -> list[Way]:
    """All that is to be measured. Raises `InputError` for a bundle that cannot be loaded or has no simulator."""
    found, names = [], _names(plan.bundles)
    for path in plan.bundles:
        policy = bundles.load(path)
        if policy.spec.env is None:
            raise InputError(f"{path}: {policy.spec.task} has no simulator to evaluate in")
        process, family = policy.process, policy.process.family
        distilled = isinstance(policy.objective, Distillation)  # of one step, and no other
        steps = [n for n in plan.steps if n <= (1 if distilled else MOST.get(family, n))]
        few: list[dict[str, Any]] = [
            {"scheduler": name, "num_inference_steps": n} for name in FEW[family] for n in steps
        ]
        for sampler in few if distilled else REFERENCES[family] + few:
            n_times = process.num_train_timesteps if isinstance(process, Diffusion) else 0
            if sampler["scheduler"] == "ddim" and n_times % sampler["num_inference_steps"]:
                sampler = sampler | {"timestep_spacing": "leading"}  # the default, trailing, asks for equal steps
            policy = bundles.load(path, sampler=sampler, precision="fp32")  # as `evaluate` and `deploy` load it
            found.append(Way(name=names[path], sampler=sampler, policy=policy))
    if not found:
        listed = ",".join(map(str, plan.steps))
        raise InputError(f"steps={listed}: none of the bundles is sampled in so many: steps=1,2")
    return found


def _names(paths: Sequence[Path]) -> dict[Path, str]:
    """What rows and picture call the bundles: the folder that each is in, and all of the path where two share it."""
    short = {path: path.parent.name if path.name == "bundle" else path.name for path in paths}
    shared = {name for name in short.values() if list(short.values()).count(name) > 1}
    return {path: str(path) if name in shared else name for path, name in short.items()}


def measure_latency(found: Sequence[Way], rounds: int = ROUNDS) -> None:
    """Fill in `latency_ms`. The ways take turns, so that what else the machine does meets all of them."""
    seconds: dict[int, list[float]] = {number: [] for number in range(len(found))}
    for turn in range(rounds + 1):
        for number, way in enumerate(found):
            spec = way.policy.spec
            obs = {
                key: np.zeros((1, spec.n_obs_steps, *value.shape), dtype=value.dtype)
                for key, value in spec.observations.items()
            }
            noise, steps = generators(turn)
            began = time.perf_counter()
            way.policy.predict(obs, noise_generator=[noise], generator=[steps])
            if turn:  # the first allocates memory and picks kernels
                seconds[number].append(time.perf_counter() - began)
    for number, way in enumerate(found):
        way.latency_ms = 1e3 * statistics.median(seconds[number])


def _cost(way: Way) -> int:
    """Of an evaluation, for the time left: the simulators cost about as much as three denoising steps."""
    return 100 * (3 + int(way.sampler["num_inference_steps"]))


def evaluate(way: Way, plan: FewStepsPlan, advance: Callable[[int], None]) -> None:
    """Fill in `scores`: of the same starts, each with its own noise, whichever the way."""
    env = way.policy.spec.env
    assert env is not None
    told = 0

    def tell(share: float, _: Sequence[float]) -> None:
        nonlocal told
        advance(int(share * _cost(way)) - told)
        told = int(share * _cost(way))

    episodes = rollout(
        policy=way.policy,
        make_env=functools.partial(envs.make, **env),
        seeds=range(plan.seed, plan.seed + plan.n_episodes),
        keys=list(way.policy.spec.observations),
        n_envs=BATCH,
        policy_batch=BATCH,
        progress=tell,
    )
    way.scores = [episode.score for episode in episodes]


def write(plan: FewStepsPlan, found: Sequence[Way]) -> None:
    """FILE.json and, beside it, FILE.png."""
    settings = {"n_episodes": plan.n_episodes, "seed": plan.seed, "bundles": [str(path) for path in plan.bundles]}
    content: Mapping[str, Any] = {
        "machine": machine(),
        "settings": settings,
        "rows": [way.row() for way in found],
    }
    plan.output.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(plan.output) as temporary:
        temporary.write_text(json.dumps(content, indent=1) + "\n")
    with atomic_path(plan.output.with_suffix(".png")) as temporary:
        _figure(found).savefig(temporary, format="png", dpi=150)


def _figure(found: Sequence[Way]) -> Figure:
    figure = Figure(figsize=(6.0, 3.6), layout="constrained")
    axes = figure.subplots()
    lines = dict.fromkeys((way.name, way.sampler["scheduler"]) for way in found)
    for name, scheduler in lines:
        line = [way for way in found if (way.name, way.sampler["scheduler"]) == (name, scheduler)]
        line.sort(key=lambda way: way.latency_ms)
        x, y = [way.latency_ms for way in line], np.array([np.mean(way.scores) for way in line])
        low, high = np.array([bootstrap_interval(way.scores) for way in line]).T
        label = f"{scheduler} ({name})"
        axes.errorbar(x, y, yerr=[y - low, high - y], capsize=3, marker="o", ms=4, label=label)
        for way, at, height in zip(line, x, y, strict=True):
            axes.annotate(str(way.sampler["num_inference_steps"]), (at, height), (4, 4), textcoords="offset points")
    axes.set(xlabel="one chunk, batch 1 (ms)", ylabel="score, with 95 % interval", xscale="log", ylim=(0, 1.03))
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize="small")
    return figure


def show(found: Sequence[Way]) -> None:
    table = Table(box=None, pad_edge=False)
    for heading in ("policy", "scheduler"):
        table.add_column(heading)
    for heading in ("steps", "score", "95 %", "success", "ms a chunk"):
        table.add_column(heading, justify="right")
    for way in found:
        row = way.row()
        low, high = row["score_interval"]
        figures = f"{row['score']:.3f}", f"{low:.3f} to {high:.3f}", f"{row['success_rate']:.2f}"
        table.add_row(way.name, row["scheduler"], str(row["num_inference_steps"]), *figures, f"{row['latency_ms']:.1f}")
    Console(highlight=False).print(table)


@command
def main(words: Sequence[str]) -> int:
    """Measure, show, write; returns the exit code."""
    plan = parse(words)
    found = ways(plan)
    measure_latency(found)
    done: list[Way] = []
    try:
        with progress("few steps", sum(map(_cost, found))) as advance:
            for way in found:
                evaluate(way, plan, advance)
                done.append(way)
    finally:
        if done:
            write(plan, done)
            show(done)
            print(f"rows: {plan.output}, picture: {plan.output.with_suffix('.png')}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
