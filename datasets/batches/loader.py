"""Batches gathered by index: one numpy call an array, no Python a sample.

    windows.rows(indices)  int64 [B, H]
    obs    = array[rows[:, :To]]      [B, To, ...]     the last of them is "now"
    action = array[rows]              [B, H, A]
    mask   = is it a row of the episode, or padding    [B, H]

Images stay uint8 until the policy has them on its device, and are cropped while they are gathered: only the crop is
copied.
"""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from action_diffusion.datasets.batches import pixels
from action_diffusion.datasets.batches.columns import (
    ObsKey,
    array_bytes,
    array_shape,
    load,
    load_cached,
    load_into,
    seen_column,
)
from action_diffusion.datasets.batches.frames import DecodedRows, Decoders
from action_diffusion.datasets.batches.windows import Windows
from action_diffusion.datasets.storage.replay_buffer import ReplayBuffer
from action_diffusion.errors import InputError
from action_diffusion.files import cache_folder
from action_diffusion.memory import Mode, choose_mode, memory_limit
from action_diffusion.rotations import RotationColumns, continuous

SUCCESS = 1.0
"""The reward of a step that does the task: the most that the simulators give."""
COUNTED: dict[str, Callable[[Tensor], Tensor]] = {
    "given": lambda reward: reward,
    "dense": lambda reward: reward - SUCCESS,
    "success": lambda reward: (reward >= SUCCESS).to(reward.dtype) - 1.0,
}
"""What is counted of a reward in [0, 1]: with "dense" and "success" at most 0, so that sooner is better."""
_PICTURES = ("image", "depth")
_DISK_SHARE = 0.5
__all__ = ["COUNTED", "SUCCESS", "Batch", "BatchSource", "Critic", "ObsKey", "random_crop_offsets"]


@dataclass
class Critic:
    """What a value function learns from: the outcome of the n executed steps (n = Ta, or up to the end).

    reward: float32 [B], sum of gamma^i r over them; r of a row is what its action earned, as `counted` has it
    next_obs: as `Batch.obs`, after them; where the episode is over, its last rows
    done: bool [B], the episode comes to its end with them, and nothing is earned after it
    truncated: bool [B], the recording breaks off with them: what follows nobody saw, and no target can be told
    discount: float32 [B], gamma^n
    """

    reward: Tensor
    next_obs: dict[str, Tensor]
    done: Tensor
    truncated: Tensor
    discount: Tensor


class Sentences(NamedTuple):
    """Words, as a policy takes them. vectors: float32 [n, E], one a sentence. of_row: int64 [N], each row's one."""

    vectors: np.ndarray
    of_row: np.ndarray


@dataclass
class Batch:
    """B windows. On the source's device, in the data's units.

    obs: float32 [B, To, ...] for states and words, uint8 [B, To, H, W, 3] for images, whole numbers [B, To, H, W] of mm
        for depth
    action: float32 [B, horizon, A]
    mask: bool [B, horizon], False where a step repeats the first or last row of its episode
    gain: float32 [B, A · D], of the row now, where the source has a `gain_key`
    """

    obs: dict[str, Tensor]
    action: Tensor
    mask: Tensor
    critic: Critic | None = None
    gain: Tensor | None = None

    @property
    def beside(self) -> dict[str, Any]:
        """What a loss takes beside observations, action and mask, by name."""
        there = {"gain": self.gain, "outcome": self.critic}
        return {name: value for name, value in there.items() if value is not None}


class BatchSource:
    """The windows of a buffer, in the fastest place that holds the keys they need (`mode`).

    observations: name of the observation -> where it is in the buffer
    n_obs_steps: To; observations are the first To rows of a window
    memory_gb: limit (10^9 bytes) of memory for the arrays; None measures what is free. Arrays beyond it are
        decoded once into files in `cache_dir` (default: the user's cache folder) and read from there; images and depth
        that take more than half of what is free there, or lie in an object store, are decoded each time they are
        needed.
    rotations: name of the observation, or "action" -> its rotations, which are continuous in every window
    told: name of the observation -> its words, which are kept once a sentence
    gain_key: the column of feedback gains, for `Batch.gain`
    reward_key, gamma: for `gather(critic=True)`; counted: what it counts of a reward, one of `COUNTED`
    terminal_key: the column that is true in the last row of an episode that came to its end; None: it did where that
        row earned `SUCCESS`. Other episodes break off.
    mode: None chooses. "disk": images and depth are read from a copy on disk also where there is memory for them;
        "decode": they are decoded each time they are needed, and as many of them kept as fit into memory

    Actions of several axes become vectors, the last axis fastest. Images become what `pictures` says.

    Raises `InputError` for keys that do not exist, values that are not finite, and images that cannot be seen.
    """

    def __init__(
        self,
        *,
        buffer: ReplayBuffer,
        windows: Windows,
        observations: Mapping[str, ObsKey],
        action_key: str,
        n_obs_steps: int,
        device: str | torch.device = "cpu",
        memory_gb: float | None = None,
        cache_dir: Path | None = None,
        rotations: Mapping[str, Sequence[RotationColumns]] | None = None,
        told: Mapping[str, Sentences] | None = None,
        gain_key: str | None = None,
        reward_key: str | None = None,
        gamma: float = 0.99,
        counted: str = "given",
        terminal_key: str | None = None,
        mode: Mode | None = None,
    ) -> None:
        self.buffer, self.windows = buffer, windows
        self.n_obs_steps = n_obs_steps
        self.gamma, self._counted = gamma, COUNTED[counted]
        self.device = torch.device(device)
        self._observations = dict(observations)
        self._rotations = dict(rotations or {})
        self._told = {name: one.of_row for name, one in (told or {}).items()}
        self._vectors = {name: torch.as_tensor(one.vectors).to(self.device) for name, one in (told or {}).items()}
        self._action = ObsKey(action_key, None, "action")
        self._reward = ObsKey(reward_key, None, "state") if reward_key else None
        self._gain = ObsKey(gain_key, None, "action") if gain_key else None
        self._terminal = ObsKey(terminal_key, None, "state") if terminal_key else None
        others = (self._reward, self._terminal, self._gain)
        wanted = {*observations.values(), self._action, *(key for key in others if key)}
        sizes = {key: array_bytes(buffer, key) for key in sorted(wanted, key=repr)}
        self.n_bytes = sum(sizes.values())
        pictures = sum(size for key, size in sizes.items() if key.kind in _PICTURES)
        self.mode: Mode = mode or choose_mode(self.n_bytes, self.device, memory_gb)
        if pictures and self.mode == "disk" and (buffer.remote or not (mode or fits_on_disk(pictures, cache_dir))):
            self.mode = "decode"
        self._arrays: dict[ObsKey, np.ndarray | DecodedRows] = {}
        self._tensors: dict[ObsKey, Tensor] = {}
        if self.mode == "device":
            self._tensors = {key: _load_on(self.device, buffer, key) for key in sizes}
        else:
            limit = self.n_bytes if self.mode == "memory" else memory_limit(memory_gb)
            decoded = [key for key in sizes if self.mode == "decode" and key.kind in _PICTURES]
            loaded = {key: size for key, size in sizes.items() if key not in decoded}
            decoders = Decoders(max(0.0, limit - sum(loaded.values())))
            self._arrays = {
                **_load_arrays(buffer, loaded, limit, cache_dir, copied=mode == "disk"),
                **{key: DecodedRows(seen_column(buffer, key), decoders) for key in decoded},
            }

    def __len__(self) -> int:
        return len(self.windows)

    @property
    def frame_sizes(self) -> dict[str, tuple[int, int]]:
        """Height and width in px of every image observation."""
        arrays = self._tensors if self.mode == "device" else self._arrays
        images = {name: key for name, key in self._observations.items() if key.kind == "image"}
        return {name: (int(arrays[key].shape[1]), int(arrays[key].shape[2])) for name, key in images.items()}

    def with_windows(self, windows: Windows) -> BatchSource:
        """Other windows (validation, say) of the same arrays, which are shared."""
        other = copy.copy(self)
        other.windows = windows
        return other

    def values(self, name: str) -> np.ndarray:
        """All rows of an observation, or of "action": [N, ...] as loaded, for statistics; of words, each sentence."""
        if name in self._told:
            return self._vectors[name].cpu().numpy()
        key = self._action if name == "action" else self._observations[name]
        return self._tensors[key].cpu().numpy() if self.mode == "device" else np.asarray(self._arrays[key])

    @property
    def rewarded(self) -> bool:
        """Whether `gather(critic=True)` can be asked for."""
        return self._reward is not None

    def rewards(self) -> np.ndarray:
        """What is counted of the reward of each row: float32 [N]."""
        assert self._reward is not None
        return self._earned(np.arange(self._shape(self._reward)[0])).cpu().numpy()

    @property
    def told(self) -> Collection[str]:
        """Names of the observations that are words."""
        return self._told.keys()

    @property
    def depths(self) -> Collection[str]:
        """Names of the observations that are depth."""
        return [name for name, key in self._observations.items() if key.kind == "depth"]

    def has_rotations(self, name: str) -> bool:
        return bool(self._rotations.get(name))

    def gather(
        self,
        indices: np.ndarray,
        *,
        crop: tuple[int, int] | None = None,
        offsets: np.ndarray | None = None,
        critic: bool = False,
    ) -> Batch:
        """The windows `indices` int64 [B].

        crop: (height, width) cut from every image; offsets: int64 [B, 2], its top left corner, the same for
        all steps and images of a window (None: the centre of each image). critic: fill `Batch.critic`.
        """
        indices = np.asarray(indices, np.int64)
        rows, mask = self.windows.rows_and_mask(indices)
        return Batch(
            obs=self._observe(rows[:, : self.n_obs_steps], crop, offsets),
            action=self.windowed("action", rows),
            mask=torch.from_numpy(mask).to(self.device),
            critic=self._criticise(indices, crop, offsets) if critic else None,
            gain=self._take(self._gain, self.windows.now(indices)) if self._gain else None,
        )

    def prefetch(self, indices: np.ndarray, *, critic: bool = False) -> None:
        """Begin to decode what `gather` of the windows `indices` int64 [B] will need, where images are decoded."""
        for array in self._arrays.values():
            if isinstance(array, DecodedRows):
                array.prefetch(self.windows.rows(indices)[:, : self.n_obs_steps])
                if critic:
                    array.prefetch(self._next_rows(indices))

    def _observe(self, rows: np.ndarray, crop: tuple[int, int] | None, offsets: np.ndarray | None) -> dict[str, Tensor]:
        return {
            name: self._crop(key, rows, crop, offsets) if crop and key.kind == "image" else self.windowed(name, rows)
            for name, key in self._observations.items()
        } | {name: self.windowed(name, rows) for name in self._told}

    def windowed(self, name: str, rows: np.ndarray) -> Tensor:
        """An observation, or "action", of windows with the `rows` [B, T]: [B, T, ...], rotations continuous."""
        if name in self._told:
            return self._vectors[name][torch.from_numpy(self._told[name][rows]).to(self.device)]
        key = self._action if name == "action" else self._observations[name]
        return continuous(self._take(key, rows), self._rotations.get(name, ()))

    def _shape(self, key: ObsKey) -> tuple[int, ...]:
        return tuple(self._tensors[key].shape if self.mode == "device" else self._arrays[key].shape)

    def _take(self, key: ObsKey, rows: np.ndarray) -> Tensor:
        if self.mode == "device":
            return self._tensors[key][torch.from_numpy(rows).to(self.device)]
        array = self._arrays[key]
        taken = array.gather(rows) if isinstance(array, DecodedRows) else np.take(array, rows, axis=0)
        return torch.from_numpy(taken).to(self.device)

    def _crop(self, key: ObsKey, rows: np.ndarray, crop: tuple[int, int], offsets: np.ndarray | None) -> Tensor:
        n, height, width = self._shape(key)[:3]
        room = np.array([height - crop[0], width - crop[1]])
        if (room < 0).any():
            raise InputError(f"crop {list(crop)} is larger than the {height} x {width} images of {key.source}")
        corner = np.broadcast_to(room // 2 if offsets is None else np.asarray(offsets), (len(rows), 2))
        if ((corner < 0) | (corner > room)).any():  # nothing below knows bounds
            raise ValueError(f"crop offsets must be from 0 to {room.tolist()}")
        if rows.size and (rows.min() < 0 or rows.max() >= n):
            raise IndexError(f"windows reach rows {rows.min()} to {rows.max()} of {n}")
        if self.mode != "device":
            array = self._arrays[key]
            if isinstance(array, DecodedRows):
                array, rows = array.gather(rows.ravel()), np.arange(rows.size).reshape(rows.shape)
            return pixels.crop(array, rows, corner, crop).to(self.device)
        at_rows, at_corners = (torch.from_numpy(part.copy()).to(self.device) for part in (rows, corner))
        return pixels.cut(self._tensors[key], at_rows, at_corners, crop)

    def _criticise(self, indices: np.ndarray, crop: tuple[int, int] | None, offsets: np.ndarray | None) -> Critic:
        if self._reward is None:
            raise InputError("a critic needs rewards: name the buffer's reward_key")
        now, end = self.windows.now(indices), self.windows.end[indices]
        n = np.minimum(self.windows.n_action_steps, end - now)
        steps = np.arange(self.windows.n_action_steps)
        executed = np.minimum(now[:, None] + steps, end[:, None] - 1)
        weights = np.where(steps < n[:, None], self.gamma**steps, 0).astype(np.float32)
        over = torch.from_numpy(now + n >= end).to(self.device)
        ended = self._ended(end - 1)
        return Critic(
            reward=(self._earned(executed) * torch.from_numpy(weights).to(self.device)).sum(dim=1),
            next_obs=self._observe(self._next_rows(indices), crop, offsets),
            done=over & ended,
            truncated=over & ~ended,
            discount=torch.from_numpy((self.gamma**n).astype(np.float32)).to(self.device),
        )

    def _next_rows(self, indices: np.ndarray) -> np.ndarray:
        """Rows of `Critic.next_obs`, int64 [B, To]."""
        now, end, first = self.windows.now(indices), self.windows.end[indices], self.windows.first[indices]
        after = (now + np.minimum(self.windows.n_action_steps, end - now))[:, None] + np.arange(1 - self.n_obs_steps, 1)
        rows: np.ndarray = np.clip(after, first[:, None], end[:, None] - 1)
        return rows

    def _earned(self, rows: np.ndarray) -> Tensor:
        """What is counted of the rewards of `rows`."""
        assert self._reward is not None
        return self._counted(self._take(self._reward, rows)[..., 0])

    def _ended(self, last: np.ndarray) -> Tensor:
        """Whether episodes with the `last` rows [B] came to their end, bool [B]."""
        if self._terminal is not None:
            return self._take(self._terminal, last)[..., 0] > 0
        assert self._reward is not None
        return self._take(self._reward, last)[..., 0] >= SUCCESS


def random_crop_offsets(n: int, image: tuple[int, int], crop: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
    """Top left corners of `n` crops (height, width) inside an image (height, width): int64 [n, 2]."""
    return rng.integers(0, np.array(image) - np.array(crop) + 1, size=(n, 2))


def fits_on_disk(n_bytes: int, cache_dir: Path | None) -> bool:
    """Whether a copy of so many bytes leaves half of the disk that the cache is on."""
    folder = cache_dir or cache_folder()
    folder.mkdir(parents=True, exist_ok=True)
    return n_bytes <= _DISK_SHARE * shutil.disk_usage(folder).free


def _load_on(device: torch.device, buffer: ReplayBuffer, key: ObsKey) -> Tensor:
    dtypes = {"image": torch.uint8, "depth": torch.int32}  # torch's uint16 cannot be indexed everywhere
    dtype = dtypes.get(key.kind, torch.float32)
    tensor = torch.empty(array_shape(buffer, key), dtype=dtype, device=device)
    load_into(lambda rows, values: tensor[rows].copy_(torch.tensor(values).to(dtype)), buffer, key)
    return tensor


def _load_arrays(
    buffer: ReplayBuffer, sizes: Mapping[ObsKey, int], limit: float, cache_dir: Path | None, *, copied: bool
) -> dict[ObsKey, np.ndarray]:
    """Smallest first in memory, as long as the sum stays within `limit` bytes; the others on disk.

    copied: images and depth are on disk whatever their size.
    """
    arrays, used = dict[ObsKey, np.ndarray](), 0
    for key, size in sorted(sizes.items(), key=lambda item: item[1]):
        used += size
        in_memory = used <= limit and not (copied and key.kind in _PICTURES)
        arrays[key] = load(buffer, key) if in_memory else load_cached(buffer, key, cache_dir)
    return arrays
