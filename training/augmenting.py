"""More demonstrations of the demonstrations: ways into and out of their states, imagined, put together and filtered.

                      backward model        forward model
    demonstrated      b ─ ─ ─ ─ ─ ─ ─ ▶ s   s ─ ─ ─ ─ ─ ─ ─ ▶ e     s: an anchor, where one ends or begins
    a new episode     s₋ₖ … s₋₂ s₋₁       s       s₁ s₂ … sₘ        states, by two diffusion models, told of b and e
                      a = g(s, s') between any two of them          actions, by the inverse dynamics
    kept where        it begins near b and ends near e; |f(s, a) - s'| ≤ tolerance · a typical step; and each state
                      is about as near to a demonstrated one as those of different episodes are to each other

b is where an episode begins that comes near s, and e is where one ends, often another one; what is put together goes
from b to e. Only such pairs are taken as no demonstration has (`Joints`): what goes from where one begins to where the
same one ends is there already. The models are told of b and e, and not only of s, because else they prefer the middle
of where episodes end, and the ends of new ones would be less diverse than the demonstrated ones. ("BiTrajDiff:
Bidirectional Trajectory Generation with Diffusion Models for Offline Reinforcement Learning", 2025, has the two models
and the stitching; its rewards and its filter by them are left out, and what the models are told is decided here.)
g and f are learnt; whoever has a simulator gives its step as `dynamics`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from scipy.spatial import cKDTree
from torch import Tensor, nn

from action_diffusion.datasets.batches.sources import open_data
from action_diffusion.datasets.storage.checks import check_finite
from action_diffusion.datasets.storage.provenance import PROVENANCE, with_provenance
from action_diffusion.datasets.storage.replay_buffer import ASSUMED_RATE, ReplayBuffer
from action_diffusion.datasets.storage.rotations import declared_rotations
from action_diffusion.errors import InputError
from action_diffusion.options.data import Augment
from action_diffusion.policy import kernels
from action_diffusion.policy.build import build_policy, fit_normalizer
from action_diffusion.policy.policy import DiffusionPolicy
from action_diffusion.policy.spec import ActionSpec, ObservationSpec, PolicySpec
from action_diffusion.progress import progress

Dynamics = Callable[[np.ndarray, np.ndarray], np.ndarray]
"""States [n, D] and actions [n, A] → the states [n, D] after them."""

GENERATED = "generated"
"""The column that says which rows were: bool [N]. It is a flag, which no policy observes."""
NEAR, FARTHER = 0.99, 2.0
"""Quantile of the distances from a demonstrated state to the nearest one of another episode; and how many times as far
an imagined one may be."""
SLACK = 0.05
"""Of their range, by which actions may be beyond the demonstrated ones."""
KEPT = (PROVENANCE, "control_rate", "fps", "units", "task", "source")
"""Attributes of a buffer that hold for new episodes as well."""
_BATCH, _LR, _TRIES, _AT_ONCE, _LOOKED_AT = 128, 1e-3, 20, 256, 200
_DRAWS = 100
"""How many times `_AT_ONCE` joints are drawn, until so many are new."""


class Episodes(NamedTuple):
    """states [N, D] and actions [N, A] of demonstrations, ends [E] of their episodes."""

    states: np.ndarray
    actions: np.ndarray
    ends: np.ndarray

    @property
    def starts(self) -> np.ndarray:
        return np.concatenate([[0], self.ends[:-1]])

    @property
    def last(self) -> np.ndarray:
        """Of each row, the last one of its episode: [N]."""
        return np.repeat(self.ends - 1, self.ends - self.starts)

    @property
    def first(self) -> np.ndarray:
        return np.repeat(self.starts, self.ends - self.starts)

    @property
    def followed(self) -> np.ndarray:
        """Rows that have one after them in their episode."""
        return np.flatnonzero(np.arange(len(self.states)) < self.last)


def augment(options: Augment, dynamics: Dynamics | None = None) -> dict[str, Any]:
    """Write the buffer `out`: the episodes of `in`, and new ones behind them. Returns numbers to report.

    Raises `InputError` for columns that are not there or do not fit, an output that exists, episodes of a single row,
    and where not one new episode passes the filter.
    """
    output = Path(options.out).expanduser()
    if output.exists():
        raise InputError(f"{output} exists: choose another path, or remove it")
    buffer = open_data(options.in_)
    given = _episodes(buffer, options)
    torch.manual_seed(options.seed)
    random = np.random.default_rng(options.seed)
    made, tried = generated(given, options, random, dynamics)
    keys = [options.state, options.action, *([options.goal] if options.goal else [])]
    columns = {key: [np.asarray(buffer[key][:])] for key in keys}
    before = np.asarray(buffer[GENERATED][:], bool) if GENERATED in buffer else np.zeros(len(given.states), bool)
    columns[GENERATED] = [before]
    for states, actions in made:
        columns[options.state].append(states[:-1])
        columns[options.action].append(actions)
        columns[GENERATED].append(np.ones(len(actions), bool))
        if options.goal:
            columns[options.goal].append(np.repeat(states[-1:], len(actions), axis=0))
    ends = np.concatenate([given.ends, given.ends[-1] + np.cumsum([len(actions) for _, actions in made])])
    what = f"augment episodes={options.episodes} horizon={options.horizon} seed={options.seed}"
    arrays = {key: np.concatenate(parts) for key, parts in columns.items()}
    attrs = {name: value for name, value in with_provenance(buffer, what).items() if name in KEPT}
    ReplayBuffer.from_arrays(arrays, ends, attrs).save(output)
    left_out = [key for key in buffer.keys if key not in arrays]
    report = {
        "output": str(output),
        "episodes": len(ends),
        "generated": len(made),
        "tried": tried,
        "steps": int(ends[-1]),
    }
    return report | ({"left_out": ", ".join(left_out)} if left_out else {})


def _episodes(buffer: ReplayBuffer, options: Augment) -> Episodes:
    named = {"state": options.state, "action": options.action} | ({"goal": options.goal} if options.goal else {})
    found = {}
    for what, key in named.items():
        values = np.asarray(buffer[key][:])  # which says what there is
        if values.ndim != 2 or values.dtype.kind not in "fiu":
            raise InputError(f"{buffer.name}: {what}={key} has shape {list(values.shape)}, expected numbers [N, D]")
        check_finite(values, key, buffer.name)
        found[what] = values.astype(np.float32)
    turns = declared_rotations(buffer, {})
    for key in named.values():
        if turns.get(key):
            raise InputError(f"{buffer.name}: {key} holds rotations, between which nothing can be imagined here")
    goal = found.get("goal")
    if goal is not None and goal.shape != found["state"].shape:
        raise InputError(
            f"{buffer.name}: goal={options.goal} has {goal.shape[1]} values, expected the {found['state'].shape[1]} of "
            f"{options.state}: a new episode's goal is the state that it ends in"
        )
    episodes = Episodes(found["state"], found["action"], np.asarray(buffer.episode_ends))
    if len(episodes.ends) < 2 or not len(episodes.followed):
        raise InputError(f"{buffer.name}: nothing to put together: at least two episodes of two rows are needed")
    return episodes


def generated(
    given: Episodes, options: Augment, random: np.random.Generator, dynamics: Dynamics | None = None
) -> tuple[list[tuple[np.ndarray, np.ndarray]], int]:
    """New episodes, states [T + 1, D] and actions [T, A] each, as many as `options` wants or `_TRIES` times as many
    tries have given; and the number of tries. Raises `InputError` where there is none."""
    near = apart(given)
    joints = Joints(given, options.anchors, near)
    joints.draw(1, random)  # before anything is learnt
    models = [trajectories(given, options, backward) for backward in (False, True)]
    act, learnt = inverse_and_forward(given, options)
    accept = Filter(given, dynamics or learnt, options.tolerance, near)
    generator = torch.Generator().manual_seed(options.seed)
    kept: list[tuple[np.ndarray, np.ndarray]] = []
    tried = 0
    with progress("generating", options.episodes) as advance:
        while len(kept) < options.episodes and tried < _TRIES * options.episodes:
            anchors, begins, ends = joints.draw(_AT_ONCE, random)
            after = imagined(models[0], anchors, ends, generator)
            before = imagined(models[1], anchors, begins, generator)
            for anchor, ahead, behind, begin, end in zip(anchors, after, before, begins, ends, strict=True):
                if len(kept) == options.episodes:
                    break
                tried += 1
                states = np.concatenate([behind[::-1], anchor[None], ahead])
                if not len(behind) or not len(ahead) or not accept.near(states[[0, -1]], np.stack([begin, end])):
                    continue
                actions = act(states[:-1], states[1:])
                if accept(states, actions):
                    kept.append((states, actions))
                    advance(1)
    if not kept:
        raise InputError(
            f"none of {tried} imagined episodes passes the filter: give more steps=, or a larger tolerance="
        )
    return kept, tried


class Joints:
    """Where two episodes meet so that one's way in and the other's way out are a way that none has shown.

    They meet at an anchor where both come as near to it as states of different episodes are to each other. New is a
    pair of a beginning and an end if each demonstration is farther from it, in one of the two, than demonstrations are
    from each other (quantile `NEAR`). near: of states, see `apart`.
    """

    def __init__(self, given: Episodes, anchors: str, near: float) -> None:
        self._given, self._spread = given, spread(given.states)
        ends = np.union1d(given.starts, given.ends - 1)
        self._anchors = ends if anchors == "ends" else np.arange(len(given.states))
        self._tree = cKDTree(given.states / self._spread)
        self._anywhere, self._reach = anchors != "ends", near
        self._pairs = cKDTree(self._pair(given.starts, given.ends - 1))
        nearest = self._pairs.query(self._pairs.data, k=2, p=np.inf)[0][:, 1]
        self._new = FARTHER * float(np.quantile(nearest, NEAR))

    def _pair(self, first: np.ndarray, last: np.ndarray) -> np.ndarray:
        """Of rows [n] and [n], their states side by side in units of `spread`: [n, 2 D]."""
        return np.concatenate([self._given.states[rows] / self._spread for rows in (first, last)], axis=1)

    def draw(self, n: int, random: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Up to n anchors, where episodes that come there begin, and where others end: [n, D] each.

        Raises `InputError` where none is found.
        """
        given, found = self._given, []
        for _ in range(_DRAWS):
            at = random.choice(self._anchors, _AT_ONCE)
            near = self._tree.query_ball_point(given.states[at] / self._spread, self._reach)
            into, out_of = (np.array([random.choice(rows) for rows in near]) for _ in range(2))
            first, last = given.first[into], given.last[out_of]
            new = self._pairs.query(self._pair(first, last), p=np.inf)[0] > self._new
            ways = new & (into > first) & (out_of < last)
            found.append(np.stack([at, first, last], axis=1)[ways])
            if sum(map(len, found)) >= n:
                break
        rows = np.concatenate(found)[:n]
        if not len(rows):
            ends = "end where another one begins; if they cross on their way, use anchors=all"
            how = "cross" if self._anywhere else ends
            raise InputError(f"no two demonstrations meet such that they make a new one: they have to {how}")
        return given.states[rows[:, 0]], given.states[rows[:, 1]], given.states[rows[:, 2]]


def windows(given: Episodes, horizon: int, backward: bool) -> np.ndarray:
    """Steps from each row to the one after it, and so on; or to the one before it, and so on: [N, horizon, D + 1].

    The last value says whether a step leads to a row of the episode, 1, or the episode is over, 0, and it stays there.
    Steps, and not places: what is off in one of them does not make the way jagged.
    """
    steps = np.arange(len(given.states))[:, None] + (-1 if backward else 1) * np.arange(1, horizon + 1)
    rows = np.maximum(steps, given.first[:, None]) if backward else np.minimum(steps, given.last[:, None])
    ways = np.concatenate([given.states[:, None], given.states[rows]], axis=1)
    return np.concatenate([np.diff(ways, axis=1), (rows == steps)[..., None]], axis=2).astype(np.float32)


def trajectories(given: Episodes, options: Augment, backward: bool) -> DiffusionPolicy:
    """A diffusion model of `windows`, given the state that they begin at, and where their episode ends (or begins)."""
    chunks = windows(given, options.horizon, backward)
    size = given.states.shape[1]
    spec = PolicySpec(
        observations={"state": ObservationSpec(shape=(size,)), "target": ObservationSpec(shape=(size,))},
        action=ActionSpec(shape=(size + 1,)),
        n_obs_steps=1,
        horizon=options.horizon,
        n_action_steps=options.horizon,
        control_rate=ASSUMED_RATE,
    )
    config = {
        "encoder": {"name": "observation"},
        "denoiser": {"name": "unet1d", "channels": [32, 64], "n_groups": 4, "kernel_size": 5},
        "process": {"name": "diffusion", "prediction": "sample"},
        "sampler": {"scheduler": "ddim", "num_inference_steps": 10},
        "objective": {"name": "denoising"},
        "normalizer": {"default": "minmax"},
    }
    obs = {"state": given.states, "target": given.states[given.first if backward else given.last]}
    values = {**obs, "action": chunks.reshape(-1, size + 1)}
    statistics = fit_normalizer(config, spec, values.__getitem__, lambda _: (given.states, chunks))
    model = build_policy(config, replace(spec, normalizer=statistics))
    kernels.for_training(model.train())
    seen, targets = _observed(**obs), torch.from_numpy(chunks)
    _descend(
        model,
        lambda rows: model({key: value[rows] for key, value in seen.items()}, targets[rows]),
        len(targets),
        options.steps,
        "learning what came before" if backward else "learning what comes after",
    )
    return model.eval().requires_grad_(False)


def _observed(**values: np.ndarray) -> dict[str, Tensor]:
    return {key: torch.from_numpy(value).unsqueeze(1) for key, value in values.items()}


def imagined(
    model: DiffusionPolicy, states: np.ndarray, targets: np.ndarray, generator: torch.Generator
) -> list[np.ndarray]:
    """From each of the states [n, D] on, the states up to where the episode is over, near its target: [k, D] each."""
    with torch.inference_mode():
        chunks = model.sample(_observed(state=states, target=targets), noise_generator=generator).action.numpy()
    lasts = np.logical_and.accumulate(chunks[..., -1] > 0.5, axis=1).sum(axis=1)
    ways = states[:, None] + np.cumsum(chunks[..., :-1], axis=1)
    return [way[:length] for way, length in zip(ways, lasts, strict=True)]


def inverse_and_forward(given: Episodes, options: Augment) -> tuple[Dynamics, Dynamics]:
    """g: states and those after them → actions [n, A], within `SLACK` of what was demonstrated; f: see `Dynamics`.

    Both tell what a step changes, in units of what demonstrated ones do.
    """
    rows = given.followed
    now, change, action = given.states[rows], given.states[rows + 1] - given.states[rows], given.actions[rows]
    inverse = _Regression((now, change), action, options.steps, "learning what acts between two states")
    forward = _Regression((now, action), change, options.steps, "learning what an action changes")
    low, high = given.actions.min(axis=0), given.actions.max(axis=0)
    slack = SLACK * (high - low)

    def act(states: np.ndarray, after: np.ndarray) -> np.ndarray:
        found: np.ndarray = np.clip(inverse(states, after - states), low - slack, high + slack)
        return found

    return act, lambda states, actions: states + forward(states, actions)


def spread(values: np.ndarray) -> np.ndarray:
    """The standard deviation [D] of values [N, D]; 1 where nothing but rounding differs."""
    deviation = values.std(axis=0)
    result: np.ndarray = np.where(deviation > 1e-6 * np.abs(values).max(axis=0), deviation, 1.0).astype(np.float32)
    return result


class _Regression:
    """y [n, A] of x [n, D] and z [n, C], standardised, by a network of two layers beside a linear map."""

    def __init__(self, given: tuple[np.ndarray, np.ndarray], target: np.ndarray, steps: int, words: str) -> None:
        x = np.concatenate(given, axis=1)
        self._x, self._y = ((part.mean(axis=0), spread(part)) for part in (x, target))
        inputs, targets = (
            torch.from_numpy((part - mean) / scale).float() for part, (mean, scale) in ((x, self._x), (target, self._y))
        )
        hidden = nn.Sequential(
            nn.Linear(x.shape[1], 128), nn.SiLU(), nn.Linear(128, 128), nn.SiLU(), nn.Linear(128, target.shape[1])
        )
        self._net = nn.ModuleList([hidden, nn.Linear(x.shape[1], target.shape[1])])
        _descend(
            self._net,
            lambda rows: nn.functional.smooth_l1_loss(self._of(inputs[rows]), targets[rows], beta=0.1),
            len(x),
            2 * steps,
            words,
        )

    def _of(self, x: Tensor) -> Tensor:
        result: Tensor = self._net[0](x) + self._net[1](x)
        return result

    def __call__(self, *given: np.ndarray) -> np.ndarray:
        x = (np.concatenate(given, axis=1) - self._x[0]) / self._x[1]
        with torch.no_grad():
            y = self._of(torch.from_numpy(x).float()).numpy()
        result: np.ndarray = (y * self._y[1] + self._y[0]).astype(np.float32)
        return result


def apart(given: Episodes) -> float:
    """How far a state is from the nearest one of another episode, in units of `spread`: the quantile `NEAR`."""
    scaled, found = given.states / spread(given.states), []
    every = -(-len(given.ends) // _LOOKED_AT)
    for start, end in zip(given.starts[::every], given.ends[::every], strict=True):
        others = np.delete(scaled, np.s_[start:end], axis=0)
        found.append(cKDTree(others).query(scaled[start:end])[0])
    return float(np.quantile(np.concatenate(found), NEAR))


class Filter:
    """Whether an episode could have been: it obeys the dynamics, and is where demonstrations are.

    tolerance: how far a step may end beside where the dynamics say, in root mean squares of a demonstrated step.
    near: of states, see `apart`.
    """

    def __init__(self, given: Episodes, dynamics: Dynamics, tolerance: float, near: float) -> None:
        self._dynamics = dynamics
        self._spread = spread(given.states)
        rows = given.followed
        steps = (given.states[rows + 1] - given.states[rows]) / self._spread
        self.most = tolerance * float(np.sqrt((steps**2).sum(axis=1).mean()))
        self._tree = cKDTree(given.states / self._spread)
        self.reach = FARTHER * near

    def near(self, states: np.ndarray, targets: np.ndarray) -> bool:
        """Whether states are as near to targets, [n, D] both, as they have to be to demonstrated ones."""
        return bool(np.linalg.norm((states - targets) / self._spread, axis=1).max() <= self.reach)

    def __call__(self, states: np.ndarray, actions: np.ndarray) -> bool:
        """states [T + 1, D], actions [T, A]."""
        off = (self._dynamics(states[:-1], actions) - states[1:]) / self._spread
        distance = self._tree.query(states / self._spread)[0]
        return bool(np.linalg.norm(off, axis=1).max() <= self.most and distance.max() <= self.reach)


def _descend(module: nn.Module, loss: Callable[[Tensor], Tensor], n: int, steps: int, words: str) -> None:
    """`steps` of AdamW on batches of n examples, with a rate that falls to nothing. loss: of the rows given."""
    optimizer = torch.optim.AdamW(module.parameters(), lr=_LR, weight_decay=1e-6)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    with progress(words, steps) as advance:
        for _ in range(steps):
            optimizer.zero_grad()
            loss(torch.randint(n, (min(_BATCH, n),))).backward()
            nn.utils.clip_grad_norm_(module.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            advance(1)
