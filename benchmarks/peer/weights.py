"""lerobot's diffusion policy weights as ours: the same numbers under other names and in another order.

lerobot 0.4.4                                        here
diffusion.rgb_encoder.…                              encoder.cameras.0.…        the same names
unet.diffusion_step_encoder.k                        time_embedding.k
unet.down_modules, mid_modules, up_modules           down, middle, up
conv1, conv2 [C_out, C_in, K]                        first, second [K, C_in, C_out]
residual_conv, final_conv.1 [C_out, C_in, 1]         linear layers [C_out, C_in]
downsampling [C_out, C_in, 3]                        [3, C_in, C_out]
upsampling (transposed) [C_in, C_out, 4]             [4, C_in, C_out]
cond_encoder.1 of each block,                        time_film: the columns of the time embedding, and the bias;
    of (time embedding, observations)                condition_film: the columns of the observations; all blocks
"""

from __future__ import annotations

import re
from collections.abc import Mapping

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


def from_lerobot(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state of a `DiffusionPolicy` that computes what lerobot's policy of the state `weights` computes.

    The denoiser must have `activation: mish`, and FiLM must scale (lerobot's `use_film_scale_modulation`, its default).
    Raises `InputError` for a weight that is none of lerobot's diffusion policy's with one camera encoder.
    """
    ours: dict[str, Tensor] = {}
    films: dict[str, list[Tensor]] = {"weight": [], "bias": []}
    for name, value in weights.items():
        if name.startswith(ENCODER):
            ours[f"encoder.cameras.0.{name.removeprefix(ENCODER)}"] = value
        elif name.startswith(UNET) and (film := re.search(r"cond_encoder\.1\.(weight|bias)$", name)):
            films[film[1]].append(value)
        elif name.startswith(UNET):
            ours[f"denoiser.{_unet_name(name)}"] = _unet_value(name, value)
        else:
            raise InputError(f"{name} is no weight of lerobot's diffusion policy")
    time_dim = len(ours["denoiser.time_embedding.3.bias"])
    stacked = torch.cat(films["weight"])  # blocks in lerobot's order, which is ours: down, middle, up
    ours["denoiser.time_film.weight"] = stacked[:, :time_dim]
    ours["denoiser.time_film.bias"] = torch.cat(films["bias"])
    ours["denoiser.condition_film.weight"] = stacked[:, time_dim:]
    return {name: value.contiguous() for name, value in ours.items()}


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


def _unet_value(name: str, value: Tensor) -> Tensor:
    if value.ndim != 3:
        return value
    if value.shape[-1] == 1:
        return value.squeeze(-1)
    if re.search(r"up_modules\.\d+\.2\.weight$", name):
        return value.permute(2, 0, 1)
    return value.permute(2, 1, 0)
