"""What another project's policy is: something that a path can hold, that becomes a bundle, or is written from one.

    their folder or file ─▶ PolicyFormat.read ─▶ Foreign ─▶ saved ─▶ bundle ─▶ PolicyFormat.write ─▶ theirs
                            numbers, no code      our words

Nothing that a file brings is executed, and nothing that it names outside of itself is read.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from action_diffusion.errors import InputError, unknown
from action_diffusion.options import Dataset
from action_diffusion.policy import bundle as bundles
from action_diffusion.policy.build import build_policy, check_statistics
from action_diffusion.policy.policy import DiffusionPolicy
from action_diffusion.policy.spec import PolicySpec

UNKNOWN_RATE = 0.0
"""The control rate of a policy that does not say it: whoever imports it has to."""


class Foreign(NamedTuple):
    """Another project's policy in our words.

    spec: its `control_rate` may be `UNKNOWN_RATE`. config: as a bundle's config.yaml has it: "policy", and what else is
    known. weights: of the policy that this describes, by name. said: what has no counterpart here, or was read
    otherwise than it stands there, in words.
    """

    spec: PolicySpec
    config: Mapping[str, Any]
    weights: Mapping[str, torch.Tensor]
    said: tuple[str, ...] = ()


class PolicyFormat(NamedTuple):
    """One way in which others keep policies.

    holds: whether a path is of it, told from its content. read: raises `InputError` for an unknown version, a missing
    field, a part that this stack does not have. write: makes `path` from a loaded policy and its configuration,
    atomically, and returns what to tell about it; options are those of the format. None: only the other way.
    """

    name: str
    holds: Callable[[Path], bool]
    read: Callable[[Path], Foreign] | None = None
    write: Callable[[DiffusionPolicy, Mapping[str, Any], Path, Mapping[str, Any]], Mapping[str, Any]] | None = None


def policy_of(foreign: Foreign) -> DiffusionPolicy:
    """The policy that another project's file describes, with its weights, ready to predict.

    Raises `InputError` naming the first weight that is missing, left over, of another shape, or not finite.
    """
    policy = build_policy(foreign.config["policy"], foreign.spec)
    own = policy.state_dict()
    for name in sorted(own.keys() ^ foreign.weights.keys()):
        raise InputError(f"the weights {'lack' if name in own else 'have an extra'} {name!r}")
    for name, value in own.items():
        if value.shape != foreign.weights[name].shape:
            there = list(foreign.weights[name].shape)
            raise InputError(f"weight {name!r} has shape {there} there, {list(value.shape)} here")
        if not bool(torch.isfinite(foreign.weights[name]).all()):
            raise InputError(f"weight {name!r} holds NaN or infinite values")
    policy.load_state_dict(dict(foreign.weights))
    check_statistics(policy)
    return policy.eval()


def saved(foreign: Foreign, path: Path) -> DiffusionPolicy:
    """Write a bundle of another project's policy, with a golden pair of observations that are made up."""
    policy = policy_of(foreign)
    bundles.save(path, policy, {**trained_on(foreign.spec), **foreign.config}, golden_obs=made_up(foreign.spec))
    return policy


def renamed(foreign: Foreign, keys: Mapping[str, str]) -> Foreign:
    """With other names of observations: theirs, as they were read, to those of a robot, a simulator or a buffer.

    Raises `InputError` for a name that is not there, and for two that would be one.
    """
    for key in keys:
        if key not in foreign.spec.observations:
            raise unknown("observation in keys", key, foreign.spec.observations)

    def named(values: Mapping[str, Any]) -> dict[str, Any]:
        return {keys.get(key, key): value for key, value in values.items()}

    spec, policy = foreign.spec, dict(foreign.config["policy"])
    if len(named(spec.observations)) < len(spec.observations):
        raise InputError(f"keys={dict(keys)}: two observations would have one name, of {', '.join(spec.observations)}")
    observations = {
        key: replace(value, source=keys.get(value.source, value.source))
        for key, value in named(spec.observations).items()
    }
    policy["normalizer"] = named(policy["normalizer"])
    if policy["encoder"].get("pixels"):
        policy["encoder"] = {**policy["encoder"], "pixels": named(policy["encoder"]["pixels"])}
    config = {**foreign.config, "policy": policy}
    if "names" in (config.get("imported") or {}):
        config["imported"] = {**config["imported"], "names": named(config["imported"]["names"])}
    spec = replace(spec, observations=observations, normalizer=named(spec.normalizer))
    said = tuple(f"{old} is called {new}" for old, new in keys.items())
    return foreign._replace(spec=spec, config=config, said=(*foreign.said, *said))


def trained_on(spec: PolicySpec) -> dict[str, Any]:
    """What evaluation and `fit` take of a bundle's configuration beside the policy (`BundleConfig`): the task as the
    specification has it, and data that nobody knows."""
    steps = {name: getattr(spec, name) for name in ("n_obs_steps", "horizon", "n_action_steps", "control_rate")}
    task = {
        "name": spec.task or "imported",
        **steps,
        "observations": {key: {"source": value.source, "kind": value.kind} for key, value in spec.observations.items()},
        "action": {"source": spec.action.source},
        "env": spec.env,
    }
    return {"data": None, "seed": 0, "dataset": asdict(Dataset()), "task": task}


def made_up(spec: PolicySpec, seed: int = 0) -> dict[str, np.ndarray]:
    """Observations [To, …] that the normaliser's statistics allow: states within their ranges, images of noise.

    Where statistics are of what features make of a state, nobody knows its range: it is from -1 to 1.
    """
    random = np.random.default_rng(seed)
    observations = {}
    for key, value in spec.observations.items():
        shape = (spec.n_obs_steps, *value.shape)
        if value.kind == "image":
            observations[key] = random.integers(0, 256, shape, dtype=np.uint8)
            continue
        if value.kind == "depth":
            observations[key] = random.integers(0, 2000, shape, dtype=np.uint16)
            continue
        statistics = spec.normalizer[key]
        if value.kind != "points" and len(statistics["scale"]) != math.prod(value.shape):
            observations[key] = random.uniform(-1, 1, shape).astype(value.dtype)
            continue
        scale, offset = (np.asarray(statistics[name]) for name in ("scale", "offset"))
        normal = random.uniform(-1, 1, (*(shape[:-1] if value.kind == "points" else shape[:1]), len(scale)))
        values = (normal - offset) / scale
        if statistics.get("min") is not None:  # which those that never changed keep to
            values = np.clip(values, statistics["min"], statistics["max"])
        observations[key] = values.reshape(shape).astype(value.dtype)
    return observations
