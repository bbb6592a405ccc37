"""Options of `action-diffusion train`, and what evaluation takes of a bundle's configuration."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import Annotated, Any

from action_diffusion.errors import InputError
from action_diffusion.options.policy import Policy
from action_diffusion.options.task import Sentence, Task
from action_diffusion.options.words import Device, Plugins, Seed, Word, Workers
from action_diffusion.schema import Above, Between, FilePath, Matching, OneOf, Sized, check, hints

Every = Annotated[int, Between(0, 1_000_000_000)]
"""So many steps; 0 turns it off."""
Part = Annotated[int, Between(1, 1024)]
Beta = Annotated[float, Between(0, below=1)]


@dataclass
class TrainSettings:
    """`train.*` of the configuration.

    Exactly one budget ends a run: max_steps (optimiser steps), max_epochs or max_minutes (wall clock of training,
    validation and rollouts; the final evaluation is not counted). With several, the first to be reached.

    Raises `InputError` for a value of another type or out of its range, and without a budget.
    """

    max_minutes: Annotated[float, Above(0, 1e6)] | None = None
    max_steps: Annotated[int, Above(0, 1_000_000_000)] | None = None
    max_epochs: Annotated[float, Above(0, 1e6)] | None = None
    batch_size: Annotated[int, Between(1, 1_000_000)] = 256
    gradient_accumulation_steps: Part = 1
    mixed_precision: Annotated[str, OneOf("no", "bf16", "fp16", "auto")] = "no"
    num_processes: Part = 1
    host_timeout: Annotated[float, Between(5, 86_400)] = 30  # seconds
    lr: Annotated[float, Above(0, 1e30)] = 1e-3
    weight_decay: Annotated[float, Between(0, 1e6)] = 1e-4
    betas: tuple[Beta, Beta] = (0.9, 0.95)
    lr_schedule: Annotated[str, OneOf("cosine", "constant")] = "cosine"
    warmup: Every = 100
    lr_final: Annotated[float, Between(0, 1)] = 0.0
    max_grad_norm: Annotated[float, Between(0, 1e30)] = 1.0
    ema_power: Annotated[float, Above(0, 10)] = 0.75
    ema_max_decay: Annotated[float, Between(0, 1)] = 0.9999
    log_every: Annotated[int, Between(1, 10)] = 10  # metrics.jsonl promises that
    validate_every: Every = 500
    rollout_every: Every = 2000
    rollout_episodes: Part = 10
    checkpoint_every: Every = 1000
    keep_best: Annotated[int, Between(0, 100_000)] = 2
    compile: bool = False
    cuda_graph: bool = False
    tensorboard: bool = True
    wandb: bool = False
    wandb_project: str = "action-diffusion"

    def __post_init__(self) -> None:
        for name, hint in hints(TrainSettings).items():
            setattr(self, name, check(getattr(self, name), hint, f"train.{name}"))
        if self.max_minutes is None and self.max_steps is None and self.max_epochs is None:
            raise InputError("a run needs a budget: train.max_steps, train.max_epochs or train.max_minutes")


MOST_BUFFERS = 64
"""Together."""
MOST_PARTS = 1024
"""Tasks or subsets that have weights."""
Data = FilePath | Annotated[list[FilePath], Sized(1, MOST_BUFFERS)]
"""What `data=` names, see `datasets.batches.sources`; several are trained on together."""
Drop = Annotated[list[Word], Matching("names in brackets, such as [wrist,front]", bool)]
"""Names of observations that are not learnt from."""


Weight = Annotated[float, Between(0, 1e6)]


@dataclass
class Dataset:
    """`dataset.*` of train. weights: how many windows are drawn of each data set, beside each other; of tasks and
    subsets likewise.

    Raises `InputError` for several kinds of weights, and for weights that are all 0.
    """

    val_fraction: Annotated[float, Between(0, below=1)] = 0.05
    max_episodes: Annotated[int, Between(1)] | None = None
    subset: Word | None = None
    weights: Annotated[list[Weight], Sized(1, MOST_BUFFERS)] | None = None
    task_weights: Annotated[dict[str, Weight], Sized(1, MOST_PARTS)] | None = None
    subset_weights: Annotated[dict[str, Weight], Sized(1, MOST_PARTS)] | None = None
    memory_gb: Annotated[float, Between(0, 1e6)] | None = None
    images: Annotated[str, OneOf("auto", "memory", "disk", "decode")] = "auto"
    cache_gb: Annotated[float, Between(0.001, 1e6)] = 10.0
    cache_dir: FilePath | None = None
    val_windows: Annotated[int, Between(1, 1_000_000)] = 128

    def __post_init__(self) -> None:
        kinds = ("weights", "task_weights", "subset_weights")
        given = {f"dataset.{kind}": value for kind in kinds if (value := getattr(self, kind)) is not None}
        if len(given) > 1:
            raise InputError(f"{' and '.join(given)} are both given: a window is drawn by one of them")
        for name, value in given.items():
            if not any(value.values() if isinstance(value, dict) else value):
                raise InputError(f"{name}: all weights are 0, so that nothing would be drawn")


@dataclass
class Evaluation:
    """`evaluation.*` of train: the final one."""

    n_episodes: Annotated[int, Between(0, 100_000)] = 50
    seed: Seed = 100_000
    n_envs: Annotated[int, Between(1, 4096)] | None = None
    policy_batch: Annotated[int, Between(1, 4096)] | None = None
    n_videos: Annotated[int, Between(0, 1000)] = 6
    instruction: Sentence | None = None


@dataclass(kw_only=True)
class Train:
    """`action-diffusion train`."""

    data: Data
    drop: Drop | None = None
    output_dir: FilePath | None = None
    seed: Seed = 0
    device: Device = "auto"
    plugins: Plugins = None
    resume: bool = False
    init: FilePath | None = None
    workers: Workers | None = None
    dataset: Dataset = field(default_factory=Dataset)
    train: TrainSettings
    policy: Policy
    evaluation: Evaluation = field(default_factory=Evaluation)
    task: Task
    text_model: FilePath | None = None


@dataclass(kw_only=True)
class BundleConfig:
    """What evaluation takes of a bundle's `config.yaml`, beside the policy: the data that it was trained on."""

    data: Data | None
    seed: Seed
    dataset: Dataset
    task: Task
    drop: Drop | None = None


def plain(config: Train) -> dict[str, Any]:
    """A typed configuration as the command line would give it. Raises `InputError` for a value that cannot be."""
    data: dict[str, Any] = json.loads(json.dumps(asdict(config)))
    sampler = data["policy"]["sampler"]
    data["policy"]["sampler"] = {name: value for name, value in sampler.items() if value is not None}
    check(data, Train)
    return data
