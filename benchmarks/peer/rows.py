"""What is measured: each row a work, its settings, whom it is measured against, and the ratio that it must reach."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from action_diffusion.datasets.batches.windows import make_windows

SMALL, MEDIUM, PAPER = (128, 256, 512), (256, 512, 1024), (512, 1024, 2048)
"""Channels of the U-Net's levels; the last are the paper's."""
REDUCED = ["fp16", "bf16"]
"""Half the bytes of a weight, by whichever kernels a machine has."""
EXACT = {"chunk": ("largest", 1e-4)}
NETWORK = {"embedding": ("largest", 1e-4), "output": ("largest", 1e-4), **EXACT}
LOSS = {"loss": ("relative", 1e-4)}


@dataclass(frozen=True)
class Row:
    """A line of the table.

    work: of the workers. peer: "lerobot", or "reference" for a plain DataLoader. unit: "ms" of a call (or of each of
    its parts), "s", or "samples/s". bound: the ratio that it must reach, or None. checks: outputs of both sides that
    must agree before anything is timed, by name: the largest difference, the largest as a share of the peer's largest
    value, or the mean difference, and what it may be at most. what: for people.
    """

    name: str
    what: str
    work: str
    unit: str
    bound: float | None
    settings: Mapping[str, Any]
    checks: Mapping[str, tuple[str, float]]
    peer: str = "lerobot"


def _chunk(name: str, what: str, channels: tuple[int, ...], bound: float | None = None, **settings: Any) -> Row:
    """One chunk, or a part of it (settings: part), for one observation."""
    base = {"image": True, "channels": channels, "steps": 10, "batch": 1, "precisions": ["fp32"]}
    reduced = {"chunk": ("largest", 1e-2)}
    return Row(name, what, "chunk", "ms", bound, base | settings, reduced if "precisions" in settings else NETWORK)


def _train(
    name: str, size: str, channels: tuple[int, ...], batch: int, *, image: bool, bound: float | None = None
) -> Row:
    what = f"training step, {'image' if image else 'state'} policy, U-Net {size}, batch {batch}"
    return Row(name, what, "train", "ms", bound, {"image": image, "channels": channels, "batch": batch}, LOSS)


def _like(name: str, other: Row, what: str, **settings: Any) -> Row:
    """Another function than the peer's, so that there is nothing to check and no bound."""
    return replace(other, name=name, what=what, bound=None, settings={**other.settings, **settings}, checks={})


_GATHER = {"batch": 64, "horizon": 16, "n_obs_steps": 2, "crop": (84, 84)}

TRAIN_STATE = _train("train_state", "128/256/512", SMALL, 256, image=False, bound=1.5)

ROWS = (
    Row(
        "gather_reference",
        "batches of 64 windows (2 frames cropped to 84 x 84, 16 actions), beside one slice at a time in a DataLoader",
        "gather",
        "samples/s",
        10.0,
        _GATHER | {"whole_frames": False},
        {"image": ("largest", 1e-6), "action": ("largest", 0.0)},
        peer="reference",
    ),
    Row(
        "gather_lerobot",
        "the same, beside LeRobotDataset (H.264 video) and a DataLoader with 2 workers",
        "gather",
        "samples/s",
        50.0,
        _GATHER | {"whole_frames": True},
        {"image": ("mean", 0.03), "action": ("largest", 0.0)},  # video loses some of a frame
    ),
    _chunk("chunk_small", "one chunk, image policy, U-Net 128/256/512, DDIM 10, batch 1", SMALL, 3.0),
    _chunk("chunk_small_ddim16", "the same, DDIM 16", SMALL, steps=16),
    _chunk("chunk_small_compiled", "chunk_small by torch.compile", SMALL, compile=True),
    _chunk("denoising_step_small", "one of its 10 denoising steps, without the encoder", SMALL, part="denoise"),
    _chunk("encoder", "its encoder, 2 frames: ResNet-18, spatial softmax", SMALL, part="encode"),
    _chunk("chunk_paper", "one chunk, image policy, U-Net 512/1024/2048 (263 M), DDIM 10, batch 1", PAPER, 2.5),
    _chunk("chunk_paper_reduced", "the same, reduced precision beside fp32", PAPER, 4.0, precisions=REDUCED),
    _chunk("chunk_paper_ddim16", "the same in fp32, DDIM 16", PAPER, steps=16),
    _chunk("denoising_step_paper", "one of the 10 denoising steps, without the encoder", PAPER, part="denoise"),
    TRAIN_STATE,
    _like("train_state_silu", TRAIN_STATE, "the same with SiLU, our default, beside lerobot's Mish", activation="silu"),
    _train("train_state_medium", "256/512/1024", MEDIUM, 256, image=False),
    _train("train_state_paper", "512/1024/2048", PAPER, 64, image=False),
    _train("train_image", "128/256/512", SMALL, 64, image=True, bound=1.3),
    _train("train_image_medium", "256/512/1024", MEDIUM, 64, image=True),
    _train("train_image_paper", "512/1024/2048", PAPER, 64, image=True),
    Row(
        "evaluate",
        "50 PushT episodes of 48 steps from images, U-Net 128/256/512, DDIM 10",
        "evaluate",
        "s",
        3.0,
        {"image": True, "channels": SMALL, "steps": 10, "batch": 4, "episodes": 50, "max_steps": 48, "seed": 100_000},
        EXACT,
    ),
)


def write_inputs(row: Row, folder: Path) -> None:
    """What both sides work on, in `folder`/inputs.safetensors."""
    make = _gather_inputs if row.work == "gather" else _policy_inputs
    save_file(make(row.settings, np.random.default_rng(0)), folder / "inputs.safetensors")


def _policy_inputs(settings: Mapping[str, Any], random: np.random.Generator) -> dict[str, np.ndarray]:
    """Observation histories and actions in pixels; noise; denoising times."""
    n = settings["batch"]

    def pixels(*shape: int) -> np.ndarray:
        return random.uniform(0, 512, (n, *shape)).astype(np.float32)

    return {
        "agent_pos": pixels(2, 2),
        "keypoint": pixels(2, 16),
        "image": random.integers(0, 256, (n, 2, 96, 96, 3), np.uint8),
        "action": pixels(16, 2),
        "noise": random.standard_normal((n, 16, 2), np.float32),
        "times": random.integers(0, 100, n),
    }


def _gather_inputs(settings: Mapping[str, Any], random: np.random.Generator) -> dict[str, np.ndarray]:
    """now [W]: the row at which each window acts; checked [B]: some of them; corners [W, 2] of each window's crop."""
    ends = np.load(Path(settings["data"]) / "episode_ends.npy")
    windows = make_windows(ends, n_action_steps=8, **{key: settings[key] for key in ("horizon", "n_obs_steps")})
    now = windows.now(np.arange(len(windows)))
    room = 96 - np.array(settings["crop"]) + 1
    return {
        "now": now,
        "checked": np.sort(random.choice(now, settings["batch"], replace=False)),
        "corners": random.integers(0, room, (len(now), 2)),
    }
