"""The row `cache`: fewer evaluations of the network, for chunks that are hardly others."""

from __future__ import annotations

import functools
import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from action_diffusion.datasets.batches.loader import BatchSource
from action_diffusion.options.extensions import Fit
from action_diffusion.policy import bundle as bundles
from action_diffusion.policy import kernels
from action_diffusion.policy.build import build_policy
from action_diffusion.policy.extensions.cache import Cache, Reuse, ReuseCost, deviations, drawn
from action_diffusion.policy.extensions.extension import Extension, Fitted
from action_diffusion.policy.policy import DiffusionPolicy
from action_diffusion.policy.reading import read_config
from action_diffusion.policy.sample import Acting, Encoded
from action_diffusion.training.fitting import demonstrations
from benchmarks.rows import policies
from benchmarks.rows.system import Measured, System

TOLERANCE, ALPHA = 3.0, 0.1
WINDOWS, TRIED, STARTS = 512, 64, 200
FEWER, LOSS = 2.5, 0.01
PAPER = {"name": "unet1d", "channels": [512, 1024, 2048], "kernel_size": 5, "time_dim": 128}
Steps = tuple[int, ...]


def scheduled(asked: Steps, n: int) -> ReuseCost:
    """With which the network is asked at these of n steps, whatever it says."""
    spent = np.full((n, n), np.inf)
    for first, after in zip(asked, [*asked[1:], n], strict=True):
        spent[first, first:after] = 0.0
    return ReuseCost(np.ones((n, n)), spent)


class Scheduled(Extension):
    """The network is asked at the same steps for every chunk."""

    def __init__(self, policy: DiffusionPolicy, asked: Steps) -> None:
        super().__init__(policy, Fitted({}))
        self._prediction = scheduled(asked, policy.sampler.num_inference_steps)

    def hooks(self, seen: Encoded) -> Sequence[Reuse]:
        return (Reuse(self.policy, self._prediction, 1.0),)


def schedule(policy: DiffusionPolicy, train: BatchSource, fitted: Fitted, n: int, seed: int) -> Steps:
    """The n steps with which 1 − alpha of the chunks end within the smallest distance, as far as the search finds them:
    those of the least sum of usual predictions (by dynamic programming), of which one after the other is moved."""
    windows, count = drawn(train, TRIED, seed), policy.sampler.num_inference_steps

    @functools.cache
    def reached(asked: Steps) -> float:
        both = np.array([0.0, 1.0])
        moved, _ = deviations(policy, train, windows, scheduled(asked, count), both, seed)
        return float(np.quantile(moved[:, 1], 1 - ALPHA))

    spent = ReuseCost.of(fitted.arrays, count).spent
    best: list[dict[int, tuple[float, Steps]]] = [{0: (0.0, ())}, *({} for _ in range(count))]
    for first in range(count):
        for made, (before, asked) in best[first].items():
            for after in range(first + 1, count + 1):
                so_far = best[after].get(made + 1, (math.inf, ()))
                best[after][made + 1] = min(so_far, (before + float(spent[first, after - 1]), (*asked, first)))
    chosen = best[count][n][1]
    for place in range(n - 1, 0, -1):
        others = [*chosen[:place], *chosen[place + 1 :]]
        moves = [tuple(sorted([*others, step])) for step in range(1, count) if step not in others]
        chosen = min(moves, key=reached)
    return chosen


def halves(source: BatchSource) -> tuple[BatchSource, BatchSource]:
    """Every other episode."""
    windows = source.windows
    which = np.unique(windows.first, return_inverse=True)[1] % 2

    def part(rows: NDArray[np.bool_]) -> BatchSource:
        return source.with_windows(
            replace(windows, start=windows.start[rows], first=windows.first[rows], end=windows.end[rows])
        )

    return part(which == 0), part(which == 1)


def milliseconds(policy: DiffusionPolicy, obs: dict[str, np.ndarray], ways: dict[str, Any], n: int) -> dict[str, float]:
    """A chunk's, by turns, the median of n."""
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(n + 1):
        for name, extensions in ways.items():
            policy.extensions = extensions
            began = time.perf_counter()
            policy.predict(obs)
            if turn:
                taken[name].append(1e3 * (time.perf_counter() - began))
    return {name: statistics.median(values) for name, values in taken.items()}


def measure(seed: int) -> Measured:
    """See `SYSTEM`."""
    bundle = policies.pusht(seed)
    policy = bundles.load(bundle, precision="fp32")
    train, held_out, _ = demonstrations(policy, bundle, Fit(bundle=str(bundle), seed=seed))
    calibrate, test = halves(held_out)
    options = {"tolerance": TOLERANCE, "alpha": ALPHA, "seed": seed}
    fitted = Cache.fit(policy, train, calibrate, options)
    count, windows = policy.sampler.num_inference_steps, drawn(test, WINDOWS, seed)

    def tested(prediction: ReuseCost, budget: float) -> tuple[float, float]:
        """Evaluations a chunk, and the share beyond the tolerance."""
        moved, asked = deviations(policy, test, windows, prediction, np.array([0.0, budget]), seed)
        return float(asked[:, 1].mean()), float((moved[:, 1] > TOLERANCE).mean())

    evaluations, violations = tested(ReuseCost.of(fitted.arrays, count), fitted.options["budget"])
    beside: dict[str, float] = {}
    ways: dict[str, list[Acting]] = {"plain": [], "cache": [Cache(policy, fitted)]}
    for n in (math.floor(evaluations), math.ceil(evaluations)):
        asked = schedule(policy, train, fitted, n, seed)
        beside[f"violations of {n} fixed"] = tested(scheduled(asked, count), 1.0)[1]
        ways[f"{n} fixed"] = [Scheduled(policy, asked)]
    scores = {}
    for name, extensions in ways.items():
        policy.extensions = extensions
        scores[name] = policies.scores(policy, range(STARTS)).mean()
    obs = {key: value[0].cpu().numpy() for key, value in test.gather(windows[:1]).obs.items()}
    small = milliseconds(policy, obs, {name: ways[name] for name in ("plain", "cache")}, 50)
    large = build_policy(read_config(bundle)["policy"] | {"denoiser": PAPER}, policy.spec).eval()
    kernels.accelerate(large, precision="fp32")
    every = tuple(range(count))
    fewer = [Scheduled(large, every[: math.ceil(evaluations)])]
    paper = milliseconds(large, obs, {"plain": [], "cache": fewer}, 3)
    return Measured(
        {
            "evaluations": evaluations,
            "violations": violations,
            "score": scores["cache"],
            "ms": small["cache"],
            "ms paper": paper["cache"],
        },
        {
            "evaluations": count,
            "score": scores["plain"],
            "ms": small["plain"],
            "ms paper": paper["plain"],
            **beside,
            **{f"score of {name}": value for name, value in scores.items() if name.endswith("fixed")},
        },
        passed=evaluations <= count / FEWER
        and violations <= ALPHA
        and scores["cache"] >= scores["plain"] - LOSS
        and small["cache"] < small["plain"],
    )


SYSTEM = System(
    name="cache",
    what="reuse of the denoiser's last estimate, where it is predicted to move the chunk by less than 3 px",
    bar=f"evaluations ≤ 20 / {FEWER}, more than {TOLERANCE:g} px off ≤ {ALPHA}, score within {LOSS}, in less time",
    measure=measure,
)
