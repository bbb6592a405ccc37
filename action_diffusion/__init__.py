"""Demonstrations in, a diffusion policy that works on a real arm out.

The folders at the root of the repository are its packages: `policy`, `datasets`, `envs`, `training`,
`deploy` and `configs` install as `action_diffusion.<folder>`, and are imported when first used.

`datasets` has no `__init__.py`, so that nothing run from the root can mistake it for the Hugging Face
package of that name. Its module is made here instead, and the names that it offers are attached to it.
"""

from __future__ import annotations

import importlib
import sys
from importlib.machinery import ModuleSpec
from importlib.util import module_from_spec
from pathlib import Path
from typing import Any

__version__ = "0.1.0"

_PACKAGES = ("policy", "datasets", "envs", "training", "deploy", "configs")
_DATASETS = {
    "ReplayBuffer": "action_diffusion.datasets.storage.replay_buffer",
    "Batch": "action_diffusion.datasets.batches.loader",
    "BatchSource": "action_diffusion.datasets.batches.loader",
}


def _dataset_attribute(name: str) -> Any:
    if name not in _DATASETS:
        raise AttributeError(f"module 'action_diffusion.datasets' has no attribute {name!r}")
    return getattr(importlib.import_module(_DATASETS[name]), name)


def _make_datasets() -> None:
    """Put `action_diffusion.datasets` in place: beside this file in a wheel, one folder up in a checkout."""
    here = Path(__file__).resolve().parent
    spec = ModuleSpec("action_diffusion.datasets", None, is_package=True)
    spec.submodule_search_locations = [
        str(folder) for folder in (here / "datasets", here.parent / "datasets") if folder.is_dir()
    ]
    module = module_from_spec(spec)
    module.__dict__["__getattr__"] = _dataset_attribute
    sys.modules[spec.name] = module


_make_datasets()


def __getattr__(name: str) -> Any:
    if name in _PACKAGES:
        return importlib.import_module(f"action_diffusion.{name}")
    raise AttributeError(f"module 'action_diffusion' has no attribute {name!r}")
