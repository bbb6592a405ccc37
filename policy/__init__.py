"""Networks, the diffusion process, the sampler, normalisation and the policy bundle.

policy = action_diffusion.policy.load("outputs/bundle")
policy.predict({"state": states})["action"]          # states [To, 5] → actions [Ta, 2]
"""

from __future__ import annotations

import importlib
from typing import Any

_NAMES = {
    "load": "opening",
    "save": "bundle",
    "DiffusionPolicy": "policy",
    "Sample": "sample",
    "PolicySpec": "spec",
    "Agent": "agent",
    "Hook": "diffusion.sampler",
    "Sampler": "diffusion.sampler",
    "StepState": "diffusion.sampler",
    "StopSampling": "diffusion.sampler",
}


def __getattr__(name: str) -> Any:
    if name not in _NAMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_NAMES[name]}"), name)
