"""Reuse of the denoiser's last estimate while a budget of predicted deviation lasts, for each chunk by itself.

    step         0    1    2    3    4    5   …          ● the network is asked
    a row        ●────●    ─    ─    ●    ─              ─ its last estimate is gone on with
                 change ──▶ how far this lasts

After Muninn (Puthumanaillam et al. 2026, arXiv 2605.09999), in terms of x0 so that it holds for every scheduler. f_k is
the network's estimate of the clean chunk at step k, d(u, v) the largest difference of two chunks over the executed
steps and the action's dimensions, in the data's units. Of demonstrations are known (`ReuseCost`)

    typical[j, k]     mean d(f_j, f_k): how far the estimate moves on
    ratio[j, k]       quantile of (d(f_j, f_k) / typical[j, k]) / (d(f_j−1, f_j) / typical[j−1, j])
    sensitivity[k]    how far the executed steps move, where f_k is replaced by f_k−1, for each unit of d(f_k−1, f_k)

The probe is the last change: a row that was asked at i and then at j has moved by change = d(f_i, f_j) / typical[i, j]
times what is usual. To go on with f_j up to step k is predicted to move the final chunk by

    change · Σ_{m=j+1..k} sensitivity[m] · ratio[j, m] · typical[j, m]

and that is done while it is below the budget; then the network is asked, and the budget is there anew: errors of many
short reuses and of a few long ones are then alike, which takes the fewest evaluations. (The probe is that of the
network's output, since a change of its input hardly tells of it, and one of its first block's output less.)

The budget is tolerance · scale. A split-conformal scale: with the budgets' ladder b_1 < b_2 < …, of each held-out chunk
the first b_l is known with which it ends further than the tolerance from what no reuse gives, noise being equal. The
budget is the largest for which (number of chunks beyond + 1) / (chunks + 1) ≤ alpha, so a chunk like them is beyond the
tolerance with a probability of at most alpha.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from action_diffusion.datasets.batches.loader import BatchSource
from action_diffusion.errors import InputError
from action_diffusion.policy.diffusion.process import Process
from action_diffusion.policy.diffusion.sampler import DenoiserCall, Hook, StepState
from action_diffusion.policy.diffusion.solver import Step
from action_diffusion.policy.extensions.extension import Extension, Fitted, check_sampler, sampler_words
from action_diffusion.policy.policy import DiffusionPolicy
from action_diffusion.policy.sample import Encoded
from action_diffusion.policy.spec import IN_FRAME

QUANTILE = 0.8
"""Of the deviation for a change: what is beyond it, the conformal scale makes up for."""
MOST_FITTED, MOST_CALIBRATED, EVALUATIONS, LEAST_FITTED = 512, 512, 25_000, 16
"""Windows of demonstrations; evaluations of the network that sensitivities may take, from so many windows at least."""
LADDER = np.array([0.0, *2.0 ** np.arange(-4.0, 4.01, 0.5)])
"""Budgets that are tried, over the tolerance. With the first nothing is reused."""
BATCH = 128
"""Rows at a time."""
LEAST = 1e-9
"""Of what is divided by."""


@dataclass(frozen=True)
class ReuseCost:
    """How far reuse moves the final chunk. typical, spent: [K, K], of steps; the latter is of the estimate of step j
    from step j + 1 up to k, where the change was the usual one."""

    typical: np.ndarray
    spent: np.ndarray

    @classmethod
    def of(cls, arrays: Mapping[str, np.ndarray], n_steps: int) -> ReuseCost:
        """Of the arrays of `Fitted`. Raises `InputError` for those that are not for so many steps."""
        shapes = {"typical": (n_steps, n_steps), "ratio": (n_steps, n_steps), "sensitivity": (n_steps,)}
        for name, shape in shapes.items():
            if name not in arrays or arrays[name].shape != shape or not (arrays[name] >= 0).all():
                raise InputError(f"extension cache: no {name!r} of shape {list(shape)}, none of it negative")
        typical = arrays["typical"].astype(np.float64)
        of_step = np.triu(arrays["sensitivity"] * arrays["ratio"] * typical, k=1)
        return cls(np.maximum(typical, LEAST), of_step.cumsum(axis=1))

    def ahead(self, step: int, last: np.ndarray, change: np.ndarray) -> np.ndarray:
        """What reuse of their estimates of `step` is predicted to move R rows by, through each step after it, [R, …].

        last: steps [R] of the estimates before; change [R]: d from these, in the data's units. At the first step there
        is none before, and the change is taken for usual.
        """
        unusual = change / self.typical[last, step] if step else np.ones(len(last))
        result: np.ndarray = unusual[:, None] * self.spent[step, step + 1 :]
        return result


class Reuse(Hook):
    """Asks the network for the rows whose budget is spent; the others go on with what it said last.

    budget: in the data's units, one for all rows or one each. Where a gradient is asked for, nothing is reused.
    """

    def __init__(self, policy: DiffusionPolicy, prediction: ReuseCost, budget: float | np.ndarray) -> None:
        self._process, self._prediction, self._budget = policy.process, prediction, budget
        self._measure = Distance(policy)

    def begin(self, x: Tensor, steps: Sequence[Step]) -> None:
        self.evaluations = np.zeros(len(x), np.int64)
        self._next, self._last = np.zeros((2, len(x)), np.int64)  # steps: to ask at again, and asked at
        self._budgets = np.broadcast_to(np.asarray(self._budget, np.float64), len(x))
        self._raw = self._estimate = x

    def wrap_denoiser(self, denoise: DenoiserCall) -> DenoiserCall:
        def call(x: Tensor, step: Step, rows: Tensor | None = None) -> Tensor:
            every = rows is not None or torch.is_grad_enabled()  # rows: another hook around this one picks them
            self._asked = np.arange(len(self._next)) if every else np.flatnonzero(self._next <= step.index)
            self.evaluations[self._asked] += 1
            if len(self._asked) == len(self._next):
                return denoise(x, step, rows)
            output = said(self._process, self._raw, x, step)
            if len(self._asked):
                picked = torch.from_numpy(repeated(self._asked, len(x))).to(x.device)
                output[picked] = denoise(x[picked], step, picked)
            return output

        return call

    def edit_x0(self, state: StepState) -> Tensor:
        if len(asked := self._asked):
            picked: Any = slice(None) if len(asked) == len(self._next) else torch.from_numpy(asked).to(state.x.device)
            raw, estimate = state.x0_raw.detach(), state.x0_hat.detach()
            change = self._measure(self._estimate[picked], estimate[picked]).double().cpu().numpy()
            self._raw, self._estimate = (
                new if len(asked) == len(self._next) else old.index_copy(0, picked, new[picked])
                for old, new in ((self._raw, raw), (self._estimate, estimate))
            )
            ahead = self._prediction.ahead(state.k, self._last[asked], change)
            lasts = (ahead < self._budgets[asked, None]).sum(axis=1)
            self._next[asked], self._last[asked] = state.k + 1 + lasts, state.k
        return state.x0_hat


def repeated(rows: np.ndarray, most: int) -> np.ndarray:
    """Rows [R], some twice, so that there are a power of two, at most all: kernels are laid out for each number."""
    return np.resize(rows, min(1 << (len(rows) - 1).bit_length(), most))


def said(process: Process, x0: Tensor, x: Tensor, step: Step) -> Tensor:
    """The output with which the network says x0 [R, H, A] at x: `x0_from_output` is affine in each number of it."""
    nothing = process.x0_from_output(torch.zeros_like(x), x, step)
    return (x0 - nothing) / (process.x0_from_output(torch.ones_like(x), x, step) - nothing)


class Distance:
    """d(u, v) of normalised chunks [R, H, A] each → [R]: of the executed steps, in the data's units, where a frame's
    axes may be turned from the data's."""

    def __init__(self, policy: DiffusionPolicy) -> None:
        self._executed = executed(policy)
        key = "action" if policy.action_frame is None else IN_FRAME
        ends = torch.stack([torch.zeros(1), torch.ones(1)]).to(policy.device)
        zero, one = policy.normalizer.unnormalize(key, ends)
        self._unit = (one - zero).abs()

    def __call__(self, u: Tensor, v: Tensor) -> Tensor:
        difference = (u - v)[:, self._executed].abs() * self._unit
        result: Tensor = difference.amax(dim=(1, 2))
        return result


def executed(policy: DiffusionPolicy) -> slice:
    """The steps of a chunk that are executed."""
    now = policy.spec.n_obs_steps - 1
    return slice(now, now + policy.spec.n_action_steps)


class Cache(Extension):
    """Notes of each chunk: cache.evaluations, how often the network was asked for it, int64 [B]."""

    def __init__(self, policy: DiffusionPolicy, fitted: Fitted) -> None:
        super().__init__(policy, fitted)
        check_sampler("cache", policy, fitted)
        self._prediction = ReuseCost.of(fitted.arrays, policy.sampler.num_inference_steps)
        budget = fitted.options.get("budget")
        if not isinstance(budget, int | float) or not 0 <= budget < math.inf:
            raise InputError(f"extension cache: budget={budget} must be a number, and not negative")
        self._budget = float(budget)
        self._running: dict[int, Reuse] = {}

    def hooks(self, seen: Encoded) -> Sequence[Hook]:
        hook = self._running[id(seen)] = Reuse(self.policy, self._prediction, self._budget)
        return (hook,)

    def finish(self, seen: Encoded, normalized: Tensor) -> tuple[Tensor, Mapping[str, Tensor]]:
        return normalized, {"cache.evaluations": torch.from_numpy(self._running.pop(id(seen)).evaluations)}

    @classmethod
    def fit(
        cls, policy: DiffusionPolicy, train: BatchSource, held_out: BatchSource, options: Mapping[str, Any]
    ) -> Fitted:
        """See `Extension`. options: tolerance, in the data's units; alpha; seed."""
        tolerance, alpha, seed = (options[name] for name in ("tolerance", "alpha", "seed"))
        if (len(held_out) + 1) * alpha < 1:
            raise InputError(
                f"cache: {len(held_out)} held-out windows are too few to calibrate alpha={alpha} on, which takes "
                f"{math.ceil(1 / alpha) - 1} at least: give more of them by data="
            )
        windows = drawn(train, MOST_FITTED, seed)
        estimates = recorded(policy, train, windows, seed)
        arrays = fitted_to(estimates, Distance(policy))
        n = max(LEAST_FITTED, EVALUATIONS // policy.sampler.num_inference_steps**2)
        arrays["sensitivity"] = sensitivities(policy, train, windows[:n], seed)
        arrays = {name: value.astype(np.float32) for name, value in arrays.items()}
        prediction = ReuseCost.of(arrays, policy.sampler.num_inference_steps)
        budgets = tolerance * LADDER
        windows = drawn(held_out, MOST_CALIBRATED, seed + 1)
        moved, asked = deviations(policy, held_out, windows, prediction, budgets, seed + 1)
        rung = conformal(moved, tolerance, alpha)
        found = {
            "budget": float(budgets[rung]),
            "evaluations": round(float(asked[:, rung].mean()), 3),
            "violations": round(float((moved[:, rung] > tolerance).mean()), 4),
            "windows": len(windows),
        }
        return Fitted({**options, "sampler": sampler_words(policy), **found}, arrays)


def conformal(moved: np.ndarray, tolerance: float, alpha: float) -> int:
    """The last of L rising budgets with which the next chunk ends beyond the tolerance with at most alpha.

    moved: deviations of N chunks [N, L], (N + 1) · alpha ≥ 1, of which the first are none. A chunk that is once beyond
    counts as beyond for all larger budgets, so each has one number, the first budget that is too large for it, and in
    that the next chunk's is as likely as theirs.
    """
    beyond = np.maximum.accumulate(moved > tolerance, axis=1).sum(axis=0)
    return int(np.flatnonzero(beyond + 1 <= alpha * (len(moved) + 1))[-1])


# -- what demonstrations tell


def drawn(source: BatchSource, most: int, seed: int) -> np.ndarray:
    """Windows of a source, in no order."""
    return np.random.default_rng(seed).permutation(len(source))[:most]


def _generators(windows: np.ndarray, seed: int, n_samples: int) -> list[torch.Generator]:
    """One a row: the rows of a window draw alike."""
    return [
        torch.Generator().manual_seed(seed * 1_000_003 + int(window)) for window in windows for _ in range(n_samples)
    ]


def _sampled(
    policy: DiffusionPolicy, source: BatchSource, windows: np.ndarray, seed: int, n_samples: int, hook: Hook
) -> Iterator[Tensor]:
    """Executed steps of n chunks of each window, of the same noise, in the data's units: [B, n, Ta, A] a batch."""
    size = max(1, BATCH // n_samples)
    for start in range(0, len(windows), size):
        some = windows[start : start + size]
        sample = policy.sample(
            source.gather(some).obs,
            n_samples=n_samples,
            noise_generator=_generators(some, seed, n_samples),
            generator=_generators(some, seed + 1, n_samples),
            hooks=[hook],
        )
        yield sample.action.reshape(len(some), n_samples, *sample.action.shape[-2:])[:, :, executed(policy)]


class _Record(Hook):
    """estimates: of all batches, [K][B, H, A] each."""

    def __init__(self) -> None:
        self.estimates: list[list[Tensor]] = []

    def begin(self, x: Tensor, steps: Sequence[Step]) -> None:
        self.estimates.append([])

    def edit_x0(self, state: StepState) -> Tensor:
        self.estimates[-1].append(state.x0_hat)
        return state.x0_hat


@torch.no_grad()
def recorded(policy: DiffusionPolicy, source: BatchSource, windows: np.ndarray, seed: int) -> Tensor:
    """The estimates of every step, [K, N, H, A]."""
    hook = _Record()
    for _ in _sampled(policy, source, windows, seed, 1, hook):
        pass
    return torch.cat([torch.stack(batch) for batch in hook.estimates], dim=1)


def fitted_to(estimates: Tensor, distance: Distance) -> dict[str, np.ndarray]:
    """typical and ratio [K, K], see above. estimates [K, N, H, A]."""
    moved = np.stack([[distance(u, v).double().cpu().numpy() for v in estimates] for u in estimates])  # [K, K, N]
    typical = moved.mean(axis=-1)
    relative = moved / np.maximum(typical, LEAST)[..., None]
    steps = np.arange(1, len(typical))
    changes = np.concatenate([np.ones_like(relative[:1, 0]), relative[steps - 1, steps]])  # [K, N]
    ratio = np.quantile(relative / np.maximum(changes, LEAST)[:, None], QUANTILE, axis=-1)
    return {"typical": typical, "ratio": ratio}


class _Late(Hook):
    """Of K samples of a window, the k-th goes on with the estimate before at step k; the first is as it is.

    distances: Σ d(f_k−1, f_k) of all windows so far, [K].
    """

    def __init__(self, distance: Distance, n_steps: int) -> None:
        self._distance, self.distances = distance, np.zeros(n_steps)

    def begin(self, x: Tensor, steps: Sequence[Step]) -> None:
        self._before = x

    def edit_x0(self, state: StepState) -> Tensor:
        late = slice(state.k, None, len(self.distances))
        before, self._before = self._before, state.x0_hat
        if state.k == 0:
            return state.x0_hat
        self.distances[state.k] += float(self._distance(before[late], state.x0_hat[late]).sum())
        result = state.x0_hat.clone()
        result[late] = before[late]
        return result


@torch.no_grad()
def sensitivities(policy: DiffusionPolicy, source: BatchSource, windows: np.ndarray, seed: int) -> np.ndarray:
    """How far the executed steps move for each unit of an error at step k, [K]; 0 for the first, which is no reuse."""
    n = policy.sampler.num_inference_steps
    hook = _Late(Distance(policy), n)
    moved = np.zeros(n)
    for chunks in _sampled(policy, source, windows, seed, n, hook):
        moved += (chunks - chunks[:, :1]).abs().amax(dim=(2, 3)).double().sum(dim=0).cpu().numpy()
    return moved / np.maximum(hook.distances, LEAST)


@torch.no_grad()
def deviations(
    policy: DiffusionPolicy,
    source: BatchSource,
    windows: np.ndarray,
    prediction: ReuseCost,
    budgets: np.ndarray,
    seed: int,
) -> tuple[np.ndarray, np.ndarray]:
    """How far chunks of N windows end from those of the first budget, and evaluations, with L budgets: [N, L] each."""
    moved, asked = [], []
    hook = _Ladder(policy, prediction, budgets)
    for chunks in _sampled(policy, source, windows, seed, len(budgets), hook):
        moved.append((chunks - chunks[:, :1]).abs().amax(dim=(2, 3)).double().cpu().numpy())
        asked.append(hook.evaluations.reshape(-1, len(budgets)))
    return np.concatenate(moved), np.concatenate(asked)


class _Ladder(Reuse):
    """Of the samples of a window, each has a budget of its own."""

    def __init__(self, policy: DiffusionPolicy, prediction: ReuseCost, budgets: np.ndarray) -> None:
        super().__init__(policy, prediction, budgets)
        self._each = budgets

    def begin(self, x: Tensor, steps: Sequence[Step]) -> None:
        self._budget = np.tile(self._each, len(x) // len(self._each))
        super().begin(x, steps)
