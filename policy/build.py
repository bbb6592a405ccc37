"""From plain configuration to a policy: used alike by training and by loading a bundle."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, cast

import numpy as np
import torch
from torch import nn

from action_diffusion.errors import InputError, unknown
from action_diffusion.memory import free_memory
from action_diffusion.options import check_policy
from action_diffusion.policy.diffusion.sampler import Sampler
from action_diffusion.policy.model import normalizer as normalizer_module
from action_diffusion.policy.model.estimator import PlanarPose
from action_diffusion.policy.model.frames import ActionFrame
from action_diffusion.policy.model.normalizer import Normalizer
from action_diffusion.policy.objectives.objective import Objective
from action_diffusion.policy.policy import DiffusionPolicy
from action_diffusion.policy.registry import build, parameters
from action_diffusion.policy.spec import IN_FRAME, PolicySpec, Statistics

MOST_WEIGHTS = 2_000_000_000
"""Of one network: eight times the paper's."""
OPTIONAL = ("features", "action_frame", "estimator")
SECTIONS = (*OPTIONAL, "normalizer", "encoder", "denoiser", "process", "sampler", "objective")


def build_features(config: Mapping[str, Any], spec: PolicySpec) -> dict[str, nn.Module]:
    """The feature module of each state key that has one. `config`: key → {name, …}, or None."""
    features = {}
    for key, options in (config or {}).items():
        if options is None:
            continue
        if key not in spec.states:
            raise unknown("state in policy.features", key, spec.states)
        features[key] = build("features", options, n=math.prod(spec.states[key].shape))
    return features


def build_action_frame(config: Mapping[str, Any] | None, spec: PolicySpec) -> ActionFrame | None:
    """The frame that chunks are learnt in, or None for the data's own. `config`: {name, …}, or None."""
    if config is None:
        return None
    if "spec" in parameters("action_frame", config):
        return cast(ActionFrame, build("action_frame", config, spec=spec))
    key = config.get("observation")
    if key not in spec.states:
        raise unknown("state in policy.action_frame.observation", str(key), spec.states)
    sizes = {"n": math.prod(spec.states[key].shape), "n_action": spec.action.shape[0]}
    return cast(ActionFrame, build("action_frame", config, **sizes))


def build_estimator(config: Mapping[str, Any] | None, spec: PolicySpec, embedding_dim: int) -> PlanarPose | None:
    """What tells a state that is not observed. `config`: {name, state, known, …}, or None."""
    if config is None:
        return None
    key, known = config.get("state"), config.get("known") or {}
    if key not in spec.estimates:
        raise unknown("state in policy.estimator.state", str(key), spec.estimates)
    for name in known:
        if name not in spec.observations:
            raise unknown("observation in policy.estimator.known", name, spec.observations)
    n = math.prod(spec.estimates[key].shape)
    return cast(PlanarPose, build("estimator", config, embedding_dim=embedding_dim, n=n))


def fit_normalizer(
    config: Mapping[str, Any],
    spec: PolicySpec,
    read: Callable[[str], np.ndarray],
    read_chunks: Callable[[str], tuple[np.ndarray, np.ndarray]],
    weigh: Callable[[str], np.ndarray | None] = lambda _: None,
    read_history: Callable[[str], np.ndarray] | None = None,
) -> dict[str, dict[str, Any]]:
    """Statistics of every state key (after its features), of the action, and of the action in its frame.

    `read(key)` gives all the training steps [N, D] of an observation key or of "action". `read_chunks(key)` gives, for
    all the training windows, that key's value now [W, D] and the chunk [W, H, A]. `weigh(key)` says how much each of
    the steps of a key counts [N], for `IN_FRAME` each of the windows [W] (`normalizer.fit`). `read_history(key)` gives
    what the windows see of a key, [W, To, D]; without it, now alone. `config`: {"default": kind, and a kind for each
    key that differs}.
    """
    kinds = dict(config["normalizer"])
    default = str(kinds.pop("default", "minmax"))
    features = build_features(config.get("features", {}), spec)
    frame = build_action_frame(config.get("action_frame"), spec)
    _check_seen(frame, features)
    keys = [key for key in spec.states if frame is None or key not in frame.observed_dims]
    known = (*spec.states, *spec.depths, *spec.points, "action")
    for key in kinds:
        if key not in known:
            raise unknown("key in policy.normalizer", key, known)
    statistics = {key: _fit_depth(key, read(key), kinds.get(key, "gaussian")) for key in spec.depths}
    for key, seen in spec.points.items():  # one for all of the points: their order means nothing
        values = read(key).reshape(-1, seen.shape[1])
        statistics[key] = normalizer_module.fit(values, kinds.get(key, default))
    for key in (*keys, "action"):
        values = read(key)
        values = values.reshape(len(values), -1)
        if key in features:
            with torch.no_grad():
                values = features[key](torch.from_numpy(np.asarray(values, np.float32))).numpy()
        kind = kinds.get(key, "identity" if key in spec.texts else default)
        statistics[key] = _fit(key, values, kind, weigh(key))
    if frame is None:
        return statistics
    read_history = read_history or (lambda key: read_chunks(key)[0][:, None])
    histories = {
        key: torch.from_numpy(np.asarray(read_history(key), np.float32)).flatten(2) for key in frame.observations
    }
    chunks = torch.from_numpy(np.asarray(read_chunks(frame.observations[0])[1], np.float32))
    now = torch.cat([history[:, -1] for history in histories.values()], dim=1)
    in_frame = {"action": frame.enter(chunks, now), **frame.observe(histories)}
    weights = weigh(IN_FRAME)
    for key, found in in_frame.items():
        each = None if weights is None else np.repeat(weights, found.shape[1])
        fitted = _fit(key, found.flatten(0, 1).numpy(), kinds.get(key, default), each)
        statistics[IN_FRAME if key == "action" else key] = fitted
    return statistics


def _fit_depth(key: str, values: np.ndarray, kind: str) -> dict[str, Any]:
    """Of all pixels [N, H, W] together whose depth is known."""
    known = values[values > 0].reshape(-1, 1)
    if not len(known):
        raise InputError(f"observation {key!r}: all of the depth is 0, which means that it is unknown")
    return _fit(key, known, kind)


def _fit(key: str, values: np.ndarray, kind: str, weights: np.ndarray | None = None) -> dict[str, Any]:
    """`normalizer.fit`; `InputError` for values that are too far apart to be numbers when they are mapped back."""
    found = normalizer_module.fit(values, kind, weights)
    try:
        Statistics(**found)
    except InputError:
        raise InputError(
            f"{key!r} has values from {values.min():.3g} to {values.max():.3g}, too far apart to be learnt: look for "
            "wrong ones (action-diffusion data doctor)"
        ) from None
    return found


def _check_seen(frame: ActionFrame | None, features: Mapping[str, Any]) -> None:
    """`InputError` where what is observed from the frame has features of its own as well."""
    for key in {} if frame is None else frame.observed_dims:
        if key in features:
            raise InputError(
                f"policy.features.{key}: the action frame observes {key!r} from where it is now: give "
                f"policy.features.{key}=null, or policy.action_frame.observed=absolute"
            )


def check_sections(config: Mapping[str, Any]) -> None:
    """`InputError` for a policy configuration that lacks a part or has another, and for options that cannot be."""
    for section in SECTIONS:
        if section not in config and section not in OPTIONAL:
            raise InputError(f"the policy configuration has no {section!r} section")
    for section in config:
        if section not in SECTIONS:
            raise unknown("section of the policy configuration", section, SECTIONS)
    check_policy(config)


def build_policy(config: Mapping[str, Any], spec: PolicySpec) -> DiffusionPolicy:
    """The policy that `config` (the `policy` part of a resolved configuration) describes, for `spec`.

    Raises `InputError` for unknown components and options, and for parts that do not fit each other.
    """
    check_sections(config)
    features = build_features(config.get("features") or {}, spec)
    sizes = {key: math.prod(value.shape) for key, value in spec.states.items() if key in spec.observations}
    sizes |= {key: cast(int, features[key].output_dim) for key in sizes if key in features}
    action_frame = build_action_frame(config.get("action_frame"), spec)
    _check_seen(action_frame, features)
    sizes |= {} if action_frame is None else action_frame.observed_dims
    cameras = spec.camera_order
    parts: dict[str, Any] = {
        "image_keys": cameras,
        "image_shapes": {key: spec.observations[key].shape for key in cameras},
        "state_dims": sizes,
        "n_obs_steps": spec.n_obs_steps,
    }
    if spec.depths:
        parts["depth_shapes"] = {key: value.shape for key, value in spec.depths.items()}
    if spec.points:
        parts["point_shapes"] = {key: value.shape for key, value in spec.points.items()}
    if spec.texts and "text_dims" in parameters("encoder", config["encoder"]):
        parts["text_dims"] = {key: sizes.pop(key) for key in spec.texts}
    empty = config["encoder"] | ({"weights": None} if config["encoder"].get("weights") else {})
    _check_weights(lambda: build("encoder", empty, **parts))
    encoder = build("encoder", config["encoder"], **parts)
    estimator = build_estimator(config.get("estimator"), spec, encoder.output_dim)
    condition_dim = encoder.output_dim
    if estimator is not None:
        condition_dim += features[estimator.key].output_dim if estimator.key in features else estimator.n
    action_dim = spec.action.shape[0] if action_frame is None else action_frame.output_dim or spec.action.shape[0]
    sizes = {"action_dim": action_dim, "condition_dim": condition_dim}
    objective = cast(Objective, build("objective", {"name": "denoising"} | config["objective"]))
    asked = {"marked": objective.max_delay > 0, "two_times": objective.two_times}
    parts = {**sizes, **{name: True for name, needed in asked.items() if needed}}
    steps = {"n_obs_steps": spec.n_obs_steps if estimator is None else 1, "horizon": spec.horizon}
    taken = parameters("denoiser", config["denoiser"]) - set(config["denoiser"])
    parts |= {name: value for name, value in steps.items() if name in taken}
    _check_weights(lambda: build("denoiser", config["denoiser"], **parts))
    denoiser = build("denoiser", config["denoiser"], **parts)
    denoiser.check_horizon(spec.horizon)
    process = build("process", config["process"])
    if action_frame is not None and IN_FRAME not in spec.normalizer:
        raise InputError(f"no normaliser statistics for {IN_FRAME!r}, which policy.action_frame needs")
    normalizer = Normalizer(spec.normalizer)
    clips = config["sampler"].get("clip", "x0") is not None and config["sampler"].get("clip_to") != "unit"
    demonstrated = normalizer.demonstrated("action" if action_frame is None else IN_FRAME) if clips else None
    return DiffusionPolicy(
        spec=spec,
        features=features,
        action_frame=action_frame,
        estimator=estimator,
        normalizer=normalizer,
        encoder=encoder,
        denoiser=denoiser,
        process=process,
        sampler=Sampler(process=process, demonstrated=demonstrated, two_times=objective.two_times, **config["sampler"]),
        objective=objective,
    )


def check_statistics(policy: DiffusionPolicy) -> None:
    """`InputError` where the normaliser's statistics have other dimensions than what they are for."""
    spec = policy.spec
    sizes = {key: math.prod(value.shape) for key, value in spec.states.items()} | {"action": spec.action.shape[0]}
    sizes |= {key: cast(int, feature.output_dim) for key, feature in policy.features.items()}
    sizes |= dict.fromkeys(spec.depths, 1) | {key: value.shape[1] for key, value in spec.points.items()}
    if policy.action_frame is not None:
        sizes |= policy.action_frame.observed_dims | {IN_FRAME: policy.action_frame.output_dim or spec.action.shape[0]}
    elif IN_FRAME in spec.normalizer:
        sizes[IN_FRAME] = spec.action.shape[0]
    for key, size in sizes.items():
        found = len(spec.normalizer[key]["scale"])
        if found != size:
            raise InputError(f"normaliser statistics of {key!r} have {found} dimensions, it has {size}")


def _check_weights(make: Callable[[], nn.Module]) -> None:
    """`InputError` for a network of more weights than `MOST_WEIGHTS`, or than the free memory holds."""
    with torch.device("meta"):  # sizes without memory
        n = sum(weight.numel() for weight in make().parameters())
    free = free_memory()
    if n > MOST_WEIGHTS or 4 * n > free:
        raise InputError(
            f"a network of {n / 1e6:,.0f} M weights takes {4 * n / 1e9:,.1f} GB, of which {free / 1e9:,.1f} GB are "
            f"free; at most {MOST_WEIGHTS / 1e6:,.0f} M weights can be"
        )


def with_statistics(spec: PolicySpec, statistics: dict[str, Any]) -> PolicySpec:
    """The same specification with normaliser statistics."""
    return replace(spec, normalizer=statistics)
