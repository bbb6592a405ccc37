"""Chunks that keep out of obstacles, inside a workspace and below a speed, projected while they are denoised.

    x ─▶ network ─▶ x̂0 ─unnormalise─▶ chunk in the data's units ─P─▶ ─normalise─▶ x̂0 ─▶ x of the next step
    after the last one: chunk ─P─▶ ─W─▶ what comes out

A limit that only cuts the finished chunk breaks what the chunk was about: it stops at the edge, or jumps over. Here the
network sees its estimate on the allowed side in every step, and completes a motion that goes round (SafeDiffuser,
Xiao et al. 2023, which keeps each denoising step in the safe set by a quadratic program; here that is a projection).

P, `Region.push`, treats the path as a whole: from where the arm is, over every action that is still to come, and the
lines between them. For each obstacle it moves what is inside along one direction u,

    p_i ← p_i + λ_i(u) u,   λ_i(u) = the longest way out, along u, of what adjoins p_i,   u = argmin Σ_i λ_i(u)²

one for all, so that a path that crosses passes on one side and is not torn in two. Obstacles are convex, so what moved
out along u is out; the line between two actions is looked at in `PARTS` places.

W, `Region.walk`, is the guarantee. Action after action it takes the place nearest to the wanted one that can be reached
within one control step, in a straight line that touches nothing: of the wanted one, of a fan of directions, and of
staying, which is always allowed. Both are differentiable where the chunk is.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from action_diffusion.datasets.batches.loader import BatchSource
from action_diffusion.errors import InputError, unknown
from action_diffusion.options.extensions import FITS, Fit
from action_diffusion.policy.diffusion.sampler import Hook, StepState
from action_diffusion.policy.extensions.extension import Extension, Fitted
from action_diffusion.policy.policy import DiffusionPolicy
from action_diffusion.policy.sample import Encoded
from action_diffusion.schema import check, hints

PARTS = 4
"""Places on the line to an action at which the way out of an obstacle is measured, its end included."""
DIRECTIONS = 64
SHORTER = (1.0, 0.5, 0.25)
"""Of the way to the wanted place: the steps that are tried in other directions."""
ROUNDING = 1e-5
"""Share of the largest demonstrated action by which obstacles are larger: normalising and back rounds."""
_ALL: Any = FITS["constraint"]
OPTIONS = {name: hint for name, hint in hints(_ALL).items() if name not in Fit.__annotations__}
"""Of `fit constraint`, beside those of every fit: name → type."""
OUTSIDE = 100.0
"""How much worse it is to leave the workspace than to move as far, where a way out of an obstacle is chosen."""


@dataclass(frozen=True)
class Disc:
    """What lies less than `radius` from `centre` [n]: a disc of the plane, or a ball."""

    centre: Tensor
    radius: float

    def grown(self, by: float) -> Disc:
        return replace(self, radius=self.radius + by)

    def way_out(self, places: Tensor, directions: Tensor) -> Tensor:
        """How far each of `places` […, n] is from the edge along each of `directions` [K, n], […, K]; 0 outside."""
        offset = places - self.centre
        along, square = offset @ directions.T, offset.square().sum(-1, keepdim=True)
        within = self.radius**2 - square
        out = (along.square() + within.clamp_min(0.0)).sqrt() - along
        return torch.where(within > 0, out, 0.0)

    def hit(self, first: Tensor, second: Tensor) -> Tensor:
        """Whether the line from `first` to `second`, […, n], passes through, bool […]."""
        way = second - first
        length = way.square().sum(-1, keepdim=True).clamp_min(torch.finfo(way.dtype).tiny)
        share = (((self.centre - first) * way).sum(-1, keepdim=True) / length).clamp(0.0, 1.0)
        return (first + share * way - self.centre).square().sum(-1) < self.radius**2


@dataclass(frozen=True)
class Box:
    """What lies between `low` and `high` [n]. Methods as of `Disc`."""

    low: Tensor
    high: Tensor

    def grown(self, by: float) -> Box:
        return Box(self.low - by, self.high + by)

    def way_out(self, places: Tensor, directions: Tensor) -> Tensor:
        within = ((places > self.low) & (places < self.high)).all(-1, keepdim=True)
        face = torch.where(directions > 0, self.high, self.low)
        out = (face - places.unsqueeze(-2)) / torch.where(directions == 0, torch.nan, directions)
        return torch.where(within, out.nan_to_num(torch.inf).amin(-1), 0.0)

    def hit(self, first: Tensor, second: Tensor) -> Tensor:
        way = second - first
        way = torch.where(way == 0, torch.finfo(way.dtype).tiny, way)
        ends = torch.stack([(self.low - first) / way, (self.high - first) / way])
        enters, leaves = ends.amin(0).amax(-1).clamp_min(0.0), ends.amax(0).amin(-1).clamp_max(1.0)
        return enters < leaves


Obstacle = Disc | Box


@dataclass(frozen=True)
class Region:
    """Where a place [n] may be: between low and high [n], outside of the obstacles. step: the longest way from one
    action to the next; further: how much longer the way from the arm to the first action may be; slack: how much
    further than to their edges what lies in obstacles is moved, so that rounding leaves it outside. The data's units.
    """

    obstacles: Sequence[Obstacle]
    low: Tensor
    high: Tensor
    step: float = float("inf")
    further: float = 0.0
    slack: float = 1e-4

    def free(self, places: Tensor) -> Tensor:
        """Whether each of `places` […, n] is allowed, bool […]."""
        inside = ((places >= self.low) & (places <= self.high)).all(-1)
        return inside & ~self.hit(places, places)

    def hit(self, first: Tensor, second: Tensor) -> Tensor:
        """Whether the line between them, […, n], passes through an obstacle, bool […]."""
        found = torch.zeros(second.shape[:-1], dtype=torch.bool, device=second.device)
        for obstacle in self.obstacles:
            found = found | obstacle.hit(first, second)
        return found

    def push(self, path: Tensor, start: Tensor) -> Tensor:
        """P: `path` [B, L, n], which begins at `start` [B, n], out of each obstacle in turn, in the workspace."""
        directions = _directions(path)
        shares = torch.arange(1, PARTS + 1, device=path.device).unsqueeze(-1) / PARTS
        for obstacle in self.obstacles:
            before = torch.cat([start.unsqueeze(1), path[:, :-1]], dim=1)
            places = torch.lerp(before.unsqueeze(2), path.unsqueeze(2), shares.to(path.dtype))
            out = obstacle.grown(self.slack).way_out(places, directions)
            onward = torch.cat([out[:, 1:, :-1], torch.zeros_like(out[:, :1, :-1])], dim=1)
            needed = torch.cat([out, onward], dim=2).amax(2)
            moved = path.unsqueeze(2) + needed.unsqueeze(-1) * directions
            beyond = (moved - moved.clamp(self.low, self.high)).square().sum(-1)
            best = (needed.square() + OUTSIDE * beyond).sum(1).argmin(-1)
            path = path + needed.take_along_dim(best[:, None, None], dim=2) * directions[best].unsqueeze(1)
        return path.clamp(self.low, self.high)

    def walk(self, path: Tensor, start: Tensor | None) -> Tensor:
        """W: what can be done of `path` [B, L, n]. start [B, n]: where the arm is; None: wherever the path begins."""
        at = self.freed(path[:, 0] if start is None else start)
        reach = torch.inf if start is None else self.step + self.further
        done = []
        for wanted in path.unbind(1):
            at = self._towards(at, wanted.clamp(self.low, self.high), reach)
            done.append(at)
            reach = self.step
        return torch.stack(done, dim=1)

    def _towards(self, at: Tensor, wanted: Tensor, reach: float) -> Tensor:
        """The place nearest to `wanted` [B, n] that one step leads to from `at` [B, n], which is free."""
        way = wanted - at
        length = torch.linalg.vector_norm(way, dim=-1, keepdim=True)
        allowed = length.clamp_max(reach)
        straight: Tensor = at + way * (allowed / length.clamp_min(torch.finfo(way.dtype).tiny))
        if not self.hit(at, straight).any():
            return straight
        sideways = [at.unsqueeze(1) + share * allowed.unsqueeze(1) * _directions(at) for share in SHORTER]
        there = torch.cat([straight.unsqueeze(1), *sideways, at.unsqueeze(1)], dim=1)
        there = there.clamp(self.low, self.high)
        touched = self.hit(at.unsqueeze(1), there)
        touched[:, -1] = False
        distance = (there - wanted.unsqueeze(1)).square().sum(-1)
        return _chosen(there, torch.where(touched, torch.inf, distance))

    def freed(self, places: Tensor) -> Tensor:
        """Those of `places` [B, n] that are not allowed, where they come out first; the others as they are."""
        found = self.push(places.unsqueeze(1), places).squeeze(1)
        if self.free(found).all():
            return found
        bounds = [torch.stack([o.low, o.high]) if isinstance(o, Box) else o.centre + o.radius for o in self.obstacles]
        extent = max(float((bound - places.unsqueeze(-2)).abs().max()) for bound in bounds)
        lengths = extent * torch.linspace(0, 2, DIRECTIONS, device=places.device, dtype=places.dtype)
        ways = (lengths[:, None, None] * _directions(places)).flatten(0, 1)
        there = (found.unsqueeze(1) + ways).clamp(self.low, self.high)
        distance = torch.where(self.free(there), (there - places.unsqueeze(1)).square().sum(-1), torch.inf)
        best = _chosen(there, distance)
        return torch.where(self.free(found).unsqueeze(-1), found, best)


class Constraint(Extension):
    """Holds a policy's chunks in a `Region`, see there and above. Notes: constraint.moved, how far the last projection
    moved what the network said, the largest of a chunk's actions, in the data's units."""

    def __init__(self, policy: DiffusionPolicy, fitted: Fitted) -> None:
        super().__init__(policy, fitted)
        words = checked(policy, fitted.options)
        self.columns: list[int] = words["columns"]
        self.position: str | None = words["position"]
        self.position_columns: list[int] = words["position_columns"]
        self.low, self.high = limits(policy, words)
        self.region = region(policy, words)

    @classmethod
    def fit(
        cls, policy: DiffusionPolicy, train: BatchSource, held_out: BatchSource, options: Mapping[str, Any]
    ) -> Fitted:
        """Checks the limits; nothing is learnt. Says which share of the demonstrated actions keeps to them."""
        words = checked(policy, options)
        actions = torch.from_numpy(np.array(train.values("action"), np.float32)).to(policy.device).flatten(1)
        low, high = limits(policy, words)
        within = (actions >= low) & (actions <= high)
        kept = within.all(-1) & region(policy, words).free(actions[:, words["columns"]])
        if not kept.any():
            raise InputError("constraint: no demonstrated action keeps to these limits, so the policy could do nothing")
        return Fitted(words | {"demonstrated_actions_within": round(float(kept.float().mean()), 4)})

    def hooks(self, seen: Encoded) -> Sequence[Hook]:
        return [_Project(self, seen)]

    def finish(self, seen: Encoded, normalized: Tensor) -> tuple[Tensor, Mapping[str, Tensor]]:
        found, moved = self.project(seen, normalized, last=True)
        return found, {"constraint.moved": moved.amax(1)}

    def project(self, seen: Encoded, normalized: Tensor, *, last: bool = False) -> tuple[Tensor, Tensor]:
        """Chunks [B, H, A], normalised, inside of the limits from now on, and how far each place was moved, [B, L].

        last: with the guarantee, W. What is past stays, and so does what needs no change, to the last bit.
        """
        action, now = self.policy.unnormalize_action(normalized, seen.obs), self.policy.spec.n_obs_steps - 1
        coming = action[:, now:]
        start = self._start(seen, len(action))
        kept = coming.clamp(self.low, self.high)
        path = kept[..., self.columns]
        path = self.region.push(path, path[:, 0] if start is None else start)
        if last:
            path = self.region.walk(path, start)
        kept[..., self.columns] = path
        found = self.policy.normalize_action(torch.cat([action[:, :now], kept], dim=1), seen.obs)
        changed = torch.cat([torch.zeros_like(action[:, :now, 0], dtype=torch.bool), (kept != coming).any(-1)], dim=1)
        moved = torch.linalg.vector_norm(path - coming[..., self.columns], dim=-1)
        return torch.where(changed.unsqueeze(-1), found, normalized), moved

    def _start(self, seen: Encoded, rows: int) -> Tensor | None:
        if self.position is None:
            return None
        state = seen.obs[self.position][:, -1].float().flatten(1)[:, self.position_columns]
        return state.repeat_interleave(rows // len(state), dim=0)


class _Project(Hook):
    def __init__(self, constraint: Constraint, seen: Encoded) -> None:
        self._constraint, self._seen = constraint, seen

    def edit_x0(self, state: StepState) -> Tensor:
        return self._constraint.project(self._seen, state.x0_hat)[0]


def region(policy: DiffusionPolicy, words: Mapping[str, Any]) -> Region:
    """Of options that are `checked`. Obstacles are larger by the margin, and by what rounding takes."""
    columns, n, by = words["columns"], len(words["columns"]), words["margin"] + _rounding(policy)
    obstacles: list[Obstacle] = []
    for disc in torch.tensor(words["discs"], device=policy.device):
        obstacles.append(Disc(disc[:n], float(disc[n])).grown(by))
    for box in torch.tensor(words["boxes"], device=policy.device):
        obstacles.append(Box(box[:n], box[n:]).grown(by))
    low, high = limits(policy, words)
    speed = float("inf") if words["speed"] is None else words["speed"]
    step = speed / policy.spec.control_rate - _rounding(policy)
    further = words["lead"] * speed if words["lead"] else 0.0
    return Region(obstacles, low[columns], high[columns], max(step, 0.0), further, _rounding(policy))


def limits(policy: DiffusionPolicy, words: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """The lowest and the highest action, [A] each; infinite where nobody says."""
    n, by = policy.spec.action.shape[0], _rounding(policy)
    low = [-float("inf")] * n if words["low"] is None else [value + by for value in words["low"]]
    high = [float("inf")] * n if words["high"] is None else [value - by for value in words["high"]]
    return torch.tensor(low, device=policy.device), torch.tensor(high, device=policy.device)


def _rounding(policy: DiffusionPolicy) -> float:
    """What normalising and back may change of an action, in its unit."""
    demonstrated = policy.spec.normalizer["action"]
    ends = [abs(float(value)) for end in ("min", "max") for value in demonstrated.get(end) or (1.0,)]
    return ROUNDING * max(1e-3, *ends)


def checked(policy: DiffusionPolicy, options: Mapping[str, Any]) -> dict[str, Any]:
    """The options of `fit constraint`, where they fit the policy. Raises `InputError`."""
    for name in OPTIONS:
        if name not in options:
            raise InputError(f"extension constraint: {name} is missing in what was fitted")
    words = {name: check(options[name], hint, f"constraint: {name}") for name, hint in OPTIONS.items()}
    if not any(words[name] for name in ("discs", "boxes", "low", "high", "speed")):
        raise InputError("constraint: nothing to keep to: give discs, boxes, low, high or speed")
    n_action, columns, n = policy.spec.action.shape[0], words["columns"], len(words["columns"])
    _check_columns("columns", columns, n_action, "an action")
    for rotation in policy.spec.action.rotations:
        if set(columns) & set(range(n_action)[rotation.columns]):
            raise InputError(f"constraint: columns={columns} are a place, but {rotation.representation} is a rotation")
    for name, size, what in (("discs", n + 1, "a centre and a radius"), ("boxes", 2 * n, "a low and a high corner")):
        for i, values in enumerate(words[name]):
            if len(values) != size:
                raise InputError(f"constraint: {name}[{i}]={values}: expected {size} numbers, {what}")
    for i, disc in enumerate(words["discs"]):
        if not disc[n] > 0:
            raise InputError(f"constraint: discs[{i}]={disc}: its radius must be above 0")
    for i, box in enumerate(words["boxes"]):
        if not all(a < b for a, b in zip(box[:n], box[n:], strict=True)):
            raise InputError(f"constraint: boxes[{i}]={box}: its low corner must be below its high one")
    for end in ("low", "high"):
        if words[end] is not None and len(words[end]) != n_action:
            raise InputError(f"constraint: {end} has {len(words[end])} numbers for actions of {n_action}")
    low, high = limits(policy, words)
    if not (low < high).all():
        i = int((low < high).int().argmin())
        raise InputError(f"constraint: low[{i}]={words['low'][i]:g} must be below high[{i}]={words['high'][i]:g}")
    if words["position"] is not None:
        if words["position"] not in policy.spec.states:
            raise unknown("constraint: observation of position", words["position"], policy.spec.states)
        size = math.prod(policy.spec.states[words["position"]].shape)
        _check_columns("position_columns", words["position_columns"], size, words["position"])
        if len(words["position_columns"]) != n:
            raise InputError(f"constraint: position_columns={words['position_columns']} for {n} columns of an action")
    return words


def _check_columns(name: str, columns: Sequence[int], size: int, what: str) -> None:
    if len(set(columns)) < len(columns) or max(columns) >= size:
        raise InputError(f"constraint: {name}={list(columns)}: expected different ones of {what}, from 0 to {size - 1}")


def _chosen(places: Tensor, distance: Tensor) -> Tensor:
    """Of `places` [B, K, n] those of the smallest `distance` [B, K], [B, n]."""
    best = distance.argmin(-1)[:, None, None]
    return places.take_along_dim(best, dim=1).squeeze(1)


def _directions(like: Tensor) -> Tensor:
    """`DIRECTIONS` unit vectors [K, n], evenly spread: on the circle, or on the sphere (a Fibonacci lattice)."""
    k = torch.arange(DIRECTIONS, device=like.device, dtype=like.dtype)
    if like.shape[-1] == 2:
        angle = 2 * torch.pi * k / DIRECTIONS
        return torch.stack([angle.cos(), angle.sin()], dim=-1)
    z = 1 - (2 * k + 1) / DIRECTIONS
    angle = torch.pi * (3 - 5**0.5) * k
    radius = (1 - z.square()).sqrt()
    return torch.stack([radius * angle.cos(), radius * angle.sin(), z], dim=-1)
