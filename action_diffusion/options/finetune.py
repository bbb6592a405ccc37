"""Options of `action-diffusion finetune`: what every method takes, and what each takes beside."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

from action_diffusion.options.policy import AnySampler
from action_diffusion.options.task import Sentence
from action_diffusion.options.words import MOST_STEPS, Count, Device, Plugins, Seed, Workers
from action_diffusion.schema import Above, Between, ByName, FilePath, OneOf, Section, Sized

Layers = Annotated[list[Annotated[int, Between(1, 8192)]], Sized(1, 8)]
Rate = Annotated[float, Above(0, 1)]
Frequencies = Annotated[int, Between(1, MOST_STEPS)]
Octaves = Annotated[int, Between(0, 16)]
Rows = Annotated[int, Between(1, 10_000_000)]


@dataclass
class Critics:
    """What methods with critics of chunks share. hidden: sizes of their layers. octaves: waves beside each value of a
    condition. members: of each ensemble, of which the least counts. updates: for each chunk that was tried. follow:
    share that targets move by. warmup: chunks before the first update. capacity: rows that are kept. optimizer: of the
    critics; "adamo" where they run away (`training.reward.optimizers`)."""

    hidden: Layers = field(default_factory=lambda: [256, 256])
    octaves: Octaves = 4
    members: Annotated[int, Between(1, 64)] = 2
    updates: Annotated[float, Above(0, 1000)] = 1.0
    batch_size: Annotated[int, Between(2, 65_536)] = 128
    lr: Rate = 3e-4
    follow: Rate = 0.005
    warmup: Annotated[int, Between(1, 1_000_000)] = 500
    capacity: Rows = 200_000
    optimizer: Annotated[str, OneOf("adam", "adamo")] = "adam"


@dataclass
class DsrlSacOptions(Critics):
    """`method=dsrl_sac`, see `training.reward.methods.dsrl_sac`."""

    frequencies: Frequencies = 2
    bound: Annotated[float, Above(0, 100)] = 3.0
    decoded: Annotated[int, Between(1, 256)] = 4
    expectile: Annotated[float, Between(0.5, below=1)] = 0.7
    entropy: Annotated[float, Between(-100, 100)] = 0.0


@dataclass
class DsrlOptions:
    """`method=dsrl`, see `training.reward.methods.dsrl`."""

    frequencies: Frequencies = 2
    bound: Annotated[float, Above(0, 100)] = 4.0
    deviation: Annotated[float, Between(0.05, 2.5)] = 2.0
    chunks: Annotated[int, Between(2, 1_000_000)] = 1024
    clip: Annotated[float, Above(0, 1)] = 0.2
    gae: Annotated[float, Between(0, 1)] = 0.95
    epochs: Annotated[int, Between(1, 1000)] = 8
    batch_size: Annotated[int, Between(2, 65_536)] = 512
    lr: Rate = 1e-3
    critic_lr: Rate = 1e-3
    most_kl: Annotated[float, Above(0, 1e6)] = 0.1
    hidden: Layers = field(default_factory=lambda: [256, 256])
    octaves: Octaves = 4


@dataclass
class IdqlOptions(Critics):
    """`method=idql`, see `training.reward.methods.idql`."""

    n: Annotated[int, Between(2, 1024)] = 16
    tried: Annotated[int, Between(1, 256)] = 4
    expectile: Annotated[float, Between(0.5, below=1)] = 0.7
    drawn: Annotated[int, Between(0, 1024)] = 0


@dataclass
class FmqOptions(Critics):
    """`method=fmq`, see `training.reward.methods.fmq`."""

    step: Annotated[float, Above(0, 10)] = 0.05
    radius: Annotated[float, Above(0, 10)] = 0.3
    policy_lr: Rate = 1e-4


@dataclass
class FisherOptions(Critics):
    """`method=fisher`, see `training.reward.methods.fisher`."""

    metric: Annotated[str, OneOf("fisher", "euclidean")] = "fisher"
    divergence: Annotated[float, Above(0, 100)] = 0.02
    scores: Annotated[int, Between(1, 256)] = 8
    noise: Rate = 0.2
    bound: Annotated[float, Above(0, 10)] = 0.5
    damping: Annotated[float, Between(0, 1)] = 0.01


@dataclass
class DppoOptions:
    """`method=dppo`, see `training.reward.methods.dppo`."""

    chunks: Annotated[int, Between(2, 1_000_000)] = 1024
    trained: Annotated[int, Between(1, MOST_STEPS)] | None = None
    floor: Annotated[float, Above(0, 10)] = 0.03
    clip: Annotated[float, Above(0, 1)] = 0.1
    denoising_discount: Annotated[float, Above(0, 1)] = 0.95
    gae: Annotated[float, Between(0, 1)] = 0.95
    epochs: Annotated[int, Between(1, 1000)] = 4
    batch_size: Annotated[int, Between(2, 65_536)] = 256
    lr: Rate = 1e-5
    critic_lr: Rate = 1e-3
    most_kl: Annotated[float, Above(0, 1e6)] = 0.02
    hidden: Layers = field(default_factory=lambda: [256, 256])
    octaves: Octaves = 4


METHODS: dict[str, type] = {
    "dppo": DppoOptions,
    "dsrl": DsrlOptions,
    "dsrl_sac": DsrlSacOptions,
    "fisher": FisherOptions,
    "fmq": FmqOptions,
    "idql": IdqlOptions,
}
LEARNT = {"best_of": "idql", "steering": "dsrl", "transport": "fisher"}
"""Extensions that no demonstrations teach, by the method that does."""
MethodSection = Annotated[Section, ByName(METHODS)]


@dataclass
class BudgetSettings:
    """`budget.*`. env_steps: control steps of all simulators together."""

    env_steps: Annotated[int, Between(1, 1_000_000_000)] = 100_000


@dataclass
class Trials:
    """`trials.*`: what is learnt from."""

    reward: Annotated[str, OneOf("both", "success", "dense")] = "both"
    gamma: Annotated[float, Between(0.5, below=1)] = 0.99
    n_envs: Annotated[int, Between(1, 4096)] | None = None
    seed: Seed = 1_000_000


@dataclass
class Watching:
    """`watch.*`: evaluations on the way, of which the best is kept."""

    every: Annotated[int, Between(1, 1_000_000_000)] = 20_000
    n_episodes: Count = 100
    seed: Seed = 200_000


@dataclass
class Final:
    """`evaluation.*`: at the end, beside the policy that it began with; n_episodes=0: none."""

    n_episodes: Annotated[int, Between(0, 100_000)] = 50
    seed: Seed = 100_000
    n_videos: Annotated[int, Between(0, 1000)] = 6


@dataclass(kw_only=True)
class Finetune:
    """`action-diffusion finetune`."""

    bundle: FilePath
    method: MethodSection
    output_dir: FilePath | None = None
    resume: bool = False
    seed: Seed = 0
    plugins: Plugins = None
    device: Device = "auto"
    workers: Workers | None = None
    budget: BudgetSettings = field(default_factory=BudgetSettings)
    trials: Trials = field(default_factory=Trials)
    watch: Watching = field(default_factory=Watching)
    evaluation: Final = field(default_factory=Final)
    checkpoint_every: Annotated[int, Between(1, 1_000_000_000)] = 20_000
    sampler: AnySampler = field(default_factory=AnySampler)
    instruction: Sentence | None = None
    text_model: FilePath | None = None
