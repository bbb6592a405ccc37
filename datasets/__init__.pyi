"""The names of this package for type checkers; at run time `action_diffusion/__init__.py` attaches them."""

from action_diffusion.datasets.batches.loader import Batch as Batch
from action_diffusion.datasets.batches.loader import BatchSource as BatchSource
from action_diffusion.datasets.storage.replay_buffer import ReplayBuffer as ReplayBuffer
