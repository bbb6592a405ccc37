"""What a run of `finetune` goes on with: networks, optimisers, rows and numbers, written atomically, without pickle.

DIR/checkpoint/tensors.safetensors    method.<module>.<weight>, optimizer.<name>.…, rows.<name>
DIR/checkpoint/state.json             how far it is
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import load_file, save_file

from action_diffusion.errors import InputError
from action_diffusion.training.checkpoints import flatten_optimizer, restore_optimizer
from action_diffusion.training.reward.method import Method


def save(folder: Path, method: Method, state: dict[str, Any]) -> None:
    """Replace the checkpoint in `folder`. Raises `InputError` when the disk is full; the one before stays."""
    tensors = {f"method.{name}": value for name, value in method.state().items()}
    tensors |= {f"rows.{name}": value for name, value in method.rows.state().items()}
    tensors["random"] = method.random.get_state()
    numbers = {}
    for name, optimizer in method.optimizers.items():
        found, numbers[name] = flatten_optimizer(optimizer)
        tensors |= {f"optimizer.{name}.{key}": value for key, value in found.items()}
    partial = Path(tempfile.mkdtemp(prefix=".saving-", dir=folder.parent))
    try:
        save_file(
            {key: value.detach().cpu().contiguous() for key, value in tensors.items()}, partial / "tensors.safetensors"
        )
        (partial / "state.json").write_text(json.dumps(state | {"optimizers": numbers}, indent=1))
        for file in partial.iterdir():
            with file.open("rb") as handle:
                os.fsync(handle.fileno())
        partial.chmod(0o755)
        old = partial.with_name(f".removing-{partial.name}")
        if folder.exists():
            os.replace(folder, old)
        os.replace(partial, folder)
        shutil.rmtree(old, ignore_errors=True)
    except (OSError, safetensors.SafetensorError) as error:
        raise InputError(f"could not write the checkpoint {folder}: {error}; the one before is kept") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def load(folder: Path, method: Method) -> dict[str, Any]:
    """Put a checkpoint back into a method of the same options; returns its state. Raises `InputError`."""
    try:
        tensors, state = load_file(folder / "tensors.safetensors"), json.loads((folder / "state.json").read_text())
        method.restore(_part(tensors, "method."))
        for name, optimizer in method.optimizers.items():
            restore_optimizer(optimizer, _part(tensors, f"optimizer.{name}."), state["optimizers"][name])
        rows = _part(tensors, "rows.")
        if rows:
            method.rows.add(rows)
        method.random.set_state(tensors["random"])
        found: dict[str, Any] = state
        return found
    except (OSError, ValueError, KeyError, RuntimeError, safetensors.SafetensorError) as error:
        raise InputError(f"checkpoint {folder} does not fit this run: {str(error)[:200]}") from None


def _part(tensors: dict[str, torch.Tensor], beginning: str) -> dict[str, torch.Tensor]:
    return {key.removeprefix(beginning): value for key, value in tensors.items() if key.startswith(beginning)}
