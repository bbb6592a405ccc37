"""lerobot's diffusion policy weights as ours, and back: the same numbers under other names and in another order.

lerobot                                              here
diffusion.rgb_encoder.…                              encoder.cameras.0.…        the same names
diffusion.rgb_encoder.<i>.…  (one for each camera)   encoder.cameras.<i>.…
unet.diffusion_step_encoder.k                        time_embedding.k
unet.down_modules, mid_modules, up_modules           down, middle, up
conv1, conv2 [C_out, C_in, K]                        first, second [K, C_in, C_out]
residual_conv, final_conv.1 [C_out, C_in, 1]         linear layers [C_out, C_in]
downsampling [C_out, C_in, 3]                        [3, C_in, C_out]
upsampling (transposed) [C_in, C_out, 4]             [4, C_in, C_out]
cond_encoder.1 of each block,                        time_film: the columns of the time embedding, and the bias;
    of (time embedding, observations)                condition_film: the columns of the observations; all blocks

Observations of a step are (state, pictures, environment state) there and (states, pictures) here: `order` says which
column is which. FiLM that only shifts there (`use_film_scale_modulation: false`) scales by 1 here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from action_diffusion.errors import InputError

ENCODER, UNET = "diffusion.rgb_encoder.", "diffusion.unet."
LEVELS = {"down_modules": "down", "mid_modules": "middle", "up_modules": "up"}
PARTS = {
    "conv1.block.0": "first.conv",
    "conv1.block.1": "first.norm",
    "conv2.block.0": "second.conv",
    "conv2.block.1": "second.norm",
    "residual_conv": "shortcut",
}
OTHERS = {"final_conv.0.block.0": "out.0.conv", "final_conv.0.block.1": "out.0.norm", "final_conv.1": "out.1"}
COUNTED = "num_batches_tracked"
"""BatchNorm's, which nothing that runs looks at."""


def order(here: Sequence[tuple[str, int]], there: Sequence[tuple[str, int]], n_obs_steps: int) -> Tensor:
    """For each column of the embedding `here`, where it is `there`. Both: parts of a step and their sizes, in order."""
    starts, total = {}, 0
    for name, size in there:
        starts[name], total = total, total + size
    step = torch.cat([starts[name] + torch.arange(size) for name, size in here])
    return torch.cat([total * index + step for index in range(n_obs_steps)])


def from_lerobot(weights: Mapping[str, Tensor], columns: Tensor | None = None) -> dict[str, Tensor]:
    """The state of a `DiffusionPolicy` that computes what lerobot's policy of the state `weights` computes.

    The denoiser must have `activation: mish`. columns: of `order`; None: they are as there.
    Raises `InputError` for a weight that is none of lerobot's diffusion policy's.
    """
    ours: dict[str, Tensor] = {}
    films: dict[str, dict[str, Tensor]] = {"weight": {}, "bias": {}}
    for name, value in ((name.replace("._orig_mod.", "."), value) for name, value in weights.items()):
        if name.endswith(COUNTED):
            continue
        if name.startswith(ENCODER) and (part := re.fullmatch(r"(?:(\d+)\.)?(\D.*)", name.removeprefix(ENCODER))):
            ours[f"encoder.cameras.{part[1] or 0}.{part[2]}"] = value.float()
        elif name.startswith(UNET) and (film := re.fullmatch(r"(.+\.)cond_encoder\.1\.(weight|bias)", name)):
            films[film[2]][film[1]] = _scaled(value.float(), weights, film[1], name)
        elif name.startswith(UNET):
            ours[f"denoiser.{_unet_name(name)}"] = _unet_value(name, value.float())
        else:
            raise InputError(f"{name} is no weight of lerobot's diffusion policy")
    blocks = sorted(films["weight"], key=_place)  # down, middle, up
    if not blocks or films["bias"].keys() != set(blocks) or "denoiser.time_embedding.3.bias" not in ours:
        raise InputError(f"the weights have no {UNET}…diffusion_step_encoder and cond_encoder")
    time_dim = len(ours["denoiser.time_embedding.3.bias"])
    try:
        stacked = torch.cat([films["weight"][block] for block in blocks])
    except RuntimeError:
        raise InputError("the weights of cond_encoder are for observations of different sizes") from None
    condition = stacked[:, time_dim:]
    if columns is not None and condition.shape[1] != len(columns):
        raise InputError(
            f"cond_encoder takes {condition.shape[1]} numbers of the observations, config.json says {len(columns)}"
        )
    ours["denoiser.time_film.weight"] = stacked[:, :time_dim]
    ours["denoiser.time_film.bias"] = torch.cat([films["bias"][block] for block in blocks])
    ours["denoiser.condition_film.weight"] = condition if columns is None else condition[:, columns]
    return {name: value.contiguous() for name, value in ours.items()}


def to_lerobot(weights: Mapping[str, Tensor], columns: Tensor, *, separate: bool) -> dict[str, Tensor]:
    """The inverse. separate: one encoder for each camera. Blocks are in the order of `weights`: down, middle, up."""
    theirs: dict[str, Tensor] = {}
    films = {
        name: weights[f"denoiser.{name}"] for name in ("time_film.weight", "time_film.bias", "condition_film.weight")
    }
    condition = torch.empty_like(films["condition_film.weight"])
    condition[:, columns] = films["condition_film.weight"]
    stacked, start = torch.cat([films["time_film.weight"], condition], dim=1), 0
    for name, value in weights.items():
        if camera := re.fullmatch(r"encoder\.cameras\.(\d+)\.(.+)", name):
            there = f"{ENCODER}{f'{camera[1]}.' if separate else ''}{camera[2]}"
            theirs[there] = value
            if there.endswith("running_var"):
                theirs[there.replace("running_var", COUNTED)] = torch.tensor(0)
            continue
        name = name.removeprefix("denoiser.")
        if name in films:
            continue
        there = f"{UNET}{_their_unet_name(name)}"
        theirs[there] = _their_unet_value(name, value)
        if name.endswith("first.norm.bias"):
            end = start + 2 * len(value)
            block = there.removesuffix("conv1.block.1.bias")
            theirs[f"{block}cond_encoder.1.weight"] = stacked[start:end]
            theirs[f"{block}cond_encoder.1.bias"] = films["time_film.bias"][start:end]
            start = end
    return {name: value.detach().cpu().contiguous() for name, value in theirs.items()}


def _place(block: str) -> tuple[int, ...]:
    """Of a block of the U-Net, in the order in which they are run."""
    head, *numbers = block.removeprefix(UNET).rstrip(".").split(".")
    if head not in LEVELS or not all(number.isdecimal() for number in numbers):
        raise InputError(f"{block}cond_encoder is no part of lerobot's U-Net")
    return list(LEVELS).index(head), *map(int, numbers)


def _scaled(value: Tensor, weights: Mapping[str, Tensor], block: str, name: str) -> Tensor:
    """A block's FiLM with a scale of 1 in front where it only shifts."""
    norm = weights.get(f"{block}conv1.block.1.bias")
    if norm is None or len(value) != len(norm):
        return value
    scale = torch.ones_like(value) if name.endswith("bias") else torch.zeros_like(value)
    return torch.cat([scale, value])


def _unet_name(name: str) -> str:
    module, _, parameter = name.removeprefix(UNET).rpartition(".")
    if module in OTHERS:
        return f"{OTHERS[module]}.{parameter}"
    head, _, rest = module.partition(".")
    if head == "diffusion_step_encoder":
        return f"time_embedding.{rest}.{parameter}"
    match = re.fullmatch(r"((?:\d+\.)?\d+)(?:\.(.+))?", rest)
    if head not in LEVELS or match is None or (match[2] is not None and match[2] not in PARTS):
        raise InputError(f"{name} is no weight of lerobot's U-Net")
    part = f".{PARTS[match[2]]}" if match[2] else ""
    return f"{LEVELS[head]}.{match[1]}{part}.{parameter}"


def _their_unet_name(name: str) -> str:
    module, _, parameter = name.rpartition(".")
    for there, here in OTHERS.items():
        if module == here:
            return f"{there}.{parameter}"
    head, _, rest = module.partition(".")
    if head == "time_embedding":
        return f"diffusion_step_encoder.{rest}.{parameter}"
    level = next(there for there, here in LEVELS.items() if here == head)
    for there, here in PARTS.items():
        if rest.endswith(f".{here}"):
            return f"{level}.{rest.removesuffix(here)}{there}.{parameter}"
    return f"{level}.{rest}.{parameter}"


def _unet_value(name: str, value: Tensor) -> Tensor:
    if value.ndim != 3:
        return value
    if re.search(r"(residual_conv|final_conv\.1)\.weight$", name):
        return value.squeeze(-1)
    if re.search(r"up_modules\.\d+\.2\.weight$", name):
        return value.permute(2, 0, 1)
    return value.permute(2, 1, 0)


def _their_unet_value(name: str, value: Tensor) -> Tensor:
    if re.search(r"(shortcut|^out\.1)\.weight$", name):
        return value.unsqueeze(-1)
    if value.ndim != 3:
        return value
    return value.permute(1, 2, 0) if re.fullmatch(r"up\.\d+\.2\.weight", name) else value.permute(2, 1, 0)
