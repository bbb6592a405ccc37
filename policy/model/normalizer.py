"""Normalisation per key, with statistics that travel in the bundle.

    kind       maps                        to
    minmax     [min, max] of the data      [−1, 1]
    gaussian   mean, standard deviation    0, 1
    identity   x                           x

A dimension that never changed in the data maps to 0 instead of dividing by zero, and back to its value whatever the
network says: an arm must not move a joint that no demonstration moved.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from action_diffusion.errors import InputError, unknown
from action_diffusion.policy.model.features import module_name
from action_diffusion.policy.spec import CONSTANT

KINDS = ("minmax", "gaussian", "identity")


def fit(values: np.ndarray, kind: str = "minmax", weights: np.ndarray | None = None) -> dict[str, Any]:
    """Statistics of `values` [N, D] as plain numbers: kind, scale, offset (normalised = x · scale + offset), min, max.

    weights: float [N], how much each counts in the mean and the deviation (min and max are of all); None: as any.
    Raises `InputError` for an unknown kind or an empty array.
    """
    if kind not in KINDS:
        raise unknown("normaliser", kind, KINDS)
    if len(values) == 0:
        raise InputError("no steps to compute normaliser statistics from")
    data = np.asarray(values, dtype=np.float64)
    low, high = data.min(axis=0), data.max(axis=0)
    constant = _constant(low, high)
    if kind == "minmax":
        scale = 2.0 / np.where(constant, 1.0, high - low)
        offset = -1.0 - low * scale
    elif kind == "gaussian":
        mean, deviation = data.mean(axis=0), data.std(axis=0)
        if weights is not None:
            mean = np.average(data, axis=0, weights=weights)
            deviation = np.average((data - mean) ** 2, axis=0, weights=weights) ** 0.5
        scale = 1.0 / np.where(constant, 1.0, deviation)
        offset = -mean * scale
    else:
        scale, offset = np.ones_like(low), np.zeros_like(low)
    if kind != "identity":
        scale = np.where(constant, 1.0, scale)
        offset = np.where(constant, -low, offset)
    as_list = {"scale": scale, "offset": offset, "min": low, "max": high}
    return {"kind": kind} | {name: np.float32(value).tolist() for name, value in as_list.items()}


class Normalizer(nn.Module):
    """Affine maps of named vectors. `statistics`: key → result of `fit`.

    Kept out of the weights: the statistics are written to the bundle's `spec.json`, where people can read them.
    """

    def __init__(self, statistics: Mapping[str, Mapping[str, Any]]):
        super().__init__()
        self.statistics = {key: dict(value) for key, value in statistics.items()}
        for key, value in self.statistics.items():
            for name in ("scale", "offset"):
                if name not in value:
                    raise InputError(f"normaliser statistics of {key!r} lack {name!r}")
                tensor = torch.tensor(value[name], dtype=torch.float32)
                if not bool(torch.isfinite(tensor).all()) or (name == "scale" and bool((tensor == 0).any())):
                    raise InputError(f"normaliser statistics of {key!r}: {name} must be finite and not zero")
                self.register_buffer(_buffer(key, name), tensor, persistent=False)
            self.register_buffer(_buffer(key, "varies"), _varies(value), persistent=False)

    def normalize(self, key: str, value: Tensor) -> Tensor:
        """[…, D] in the data's units → […, D] normalised."""
        return value * self._get(key, "scale") + self._get(key, "offset")

    def unnormalize(self, key: str, value: Tensor) -> Tensor:
        """The inverse of `normalize`; a constant dimension gives its value."""
        return (value * self._get(key, "varies") - self._get(key, "offset")) / self._get(key, "scale")

    def demonstrated(self, key: str) -> tuple[Tensor, Tensor] | None:
        """The smallest and the largest normalised values [D] in the data; None where they are −1 and 1, by min-max.

        Raises `InputError` for statistics that do not tell.
        """
        statistics = self.statistics[key]
        if statistics.get("kind", "minmax") == "minmax":
            return None
        if statistics.get("min") is None or statistics.get("max") is None:
            raise InputError(f"normaliser statistics of {key!r} lack min and max, which policy.sampler.clip needs")
        ends = (torch.tensor(statistics[name], dtype=torch.float32) for name in ("min", "max"))
        first, second = (self.normalize(key, end) for end in ends)
        return torch.minimum(first, second), torch.maximum(first, second)

    def _get(self, key: str, name: str) -> Tensor:
        if key not in self.statistics:
            raise unknown("normalised key", key, self.statistics)
        return cast(Tensor, getattr(self, _buffer(key, name)))


def _buffer(key: str, name: str) -> str:
    """The name of a buffer of the module, which cannot have dots: one for each key."""
    return f"{module_name(key)}__{name}"


def _constant(low: np.ndarray, high: np.ndarray) -> np.ndarray:
    result: np.ndarray = (high - low) <= CONSTANT * np.maximum(1.0, np.abs(high))
    return result


def _varies(statistics: Mapping[str, Any]) -> Tensor:
    """1 for each dimension that changed in the data (all of them for the identity), 0 for a constant one."""
    if statistics.get("kind") == "identity" or statistics.get("min") is None:
        return torch.ones(len(statistics["scale"]))
    low, high = np.asarray(statistics["min"], np.float64), np.asarray(statistics["max"], np.float64)
    return torch.from_numpy(~_constant(low, high)).float()
