"""lerobot's normalisation: modes, statistics, and where both stand.

0.4 and later   policy_preprocessor.json, policy_postprocessor.json: steps, each with a file of statistics
before          buffers among the weights: normalize_inputs.buffer_observation_state.min, …

mode         x ↦                                  statistics
MIN_MAX      2 (x − min) / (max − min) − 1        min, max
QUANTILES    the same of q01 and q99              q01, q99
QUANTILE10   the same of q10 and q90              q10, q90
MEAN_STD     (x − mean) / (std + 1e-8)            mean, std
IDENTITY     x
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file
from torch import Tensor

from action_diffusion.errors import InputError
from action_diffusion.policy.interchange.lerobot.theirs import ACTION, MODES, VERSIONS, Config, Feature
from action_diffusion.policy.reading import read_json
from action_diffusion.schema import shown

PREPROCESSOR, POSTPROCESSOR = "policy_preprocessor.json", "policy_postprocessor.json"
BEFORE = "normalize_inputs.", "normalize_targets.", "unnormalize_outputs."
"""What names of the older layout's buffers begin with."""
ENDS = {"MIN_MAX": ("min", "max"), "QUANTILES": ("q01", "q99"), "QUANTILE10": ("q10", "q90")}
NEEDED = {**ENDS, "MEAN_STD": ("mean", "std"), "IDENTITY": ()}
EPS = 1e-8
RENAME, BATCH, DEVICE = "rename_observations_processor", "to_batch_processor", "device_processor"
NORMALIZE, UNNORMALIZE = "normalizer_processor", "unnormalizer_processor"
Numbers = Mapping[str, np.ndarray]


class Normalisation(NamedTuple):
    """How one key is normalised. statistics: by name, one number a dimension or a channel, float64."""

    mode: str
    statistics: Numbers


class Pipeline(NamedTuple):
    """What stands in a processor's file. renamed: name outside → the policy's; keys: without a normalisation, none."""

    keys: dict[str, Normalisation]
    renamed: dict[str, str]
    said: tuple[str, ...]


def read_pipelines(folder: Path, config: Config, weights: Mapping[str, Tensor]) -> Pipeline:
    """The normalisation of every key that the policy has, and names. Raises `InputError` for what is not known here."""
    features = {**config.input_features, **config.output_features}
    present = [name for name in (PREPROCESSOR, POSTPROCESSOR) if (folder / name).is_file()]
    if len(present) == 1:
        raise InputError(f"{folder} has {present[0]} without its counterpart; {VERSIONS} write both")
    if present:
        before, after = (_pipeline(folder / name, features) for name in present)
        keys = {**before.keys, ACTION: after.keys.get(ACTION, IDENTITY)}
        return Pipeline(keys, before.renamed, (*before.said, *after.said))
    return Pipeline(_buffers(folder, config, features, weights), {}, ())


IDENTITY = Normalisation("IDENTITY", {})


def _pipeline(file: Path, features: Mapping[str, Feature]) -> Pipeline:
    steps = read_json(file).get("steps")
    if not isinstance(steps, list) or not all(isinstance(step, dict) for step in steps):
        raise InputError(f"{file}: no list of steps")
    keys: dict[str, Normalisation] = {}
    renamed: dict[str, str] = {}
    said = []
    for step in steps:
        name, options = step.get("registry_name"), step.get("config") or {}
        if not isinstance(options, dict):
            raise InputError(f"{file}: the configuration of step {shown(name)} is no object")
        if name in (NORMALIZE, UNNORMALIZE):
            keys = _normalisation(file, step, options, features)
        elif name == RENAME:
            renamed = _renamed(file, options)
        elif name == DEVICE:
            if options.get("float_dtype") not in (None, "float32"):
                said.append(f"it computes in {shown(options['float_dtype'])} there, in float32 here")
        elif name != BATCH:
            raise InputError(
                f"{file} has a step {shown(name or step.get('class'))}, which has no counterpart here: "
                f"there are {', '.join((RENAME, BATCH, DEVICE, NORMALIZE, UNNORMALIZE))}"
            )
    return Pipeline(keys, renamed, tuple(said))


def _renamed(file: Path, options: Mapping[str, Any]) -> dict[str, str]:
    found = options.get("rename_map") or {}
    if not isinstance(found, dict) or not all(isinstance(part, str) for part in (*found, *found.values())):
        raise InputError(f"{file}: rename_map={shown(found)}: expected names and names")
    return found


def _normalisation(
    file: Path, step: Mapping[str, Any], options: Mapping[str, Any], features: Mapping[str, Feature]
) -> dict[str, Normalisation]:
    modes, only = options.get("norm_map") or {}, options.get("normalize_observation_keys")
    known = options.get("features")
    if not isinstance(modes, dict) or not isinstance(known, dict):
        raise InputError(f"{file}: {step['registry_name']} has no norm_map or no features")
    statistics: dict[str, dict[str, np.ndarray]] = {}
    for name, value in _state(file, step.get("state_file")).items():
        key, _, statistic = name.rpartition(".")
        statistics.setdefault(key, {})[statistic] = np.asarray(value, np.float64)
    keys = {}
    for key, feature in features.items():
        left = key not in known or (only is not None and key != ACTION and key not in only)
        mode = "IDENTITY" if left or key not in statistics else modes.get(feature.type, "IDENTITY")
        keys[key] = _checked(f"{file}, {key}", mode, statistics.get(key, {}), feature)
    return keys


def _state(file: Path, name: Any) -> Numbers:
    """The step's statistics; none where it has no file of them."""
    if name is None:
        return {}
    if not isinstance(name, str) or not re.fullmatch(r"[\w-][\w.-]*\.safetensors", name):
        raise InputError(f"{file}: state_file={shown(name)}: expected the name of a .safetensors file beside it")
    try:
        return load_file(file.parent / name)
    except (OSError, SafetensorError) as error:
        raise InputError(f"{file.parent / name}: not a readable safetensors file: {error}") from None


def _buffers(
    folder: Path, config: Config, features: Mapping[str, Feature], weights: Mapping[str, Tensor]
) -> dict[str, Normalisation]:
    keys = {}
    for key, feature in features.items():
        start = f"{BEFORE[2 if key == ACTION else 0]}buffer_{key.replace('.', '_')}."
        mode = config.normalization_mapping.get(feature.type, "IDENTITY")
        found = {name.removeprefix(start): value for name, value in weights.items() if name.startswith(start)}
        if mode != "IDENTITY" and not found:
            raise InputError(
                f"{folder}: no statistics of {key}, neither in {PREPROCESSOR} and {POSTPROCESSOR} (from 0.4 on) "
                f"nor among the weights ({start}…, before)"
            )
        statistics = {name: value.double().numpy() for name, value in found.items()}
        keys[key] = _checked(f"{folder}, {key}", mode, statistics, feature)
    return keys


def _checked(where: str, mode: Any, statistics: Numbers, feature: Feature) -> Normalisation:
    """With statistics of one number a dimension, or a channel of a picture."""
    if mode not in MODES:
        raise InputError(f"{where}: normalisation {shown(mode)}: choose from {', '.join(MODES)}")
    n = 3 if feature.type == "VISUAL" else feature.shape[0]
    used = {}
    for name in dict.fromkeys((*NEEDED[mode], *(("min", "max") if {"min", "max"} <= statistics.keys() else ()))):
        if name not in statistics:
            raise InputError(f"{where}: {mode} needs the statistic {name!r}; there are {', '.join(statistics)}")
        value = statistics[name].reshape(-1)
        if len(value) != n or not np.isfinite(value).all():
            shape = list(statistics[name].shape)
            raise InputError(f"{where}: {name!r} of shape {shape}: expected {n} finite numbers")
        used[name] = value
    return Normalisation(mode, used)


def of_vector(normalisation: Normalisation, n: int, *, action: bool) -> dict[str, Any]:
    """Our statistics (`normalizer.fit`) that normalise a state, or an action, of n dimensions as lerobot does.

    A dimension that never changed goes to −1 there as long as it keeps its value, and to very large numbers when it
    does not; here it changes no more than its value does. Back from the network it is its value, here and there.
    """
    mode, given = normalisation
    low, high = given.get("min"), given.get("max")
    if mode == "IDENTITY":
        return {"kind": "identity", "scale": [1.0] * n, "offset": [0.0] * n} | _ends(low, high)
    if mode == "MEAN_STD":
        mean, std = given["mean"], given["std"]
        constant = std == 0
        scale = 1 / np.where(constant, 1, std)
        offset = -mean * scale
        if low is None and constant.any():
            low, high = mean - std, mean + std  # which dimension is constant is told from these
        kind = "gaussian"
    else:
        low, high = (given[name] for name in ENDS[mode])
        constant = high == low
        scale = 2 / np.where(constant, 2, high - low)
        offset = np.where(constant, -low - (0 if action else 1), -1 - low * scale)
        kind = "minmax"
    numbers = {"scale": scale, "offset": offset}
    return {"kind": kind} | {name: np.float32(value).tolist() for name, value in numbers.items()} | _ends(low, high)


def _ends(low: np.ndarray | None, high: np.ndarray | None) -> dict[str, Any]:
    if low is None or high is None:
        return {}
    return {"min": np.float32(low).tolist(), "max": np.float32(high).tolist()}


def of_pixels(normalisation: Normalisation) -> dict[str, list[float]]:
    """`encoder.pixels` of a camera: mean and standard deviation of red, green and blue in [0, 1]."""
    mode, given = normalisation
    if mode == "IDENTITY":
        return {"mean": [0.0] * 3, "std": [1.0] * 3}
    if mode == "MEAN_STD":
        return {"mean": given["mean"].tolist(), "std": (given["std"] + EPS).tolist()}
    low, high = (given[name] for name in ENDS[mode])
    return {"mean": ((low + high) / 2).tolist(), "std": (np.where(high == low, EPS, high - low) / 2).tolist()}
