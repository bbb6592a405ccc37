"""Every option of every command: its type, and what it may be. No torch is imported here.

A component's options are those of its constructor: `FlowOptions` of `Flow`, in `COMPONENTS` by kind and name
(`policy.registry` builds them; the constructors of plugins check their own). A test holds the two beside each other, as
it does the defaults in `configs/`.
"""

from __future__ import annotations

from action_diffusion.options.commands import (
    COMMANDS,
    Calibration,
    CameraTiming,
    Collect,
    Deploy,
    Evaluate,
    RtcSettings,
    Safety,
    Serve,
    Simulated,
)
from action_diffusion.options.policy import (
    COMPONENTS,
    AnySampler,
    Policy,
    Sampler,
    check_policy,
    check_process,
    check_sampler,
)
from action_diffusion.options.task import (
    Action,
    Environment,
    Observation,
    Rate,
    Sentence,
    Steps,
    Task,
    TextEncoder,
    check_steps,
)
from action_diffusion.options.train import BundleConfig, Dataset, Evaluation, Train, TrainSettings, plain
from action_diffusion.options.words import KINDS, MOST_STEPS, Address, AsTyped, Plugins

__all__ = [
    "COMMANDS",
    "COMPONENTS",
    "KINDS",
    "MOST_STEPS",
    "Action",
    "Address",
    "AnySampler",
    "AsTyped",
    "BundleConfig",
    "Calibration",
    "CameraTiming",
    "Collect",
    "Dataset",
    "Deploy",
    "Environment",
    "Evaluate",
    "Evaluation",
    "Observation",
    "Plugins",
    "Policy",
    "Rate",
    "RtcSettings",
    "Safety",
    "Sampler",
    "Sentence",
    "Serve",
    "Simulated",
    "Steps",
    "Task",
    "TextEncoder",
    "Train",
    "TrainSettings",
    "check_policy",
    "check_process",
    "check_sampler",
    "check_steps",
    "plain",
]
