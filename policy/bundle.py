"""The policy bundle: everything needed to run a policy, in one folder of inert files.

    model.safetensors    weights (the EMA of training)
    config.yaml          the resolved configuration; its `policy` part is built from registered names only
    spec.json            observations, cameras, action, rates, normaliser statistics, versions
    golden.safetensors   an input and the chunk it gave, to verify a copy on another machine
    episodes.safetensors hashes of the episodes that it was trained on, and of those held out: `training.episodes`
    extensions/          what was fitted to it afterwards: `policy.extensions`

Loading executes nothing that came with the folder.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import torch
import yaml
from safetensors.numpy import load_file as load_numpy
from safetensors.numpy import save_file as save_numpy
from safetensors.torch import load_file, save_file

from action_diffusion.errors import InputError
from action_diffusion.options.policy import with_sampler
from action_diffusion.policy.build import build_policy, check_sections, check_statistics
from action_diffusion.policy.extensions.extension import Fitted, attach, write
from action_diffusion.policy.kernels import accelerate
from action_diffusion.policy.policy import CRITICS, DiffusionPolicy
from action_diffusion.policy.reading import (
    GOLDEN_TOLERANCE,
    acting,
    read_config,
    read_spec,
    refuse_targets,
    require,
    versions,
)
from action_diffusion.policy.spec import action_span
from action_diffusion.registry import required

DEVICES = ("cpu", "cuda", "mps", "xpu")
"""Kinds of devices that hold numbers: torch names some that do not."""


def save(
    path: str | Path,
    policy: DiffusionPolicy,
    config: Mapping[str, Any],
    *,
    weights: Mapping[str, torch.Tensor] | None = None,
    golden_obs: Mapping[str, np.ndarray] | None = None,
    episodes: Mapping[str, np.ndarray] | None = None,
) -> None:
    """Write a bundle, atomically: a reader sees the old folder or the new one.

    weights: to write instead of the policy's own (the EMA). golden_obs: key → [To, …], the input of the golden pair.
    episodes: see above.
    Raises `InputError` when the disk is full; what was there before stays.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    refuse_targets(config, "config")
    folder = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
    try:
        state = {k: v.detach().cpu().contiguous() for k, v in (weights or policy.state_dict()).items()}
        acting = {name: value for name, value in state.items() if not name.startswith(CRITICS)}
        save_file(acting, folder / "model.safetensors")
        (folder / "config.yaml").write_text(yaml.safe_dump(dict(config), sort_keys=False))
        encoders = [text.encoder for text in policy.spec.texts.values()]
        spec = replace(policy.spec, requires=required(config.get("policy") or {}, policy.spec.env, encoders))
        (folder / "spec.json").write_text(json.dumps(spec.to_json(), indent=1) + "\n")
        if golden_obs is not None:
            save_numpy(_golden(policy, state, golden_obs), folder / "golden.safetensors")
        if episodes is not None:
            save_numpy(dict(episodes), folder / "episodes.safetensors")
        for file in folder.iterdir():
            _sync(file)
        folder.chmod(0o755)
        _replace(folder, path)
    except (OSError, safetensors.SafetensorError) as error:
        raise InputError(f"could not write the bundle {path}: {error}; what was there before is kept") from None
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def load(
    path: str | Path,
    device: str | torch.device = "cpu",
    *,
    verify: bool = False,
    sampler: Mapping[str, Any] | None = None,
    extensions: Sequence[str] | None = None,
    given: Mapping[str, Mapping[str, Any]] | None = None,
    precision: str | None = None,
    compile: bool = False,
    cuda_graph: bool = False,
) -> DiffusionPolicy:
    """Load a policy from a bundle folder, ready to `predict`.

    verify: also compute the golden pair and compare. sampler: values that replace those of the bundle's sampler
    (scheduler, num_inference_steps, …), within the family that it was trained with. extensions: names of what acts
    while chunks are made (`policy.extensions`), in order; None: what the bundle itself says. given: name → options of
    these that replace those that they were fitted with. precision, compile, cuda_graph: faster ways to denoise, see
    `kernels.accelerate`; the golden pair is compared without them.
    Raises `InputError` naming the file and what is wrong with it.
    """
    path = Path(path)
    require(path)
    spec, config = read_spec(path), read_config(path)
    policy_config = config.get("policy")
    if not isinstance(policy_config, dict):
        raise InputError(f"{path / 'config.yaml'}: no 'policy' section")
    with _named(path / "config.yaml"):
        check_sections(policy_config)
    own = policy_config["sampler"]
    policy_config = with_sampler(policy_config, sampler or {})
    encoder = policy_config.get("encoder")
    if isinstance(encoder, dict) and encoder.get("weights"):  # initial weights from a file were only for training
        policy_config = policy_config | {"encoder": encoder | {"weights": None}}
    with _named(path / "config.yaml", unless=None if policy_config["sampler"] == own else "sampler"):
        policy = build_policy(policy_config, spec)
    load_weights(policy, path)
    with _named(path / "spec.json"):
        check_statistics(policy)
    policy = policy.to(resolve_device(device)).eval()
    if verify:
        verify_golden(policy, path)
    attach(policy, path, acting(path, extensions), given)
    accelerate(policy, precision=precision, compile=compile, cuda_graph=cuda_graph)
    return policy


def derive(
    source: Path,
    path: Path,
    *,
    sampler: Mapping[str, Any] | None = None,
    fitted: Mapping[str, Fitted] | None = None,
    weights: Mapping[str, torch.Tensor] | None = None,
) -> None:
    """Write a bundle, atomically, that is `source` but for what is given.

    sampler: values that replace those of its sampler. fitted: extensions, by name, which act in it from then on unless
    others are asked for. weights: instead of its own; what was fitted to those is then left out.
    Raises `InputError` for a source that cannot be loaded, and when the disk is full; what was there before stays.
    """
    source, path = Path(source), Path(path)
    config, own = read_config(source), source / "golden.safetensors"
    policy = load(source, sampler=sampler, extensions=())
    config["policy"] = with_sampler(config["policy"], sampler or {})
    golden = load_numpy(own) if own.is_file() else {}
    path.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
    try:
        kept = ["spec.json", *(("episodes.safetensors",) if (source / "episodes.safetensors").is_file() else ())]
        kept += ["model.safetensors"] if weights is None else []
        if weights is None and (source / "extensions").is_dir():
            (folder / "extensions").mkdir()
            kept += [f"extensions/{file.name}" for file in sorted((source / "extensions").glob("*.safetensors"))]
        for name in kept:
            shutil.copyfile(source / name, folder / name)
        state = {k: v.detach().cpu().contiguous() for k, v in (weights or policy.state_dict()).items()}
        if weights is not None:
            save_file(state, folder / "model.safetensors")
        if golden:
            seen = {key.removeprefix("obs."): value for key, value in golden.items() if key.startswith("obs.")}
            save_numpy(_golden(policy, state, seen), folder / "golden.safetensors")
        if fitted or weights is not None:
            config["extensions"] = list(fitted or {})
        (folder / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
        for name, one in (fitted or {}).items():
            write(folder, name, one)
        for file in folder.rglob("*"):
            if file.is_file():
                _sync(file)
        folder.chmod(0o755)
        _replace(folder, path)
    except (OSError, safetensors.SafetensorError) as error:
        raise InputError(f"could not write the bundle {path}: {error}; what was there before is kept") from None
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def load_weights(policy: DiffusionPolicy, path: Path, *, new: tuple[str, ...] = ()) -> None:
    """Copy a bundle's weights into a policy of the same shapes; `InputError` names the first that differs.

    new: beginnings of names, of weights that the policy may have and the bundle may lack: they stay as they are.
    """
    file = Path(path) / "model.safetensors"
    require(Path(path))
    try:
        state = load_file(file)
    except (safetensors.SafetensorError, OSError) as error:
        raise InputError(f"{file}: not a readable safetensors file: {error}") from None
    own = policy.state_dict()
    state |= {name: value for name, value in own.items() if name.startswith(new) and name not in state}
    for name in sorted(own.keys() ^ state.keys()):
        side = "lacks" if name in own else "has an extra"
        raise InputError(f"{file} {side} weight {name!r}: it does not belong to the policy configured here")
    for name, value in own.items():
        if value.shape != state[name].shape:
            raise InputError(
                f"{file}: weight {name!r} has shape {list(state[name].shape)}, the configured policy has "
                f"{list(value.shape)}"
            )
    policy.load_state_dict(state)


def verify_golden(policy: DiffusionPolicy, path: Path) -> float:
    """Compare the golden pair with what the policy computes here; returns the largest difference over the range."""
    file = Path(path) / "golden.safetensors"
    if not file.is_file():
        raise InputError(f"{file} is missing, so the bundle cannot be verified")
    try:
        golden = load_numpy(file)
    except (safetensors.SafetensorError, OSError) as error:
        raise InputError(f"{file}: not a readable safetensors file: {error}") from None
    chunk = (policy.spec.horizon, *policy.spec.action.shape)
    for name, expected in (("noise", (1, *policy.spec.noise_shape)), ("action_pred", chunk)):
        if name not in golden or golden[name].shape != expected:
            raise InputError(f"{file}: no {name!r} of shape {list(expected)}, so the bundle cannot be verified")
    obs = {key.removeprefix("obs."): value for key, value in golden.items() if key.startswith("obs.")}
    found = policy.predict(obs, noise=golden["noise"], generator=torch.Generator(policy.device).manual_seed(0))
    span = np.maximum(action_span(policy.spec), 1e-6)
    difference = float((np.abs(found["action_pred"] - golden["action_pred"]) / span).max())
    if not difference <= GOLDEN_TOLERANCE:
        raise InputError(
            f"{path}: the golden input gives a chunk that differs by {difference:.2g} of the action range "
            f"(at most {GOLDEN_TOLERANCE:g}): the weights or a library changed"
        )
    return difference


def resolve_device(device: str | torch.device) -> torch.device:
    """A torch device that exists here; "auto" is the first GPU, or the CPU. `InputError` where there is none."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        resolved = torch.device(device)
        if resolved.type not in DEVICES:
            raise RuntimeError(f"of {', '.join(DEVICES)} it is none")
        torch.empty(1, device=resolved)
    except (RuntimeError, AssertionError) as error:
        present = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
        reason = str(error).strip().splitlines()[0]
        raise InputError(f"device={device} is not there ({reason}): choose from {', '.join(present)}") from None
    return resolved


@contextmanager
def _named(file: Path, unless: str | None = None) -> Iterator[None]:
    """Errors say which file they are about. unless: the first word of those that are about what was given beside it."""
    try:
        yield
    except InputError as error:
        if unless is not None and str(error).startswith(unless):
            raise
        raise InputError(f"{file}: {error}") from None


def _golden(policy: DiffusionPolicy, state: Mapping[str, Any], obs: Mapping[str, np.ndarray]) -> dict[str, Any]:
    own = {key: value.clone() for key, value in policy.state_dict().items()}
    training = policy.training
    policy.load_state_dict(dict(state))
    policy.eval()
    noise = np.random.default_rng(0).standard_normal((1, *policy.spec.noise_shape)).astype(np.float32)
    chunk = policy.predict(obs, noise=noise, generator=torch.Generator(policy.device).manual_seed(0))
    policy.load_state_dict(own)
    policy.train(training)
    inputs = {f"obs.{key}": np.ascontiguousarray(value) for key, value in obs.items()}
    return inputs | {"noise": noise, "action_pred": np.ascontiguousarray(chunk["action_pred"])}


def _replace(folder: Path, path: Path) -> None:
    """Rename `folder` to `path`, moving an existing folder out of the way first."""
    if not path.exists():
        os.replace(folder, path)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{path.name}-old-", dir=path.parent))
    os.replace(path, old / "bundle")
    os.replace(folder, path)
    shutil.rmtree(old, ignore_errors=True)


def _sync(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


__all__ = [
    "derive",
    "load",
    "load_weights",
    "read_config",
    "read_spec",
    "resolve_device",
    "save",
    "verify_golden",
    "versions",
]
