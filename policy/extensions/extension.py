"""What all extensions are, and how they lie in a bundle.

    action-diffusion fit NAME bundle=DIR       demonstrations ─▶ Extension.fit ─▶ Fitted ─▶ extensions/NAME.safetensors
    evaluate, deploy, serve extensions=[NAME]                   Extension(policy, Fitted) acts in every chunk

A file holds named arrays, and its options as JSON in the header: numbers, words and lists, never code. It belongs to
the weights that it was fitted to: their hash is in it, and other weights refuse it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import safetensors
from safetensors.numpy import save_file

from action_diffusion.datasets.batches.loader import BatchSource
from action_diffusion.errors import InputError
from action_diffusion.files import atomic_path
from action_diffusion.options.extensions import Fit
from action_diffusion.policy.policy import DiffusionPolicy
from action_diffusion.policy.reading import extension_file, require_extensions
from action_diffusion.policy.sample import Acting
from action_diffusion.registry import EXTENSIONS
from action_diffusion.schema import shown

MOST_BYTES = 256 * 2**20
"""Of a fitted file."""


@dataclass(frozen=True)
class Fitted:
    """What `fit` found. options: plain data; what it was fitted with, and what it found that is no array.

    arrays: name → numbers. A `fit` leaves `weights` empty: `write` fills it in.
    """

    options: Mapping[str, Any]
    arrays: Mapping[str, np.ndarray] = field(default_factory=dict)
    weights: str = ""


class Extension(Acting):
    """Base of all extensions, see `sample.Acting` for what one may do.

    One instance acts in every chunk of a policy, for rows that do not know each other: what it keeps from chunk to
    chunk is no state of an episode.
    """

    options: ClassVar[type[Fit]] = Fit
    """What `action-diffusion fit` takes, of an extension that is not this package's; those have `FITS`."""

    def __init__(self, policy: DiffusionPolicy, fitted: Fitted) -> None:
        """Raises `InputError` where `fitted` lacks what it needs, or is for another sampler."""
        self.policy, self.fitted = policy, fitted

    @classmethod
    def fit(
        cls, policy: DiffusionPolicy, train: BatchSource, held_out: BatchSource, options: Mapping[str, Any]
    ) -> Fitted:
        """What it needs to know of the demonstrations: windows that were trained on, and others to calibrate on.

        options: of `options.extensions`, by name. Raises `InputError` for demonstrations that are too few.
        """
        raise NotImplementedError


def sampler_words(policy: DiffusionPolicy) -> dict[str, Any]:
    """How a policy samples, for extensions that are fitted to it: to store in `Fitted.options["sampler"]`."""
    sampler = policy.sampler
    options = {name: value for name, value in sampler.options.items() if value is not None}
    words = {"scheduler": sampler.scheduler, "num_inference_steps": sampler.num_inference_steps, **options}
    return {**words, "clip": sampler.clip, "clip_range": sampler.clip_range}


def check_sampler(name: str, policy: DiffusionPolicy, fitted: Fitted) -> None:
    """`InputError` where `fitted` is for another scheduler, number of steps or option than the policy samples with."""
    was, now = fitted.options.get("sampler"), sampler_words(policy)
    if not isinstance(was, dict):
        raise InputError(f"extension {name}: it is not said which sampler it was fitted to")
    for key in sorted(was.keys() | now.keys()):
        if was.get(key) != now.get(key):
            raise InputError(
                f"extension {name} was fitted to sampler.{key}={shown(was.get(key))}, and the policy samples with "
                f"{shown(now.get(key))}"
            )


def attach(
    policy: DiffusionPolicy,
    bundle: Path,
    names: Iterable[str],
    given: Mapping[str, Mapping[str, Any]] | None = None,
) -> None:
    """Let the extensions `names` of a bundle act in every chunk of `policy`, in this order.

    given: name → options that replace those that it was fitted with; None as a value keeps it.
    Raises `InputError` for a name that nobody has, one that is not fitted, and a file that is damaged or not for this.
    """
    names = list(names)
    if len(set(names)) < len(names):
        raise InputError(f"extensions={names} names one twice")
    found: list[Acting] = [
        EXTENSIONS.load(name, "extensions")(policy, _with(read(bundle, name), (given or {}).get(name, {})))
        for name in names
    ]
    choosing = [name for name, one in zip(names, found, strict=True) if one.candidates > 1]
    if len(choosing) > 1:
        raise InputError(f"extensions: {' and '.join(choosing)} each choose among chunks, and one can")
    policy.extensions = found


def _with(fitted: Fitted, given: Mapping[str, Any]) -> Fitted:
    changes = {key: value for key, value in given.items() if value is not None}
    return replace(fitted, options={**fitted.options, **changes}) if changes else fitted


def weights_hash(bundle: Path) -> str:
    """Of the weights that a fitted extension belongs to."""
    with (Path(bundle) / "model.safetensors").open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write(bundle: Path, name: str, fitted: Fitted) -> Path:
    """Store a fitted extension in a bundle, atomically."""
    path = extension_file(bundle, name)
    header = {"options": json.dumps(dict(fitted.options), allow_nan=False), "weights": weights_hash(bundle)}
    with atomic_path(path) as temporary:
        save_file(
            {key: np.ascontiguousarray(value) for key, value in fitted.arrays.items()}, temporary, metadata=header
        )
    return path


def _refuse(word: str) -> None:
    raise ValueError(f"{word} is no number")


def read(bundle: Path, name: str) -> Fitted:
    """What `write` stored. Raises `InputError`."""
    require_extensions(bundle, [name])
    path = extension_file(bundle, name)
    if path.stat().st_size > MOST_BYTES:
        raise InputError(f"{path} has {path.stat().st_size >> 20} MiB, at most {MOST_BYTES >> 20} can be")
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            header = file.metadata() or {}
            arrays = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        options = json.loads(header["options"], parse_constant=_refuse)
    except (safetensors.SafetensorError, OSError, KeyError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: not a fitted extension: {str(error)[:200]}") from None
    if not isinstance(options, dict):
        raise InputError(f"{path}: its options are no mapping")
    for key, value in arrays.items():
        if value.dtype.kind == "f" and not np.isfinite(value).all():
            raise InputError(f"{path}: {key!r} holds NaN or infinity")
    if header.get("weights") != weights_hash(bundle):
        raise InputError(f"{path} was fitted to other weights: action-diffusion fit {name} bundle={bundle}")
    return Fitted(options, arrays, header["weights"])
