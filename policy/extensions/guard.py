"""How unusual an observation and a chunk are, beside what was demonstrated: scores, and thresholds for them.

    condition ─▶ distance to the nearest demonstrated one ──────────▶ / threshold ─▶ guard.observation ─▶ guard.level
    condition, chunk + σ n ─▶ denoiser ─▶ x̂0 ─▶ distance to chunk ──▶ / threshold ─▶ guard.chunk              │
                                                                                           Watch ◀─ their sum ─┘

The chunk's score is its denoising error (DOSER: a diffusion model tells what is out of its distribution by how far it
moves it), on a fixed grid of L noise levels and with fixed noise n, so that it is a function of observation and chunk:

    s(a | o)² = 1/L Σ_l mean ‖D(a_l a + b_l n_l, t_l; o) − a‖² / σ_l²,      σ_l = b_l / a_l

in normalised units. All levels are rows of one evaluation, which on a GPU costs what one row does; on a CPU each costs
a denoising step, and the least noise alone tells as much as several levels.

A chunk that the policy made itself is seldom unusual to it. In a deployment the observation says more: its score is the
distance of its condition [C], each value over its standard deviation, to the nearest of up to `MOST_CONDITIONS` that
were trained on. (A diffusion model of conditions tells about as much and has to be trained; the policy's own denoising
error hardly notices a block that has jumped.)

Thresholds are quantiles of either score in held-out demonstrations. One observation above them means little, as one of
a hundred demonstrated ones is (with a quantile of 0.99), and many that are a little unusual mean much: a policy that is
stuck. So an episode is watched by a cumulative sum (Page 1954, "Continuous inspection schemes") of levels

    level = (r − k) / h,      S ← max(0, S + level),      an alarm where S > 1

of the observation's ratio r at each chunk. k is halfway from the mean ratio of held-out demonstrations to half as much
again, h what the sum of all but a few held-out episodes stays below.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from action_diffusion.datasets.batches.loader import Batch, BatchSource
from action_diffusion.datasets.batches.windows import Windows
from action_diffusion.errors import InputError
from action_diffusion.policy.diffusion.process import Process
from action_diffusion.policy.diffusion.solver import Step
from action_diffusion.policy.extensions.extension import Extension, Fitted
from action_diffusion.policy.extensions.watch import LEVEL
from action_diffusion.policy.policy import DiffusionPolicy
from action_diffusion.policy.sample import Encoded, Prefix

MOST_CONDITIONS, MOST_WINDOWS = 4096, 8192
"""To compare with, and to calibrate on."""
LEAST_SCALE = 1e-2
"""Of the standard deviation of a condition's value, so that one that hardly ever changed does not decide alone."""
THRESHOLDS = ("chunk", "observation", "usual", "sum")
HALFWAY = 1.25
"""From a mean to half as much again."""
BATCH = 128


class Guard(Extension):
    """Notes of each chunk, float32 [B]: guard.observation, over its threshold, and guard.level, which is what a `Watch`
    sums up: below 0 where the observation is usual. With the option `chunk` also guard.chunk, over its threshold.

    It leaves the chunks as they are. notes_chunks: the option, which takes an evaluation of the denoiser.
    """

    def __init__(self, policy: DiffusionPolicy, fitted: Fitted) -> None:
        super().__init__(policy, fitted)
        _check(policy, fitted)
        on = {name: torch.from_numpy(np.array(value)).to(policy.device) for name, value in fitted.arrays.items()}
        self._scale, levels = on["scale"], on["grid"].view(-1, 3, 1, 1, 1)
        self._signal, self._noise = levels[:, 1], levels[:, 2] * on["noise"].unsqueeze(1)  # [L, 1, 1 or H, 1 or A]
        self._conditions = on["conditions"] / self._scale
        self._squares = self._conditions.square().sum(dim=1)
        self._grid = [Step(index, *level) for index, level in enumerate(fitted.arrays["grid"].tolist())]
        times = [[step.time, 0.0] if policy.sampler.two_times else step.time for step in self._grid]
        self._times = torch.tensor(times, device=policy.device)
        self.notes_chunks = bool(fitted.options.get("chunk", False))
        self.thresholds = dict(zip(THRESHOLDS, fitted.arrays["thresholds"].tolist(), strict=True))

    @classmethod
    @torch.no_grad()
    def fit(
        cls, policy: DiffusionPolicy, train: BatchSource, held_out: BatchSource, options: Mapping[str, Any]
    ) -> Fitted:
        """See `Extension`. options: chunk, sigmas, quantile, episodes, seed."""
        random = np.random.default_rng(options["seed"])
        known = random.choice(len(train), min(MOST_CONDITIONS, len(train)), replace=False)
        conditions = torch.cat([policy.see(batch.obs).condition for batch in _batches(train, np.sort(known))])
        noise = torch.randn(
            len(options["sigmas"]),
            *policy.spec.noise_shape,
            generator=torch.Generator().manual_seed(options["seed"]),
        )
        arrays = {
            "conditions": conditions.float().cpu().numpy(),
            "scale": conditions.float().std(dim=0, correction=0).clamp_min(LEAST_SCALE).cpu().numpy(),
            "noise": noise.numpy(),
            "grid": grid(policy.process, options["sigmas"]),
            "thresholds": np.ones(len(THRESHOLDS), np.float32),
        }
        episodes = _episodes(held_out.windows, random)
        observation, chunk = cls(policy, Fitted({}, arrays)).scores(held_out, np.concatenate(episodes))
        thresholds = [reached(chunk, options["quantile"]), reached(observation, options["quantile"])]
        ratios = observation / thresholds[1]
        ends = np.cumsum([len(episode) for episode in episodes])[:-1]
        walks = [ratio[:: policy.spec.n_action_steps] for ratio in np.split(ratios, ends)]
        usual = HALFWAY * float(np.mean(np.concatenate(walks)))
        sums = np.array([_largest_sum(walk - usual) for walk in walks])
        thresholds += [usual, max(usual, reached(sums, options["episodes"]))]
        if not np.isfinite(thresholds).all() or min(thresholds) <= 0:
            raise InputError(f"guard: thresholds of {thresholds} come of these demonstrations, expected above 0")
        arrays["thresholds"] = np.array(thresholds, np.float32)
        found = {f"{name}_threshold": round(value, 6) for name, value in zip(THRESHOLDS, thresholds, strict=True)}
        return Fitted({**options, **found, "windows": len(ratios), "held_out_episodes": len(episodes)}, arrays)

    @torch.no_grad()
    def scores(self, source: BatchSource, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Of demonstrated windows [W]: the observations' scores, and those of their chunks, [W] each."""
        condition, chunk = self._of_windows(source, indices)
        parts = [self.observation_score(part) for part in condition.split(BATCH)]
        return torch.cat(parts).cpu().numpy(), chunk.cpu().numpy()

    def _of_windows(self, source: BatchSource, indices: np.ndarray) -> tuple[Tensor, Tensor]:
        """Conditions [W, C], and the scores of demonstrated chunks [W]."""
        condition, chunk = [], []
        for batch in _batches(source, indices):
            seen = self.policy.see(batch.obs)
            condition.append(seen.condition)
            chunk.append(self.chunk_score(seen.condition, self.policy.normalize_action(batch.action, seen.obs)))
        return torch.cat(condition), torch.cat(chunk)

    @torch.no_grad()
    def ranked(self, source: BatchSource) -> list[Unusual]:
        """Episodes of demonstrations, the most unusual first: each beside the others of `source`, not those of the
        training, which it may be one of. Raises `InputError` for a single episode."""
        windows, random = source.windows, np.random.default_rng(0)
        first, owner = np.unique(windows.first, return_inverse=True)
        if len(first) < 2:
            raise InputError("one episode is not unusual beside others: there are none")
        condition, chunk = self._of_windows(source, np.arange(len(windows)))
        known = random.choice(len(windows), min(MOST_CONDITIONS, len(windows)), replace=False)
        x, of = condition / self._scale, torch.from_numpy(owner).to(condition.device)
        near = [
            _nearest(part, x[known], x[known].square().sum(dim=1), own[:, None] == of[known])
            for part, own in zip(x.split(BATCH), of.split(BATCH), strict=True)
        ]
        observation = torch.cat(near) / self.thresholds["observation"]
        level = self.level(torch.maximum(observation, chunk / self.thresholds["chunk"]))
        found = []
        for episode, levels in enumerate(np.split(level.cpu().numpy(), np.flatnonzero(np.diff(owner)) + 1)):
            begin = int(np.flatnonzero(owner == episode)[0])
            row = int(windows.now(np.array([begin + levels.argmax()]))[0])
            found.append(Unusual(episode, _largest_sum(levels[:: self.policy.spec.n_action_steps]), row))
        return sorted(found, key=lambda one: -one.level)

    def observation_score(self, condition: Tensor) -> Tensor:
        """[B, C] → [B]: to the nearest condition that was trained on, in standard deviations."""
        return _nearest(condition / self._scale, self._conditions, self._squares)

    def chunk_score(self, condition: Tensor, normalized: Tensor) -> Tensor:
        """Of chunks [B, H, A], normalised, for conditions [B, C] → [B]: the denoising error, see above."""
        policy = self.policy
        film = policy.denoiser.prepare(condition, self._times)
        films = film.steps.unsqueeze(1) + film.condition  # [L, B, F]
        noisy = self._signal * normalized + self._noise  # [L, B, H, A]
        rows = noisy.flatten(0, 1)
        if policy.max_delay:
            rows = Prefix.none(rows).mark(rows)
        output: Tensor = policy.denoiser(rows, films.flatten(0, 1)).view_as(noisy)
        errors = [
            (policy.process.x0_from_output(said, x, step) - normalized).square().mean(dim=(1, 2)) / step.sigma**2
            for said, x, step in zip(output, noisy, self._grid, strict=True)
        ]
        return torch.stack(errors).mean(dim=0).sqrt()

    @torch.no_grad()
    def finish(self, seen: Encoded, normalized: Tensor) -> tuple[Tensor, Mapping[str, Tensor]]:
        observation = self.observation_score(seen.condition) / self.thresholds["observation"]
        notes = {"guard.observation": observation, LEVEL: self.level(observation)}
        if self.notes_chunks:
            notes["guard.chunk"] = self.chunk_score(seen.condition, normalized) / self.thresholds["chunk"]
        return normalized, notes

    def level(self, ratio: Tensor) -> Tensor:
        """Of ratios [B], what a `Watch` sums up."""
        result: Tensor = (ratio - self.thresholds["usual"]) / self.thresholds["sum"]
        return result


class Unusual(NamedTuple):
    """An episode of a buffer: how far the sum of its levels gets, and the row at which its level is the highest."""

    episode: int
    level: float
    row: int


def _nearest(x: Tensor, known: Tensor, squares: Tensor, hidden: Tensor | None = None) -> Tensor:
    """Of each x [B, C] the distance to the nearest of `known` [M, C], whose squares [M] are given, that is not
    `hidden` [B, M]."""
    found = torch.addmm(squares, x, known.T, alpha=-2.0) + x.square().sum(dim=1, keepdim=True)
    if hidden is not None:
        found = found.masked_fill(hidden, math.inf)
    return found.amin(dim=1).clamp_min(0.0).sqrt()


def _largest_sum(steps: np.ndarray) -> float:
    """What S ← max(0, S + step) reaches over `steps` [n]."""
    total = np.concatenate([[0.0], np.cumsum(steps)])
    return float((total - np.minimum.accumulate(total)).max())


def reached(scores: np.ndarray, quantile: float) -> float:
    """What a new score of the kind exceeds with a probability of 1 − quantile at most: the ⌈(n + 1) quantile⌉-th of n
    in order (split conformal prediction), or the largest where they are too few to say."""
    rank = min(math.ceil((len(scores) + 1) * quantile), len(scores))
    return float(np.sort(scores)[max(rank, 1) - 1])


def grid(process: Process, sigmas: Sequence[float]) -> np.ndarray:
    """The noise levels of a process nearest to `sigmas` [L], of those that it trains on: time, a, b, float32 [L, 3].

    Raises `InputError` for a process that adds no noise.
    """
    times = process.draw_times(4096, generator=torch.Generator().manual_seed(0), device=torch.device("cpu")).unique()
    one = torch.ones(len(times), 1, 1)
    a, b = process.add_noise(one, 0 * one, times).flatten(), process.add_noise(0 * one, one, times).flatten()
    if not torch.allclose(process.add_noise(2 * one, one, times).flatten(), 2 * a + b, atol=1e-4):
        raise InputError(f"guard: a {process.family} process adds no noise to chunks, and that is what scores them")
    levels = torch.stack([times, a, b], dim=1)[(a > 0) & (b > 0)]
    ratio = (levels[:, 2] / levels[:, 1]).log()
    return torch.stack([levels[(ratio - math.log(sigma)).abs().argmin()] for sigma in sigmas]).float().numpy()


def _batches(source: BatchSource, indices: np.ndarray) -> Iterator[Batch]:
    for begin in range(0, len(indices), BATCH):
        yield source.gather(indices[begin : begin + BATCH])


def _episodes(windows: Windows, random: np.random.Generator) -> list[np.ndarray]:
    """Windows of whole episodes, one array each, in random order: all, or those of the first `MOST_WINDOWS`."""
    firsts, begins = np.unique(windows.first, return_index=True)
    every = np.split(np.arange(len(windows)), np.sort(begins)[1:])
    order = random.permutation(len(firsts))
    before = np.cumsum([0, *(len(every[index]) for index in order[:-1])])
    return [every[index] for index, count in zip(order, before, strict=True) if count < MOST_WINDOWS]


def _check(policy: DiffusionPolicy, fitted: Fitted) -> None:
    """`InputError` for arrays that are not what `fit` stores."""
    count, columns = len(fitted.arrays.get("grid", ())), np.shape(fitted.arrays.get("scale", 0))
    chunk = (count, *policy.spec.noise_shape)
    expected = {"scale": columns[:1] or (1,), "noise": chunk, "grid": (count, 3), "thresholds": (len(THRESHOLDS),)}
    expected["conditions"] = (len(fitted.arrays.get("conditions", ())), *columns)
    for name, shape in expected.items():
        found = fitted.arrays.get(name)
        if found is None or found.shape != shape or found.dtype != np.float32 or not found.size:
            raise InputError(f"extension guard: no {name!r}, float32 {list(shape)}, in what was fitted: fit it again")
    for name in ("scale", "thresholds"):
        if not (fitted.arrays[name] > 0).all():
            raise InputError(f"extension guard: {name!r} must be above 0")
