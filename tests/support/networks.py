"""U-Nets whose norms do something, and inputs for them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from action_diffusion.policy.model.conv import GroupNorm
from action_diffusion.policy.model.denoisers.unet import ConditionalUnet1d


def unet(*, channels: Sequence[int] = (48, 96), seed: int = 0, **options: Any) -> ConditionalUnet1d:
    torch.manual_seed(seed)
    sizes: dict[str, Any] = {"action_dim": 2, "condition_dim": 5, "channels": channels, "time_dim": 8}
    net = ConditionalUnet1d(**sizes | options)
    for module in net.modules():  # norms that do something
        if isinstance(module, GroupNorm):
            torch.nn.init.normal_(module.weight, 1.0, 0.3)
            torch.nn.init.normal_(module.bias, 0.0, 0.3)
    return net.eval()


def inputs(net: ConditionalUnet1d, steps: int, batch: int) -> tuple[torch.Tensor, torch.Tensor]:
    film = net.prepare(torch.randn(batch, 5), torch.tensor([3.0])).at(0)
    return torch.randn(batch, steps, net.input_dim), film
