"""The plain values of a training run, typed, so that a misspelt or mistyped one is named before anything starts."""

from __future__ import annotations

from dataclasses import dataclass

from action_diffusion.errors import InputError


@dataclass
class TrainSettings:
    """`train.*` of the configuration.

    Exactly one budget ends a run: max_steps (optimiser steps), max_epochs or max_minutes (wall clock of training,
    validation and rollouts; the final evaluation is not counted). With several, the first to be reached.
    """

    max_minutes: float | None = None
    max_steps: int | None = None
    max_epochs: float | None = None
    batch_size: int = 256
    gradient_accumulation_steps: int = 1
    mixed_precision: str = "no"
    num_processes: int = 1
    lr: float = 1e-3
    weight_decay: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.95)
    lr_schedule: str = "cosine"
    warmup: int = 100
    lr_final: float = 0.0
    max_grad_norm: float = 1.0
    ema_power: float = 0.75
    ema_max_decay: float = 0.9999
    log_every: int = 10
    validate_every: int = 500
    rollout_every: int = 2000
    rollout_episodes: int = 10
    checkpoint_every: int = 1000
    keep_best: int = 2
    compile: bool = False
    cuda_graph: bool = False
    tensorboard: bool = True
    wandb: bool = False
    wandb_project: str = "action-diffusion"

    def __post_init__(self) -> None:
        if self.max_minutes is None and self.max_steps is None and self.max_epochs is None:
            raise InputError("a run needs a budget: train.max_steps, train.max_epochs or train.max_minutes")
        for name in ("max_minutes", "max_steps", "max_epochs"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise InputError(f"train.{name}={value} must be above 0")
        for name in ("batch_size", "gradient_accumulation_steps", "num_processes", "log_every"):
            if getattr(self, name) < 1:
                raise InputError(f"train.{name}={getattr(self, name)} must be at least 1")
        for name in ("lr", "ema_power"):
            if not getattr(self, name) > 0:
                raise InputError(f"train.{name}={getattr(self, name)} must be above 0")
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise InputError(f"train.betas={list(self.betas)} must be two numbers of at least 0 and below 1")
        if self.log_every > 10:
            raise InputError(f"train.log_every={self.log_every} must be at most 10: metrics.jsonl promises that")
        for name in (
            "checkpoint_every",
            "validate_every",
            "rollout_every",
            "keep_best",
            "warmup",
            "weight_decay",
            "max_grad_norm",
        ):
            if getattr(self, name) < 0:
                raise InputError(f"train.{name}={getattr(self, name)} must not be negative (0 turns it off)")
        for name, choices in {
            "mixed_precision": ("no", "bf16", "fp16", "auto"),
            "lr_schedule": ("cosine", "constant"),
        }.items():
            if getattr(self, name) not in choices:
                raise InputError(f"train.{name}={getattr(self, name)}: choose from {', '.join(choices)}")
