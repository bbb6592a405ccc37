"""diffusion_policy's weights as ours: the same numbers under other names and in another order.

there                                                here
model.…  of ConditionalUnet1D                        denoiser.…: lerobot's U-Net is the same one, with other names
model.…  of TransformerForDiffusion                  denoiser.…: see `policy.model.denoisers.transformer`
obs_encoder.obs_nets.<camera>.nets.  (robomimic)     encoder.cameras.<i>.
    0.nets.<0, 1, 4 to 7>.…                          backbone.<0, 1, 4 to 7>.…
    1.nets, .pos_x, .pos_y, .temperature             pool.nets, divided by the temperature, and pool.pos_grid
    3                                                out
obs_encoder.key_model_map.<camera>.  (torchvision)   encoder.cameras.<i>.
    conv1, bn1, layer1 to layer4                     backbone.<0, 1, 4 to 7>
                                                     out: the identity, as theirs have no linear layer there

Parts of an embedding are in another order there (`lerobot.weights.order`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from action_diffusion.errors import InputError
from action_diffusion.policy.interchange.lerobot.weights import UNET, from_lerobot
from action_diffusion.policy.model.encoders.resnet import trunk_name

Weights = Mapping[str, Tensor]
MODEL, ROBOMIMIC, TORCHVISION = "model.", "obs_encoder.obs_nets.", "obs_encoder.key_model_map."
UNUSED = re.compile(
    r"(.*\.)?(_dummy_variable|num_batches_tracked)"  # without numbers, or without effect
    r"|model\.(memory_)?mask"
    r"|obs_encoder\.obs_nets\.[^.]+\.(backbone|pool)\..*"  # robomimic 0.3 lists these twice
    r"|obs_encoder\.key_model_map\.[^.]+\.fc\..*"
)
TIME = "model.diffusion_step_encoder.3.bias"
SHARED = "rgb"
"""What MultiImageObsEncoder calls a network that all cameras share."""


def unet(weights: Weights, columns: Tensor) -> dict[str, Tensor]:
    """Of the denoiser `unet1d`. columns: for each of our columns of the embedding, theirs.

    Raises `InputError` for a weight that ConditionalUnet1D does not have.
    """
    sizes = {value.shape[-1] for name, value in weights.items() if name.endswith("cond_encoder.1.weight")}
    told = len(weights.get(TIME, ())) + len(columns)
    if sizes != {told}:
        raise InputError(f"cond_encoder takes {sorted(sizes)} numbers of time and observations, cfg makes them {told}")
    named = {}
    for name in weights:
        known = re.fullmatch(r"model\.(?:(?:down|mid|up)_modules|diffusion_step_encoder|final_conv)\.(\S+)", name)
        if known is None:
            raise InputError(f"{name} is no weight of ConditionalUnet1D")
        there = re.sub(r"\.blocks\.([01])\.", lambda block: f".conv{int(block[1]) + 1}.", name.removeprefix(MODEL))
        there = re.sub(r"^((?:down|up)_modules\.\d+\.2)\.conv\.", r"\1.", there)
        named[f"{UNET}{there}"] = weights[name]
    return from_lerobot(named, columns)


def transformer(weights: Weights, columns: Tensor) -> dict[str, Tensor]:
    """Of the denoiser `transformer`. columns: of one step's embedding."""
    ours: dict[str, Tensor] = {}
    for name, value in weights.items():
        here = re.sub(r"^model\.(?:(decoder\.)layers\.)?", r"denoiser.\1", name)
        if name in ("model.pos_emb", "model.cond_pos_emb"):
            ours[f"{here}.weight"] = value.squeeze(0)
        elif split := re.fullmatch(r"(.+\.multihead_attn)\.in_proj_(weight|bias)", here):
            width = len(value) // 3
            ours[f"{split[1]}.query.{split[2]}"] = value[:width]
            ours[f"{split[1]}.key_value.{split[2]}"] = value[width:]
        elif name == "model.cond_obs_emb.weight":
            if value.shape[1] != len(columns):
                raise InputError(f"{name} takes {value.shape[1]} numbers a step, cfg makes them {len(columns)}")
            ours[here] = value[:, columns]
        else:
            ours[here.replace("self_attn.in_proj_", "self_attn.in_proj.")] = value
    return ours


def robomimic(weights: Weights, cameras: Sequence[str]) -> dict[str, Tensor]:
    """Of the encoder, where theirs is robomimic's. Raises `InputError` for another than ResNet18 and SpatialSoftmax."""
    ours: dict[str, Tensor] = {}
    for i, camera in enumerate(cameras):
        start = f"{ROBOMIMIC}{camera}.nets."
        own = {name.removeprefix(start): value for name, value in weights.items() if name.startswith(start)}
        for name in ("0.nets.0.weight", "1.nets.weight", "1.nets.bias", "1.pos_x", "1.pos_y", "3.weight"):
            if name not in own:
                raise InputError(f"{start}{name} is missing: expected ResNet18Conv, SpatialSoftmax and a linear layer")
        temperature = own.pop("1.temperature", torch.ones(1))
        grid = torch.stack([own.pop("1.pos_x").flatten(), own.pop("1.pos_y").flatten()], dim=1)
        ours[f"encoder.cameras.{i}.pool.pos_grid"] = grid
        for name, value in own.items():
            if name.startswith("1.nets."):
                value = value / temperature
            here = re.sub(r"^0\.nets\.", "backbone.", re.sub(r"^1\.", "pool.", re.sub(r"^3\.", "out.", name)))
            ours[f"encoder.cameras.{i}.{here}"] = value
    return ours


def torchvision(weights: Weights, cameras: Sequence[str], features: int) -> dict[str, Tensor]:
    """Of the encoder, where theirs is MultiImageObsEncoder. cameras: `SHARED` alone where they share a network."""
    ours: dict[str, Tensor] = {}
    for i, camera in enumerate(cameras):
        start = f"{TORCHVISION}{camera}."
        for name, value in weights.items():
            if name.startswith(start):
                ours[f"encoder.cameras.{i}.backbone.{trunk_name(name.removeprefix(start))}"] = value
        ours[f"encoder.cameras.{i}.out.weight"] = torch.eye(features)
        ours[f"encoder.cameras.{i}.out.bias"] = torch.zeros(features)
    return ours
