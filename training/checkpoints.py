"""Checkpoints: everything that a run needs to go on bit-exactly, written atomically, without pickle.

DIR/checkpoints/step_00002000/
    weights.safetensors      the weights being trained
    optimizer.safetensors    moments and step counts of the optimiser
    state.json               step, elapsed time, EMA step, accelerate's loss scale, what the best k are judged by
    bundle/                  the EMA at this step, a complete policy bundle
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import load_file, save_file

from action_diffusion.errors import InputError


def checkpoint_folders(output_dir: Path) -> list[Path]:
    """All complete checkpoints, oldest first. A checkpoint gets its name only when it is complete."""
    return sorted((output_dir / "checkpoints").glob("step_*"))


def save_checkpoint(
    output_dir: Path,
    *,
    step: int,
    weights: dict[str, torch.Tensor],
    optimizer: torch.optim.Optimizer,
    state: dict[str, Any],
    write_bundle: Callable[[Path], None],
) -> Path:
    """Write the checkpoint of `step`. Raises `InputError` when the disk is full; earlier checkpoints stay."""
    root = output_dir / "checkpoints"
    path = root / f"step_{step:08d}"
    root.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=".saving-", dir=root))
    try:
        tensors, numbers = flatten_optimizer(optimizer)
        save_file(_unshare(weights), folder / "weights.safetensors")
        save_file(tensors, folder / "optimizer.safetensors")
        (folder / "state.json").write_text(json.dumps(state | {"step": step, "optimizer": numbers}, indent=1))
        write_bundle(folder / "bundle")
        for file in folder.iterdir():
            if file.is_file():
                with file.open("rb") as handle:
                    os.fsync(handle.fileno())
        folder.chmod(0o755)
        if path.exists():
            shutil.rmtree(path)
        os.replace(folder, path)
    except (OSError, safetensors.SafetensorError) as error:
        raise InputError(f"could not write the checkpoint {path}: {error}; earlier checkpoints are kept") from None
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return path


def load_checkpoint(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], dict[str, Any]]:
    """(weights, optimiser tensors, state) of a checkpoint; `InputError` names a file that cannot be read."""
    try:
        state = json.loads((path / "state.json").read_text())
        return load_file(path / "weights.safetensors"), load_file(path / "optimizer.safetensors"), state
    except (OSError, ValueError, safetensors.SafetensorError) as error:
        raise InputError(
            f"checkpoint {path} cannot be read: {error}; remove it to resume from an earlier one"
        ) from None


def load_weights(file: Path) -> dict[str, torch.Tensor]:
    """Tensors of a safetensors file by name."""
    try:
        return load_file(file)
    except (OSError, safetensors.SafetensorError) as error:
        raise InputError(
            f"{file} cannot be read: {error}; remove its checkpoint to resume from an earlier one"
        ) from None


def restore_optimizer(
    optimizer: torch.optim.Optimizer, tensors: dict[str, torch.Tensor], numbers: dict[str, Any]
) -> None:
    """Put back what `save_checkpoint` took, in place."""
    state: dict[int, dict[str, Any]] = {}
    for name, value in tensors.items():
        index, key = name.split(".", 1)
        state.setdefault(int(index), {})[key] = value
    groups = optimizer.state_dict()["param_groups"]
    for group, saved in zip(groups, numbers["param_groups"], strict=True):
        group.update({key: tuple(v) if isinstance(v, list) and key == "betas" else v for key, v in saved.items()})
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def prune(output_dir: Path, *, keep_best: int) -> None:
    """Remove all checkpoints but the newest, and the best `keep_best` by their own "figure of merit"."""
    folders = checkpoint_folders(output_dir)
    merits = {}
    for folder in folders[:-1]:
        merit = json.loads((folder / "state.json").read_text()).get("merit")
        merits[folder] = float("-inf") if merit is None else float(merit)
    ranked = sorted(merits, key=lambda folder: (merits[folder], folder.name), reverse=True)
    for folder in ranked[keep_best:]:
        # Renamed first, so that a kill in the middle leaves no folder that looks complete.
        doomed = folder.with_name(f".removing-{folder.name}")
        os.replace(folder, doomed)
        shutil.rmtree(doomed, ignore_errors=True)


def clean(output_dir: Path) -> None:
    """Remove what an interrupted save or removal left behind."""
    for leftover in (output_dir / "checkpoints").glob(".*"):
        shutil.rmtree(leftover, ignore_errors=True)


def flatten_optimizer(optimizer: torch.optim.Optimizer) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    state = optimizer.state_dict()
    tensors = {
        f"{index}.{key}": value.detach().cpu().contiguous()
        for index, values in state["state"].items()
        for key, value in values.items()
    }
    plain = (int, float, bool, str, list, tuple, type(None))
    groups = [
        {k: v for k, v in group.items() if k not in ("params", "lr") and isinstance(v, plain)}
        for group in state["param_groups"]
    ]
    return tensors, {"param_groups": groups}


def _unshare(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: value.detach().cpu().contiguous() for name, value in weights.items()}
