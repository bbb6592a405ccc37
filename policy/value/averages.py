"""Averages of weights, which targets are told by."""

from __future__ import annotations

import copy
from typing import TypeVar

import torch
from torch import nn

Averaged = TypeVar("Averaged", bound=nn.Module)


def averaged_copy(module: Averaged) -> Averaged:
    """A target network: the same weights, which `follow` moves."""
    return copy.deepcopy(module).requires_grad_(False)


@torch.no_grad()
def follow(target: nn.Module, source: nn.Module, share: float) -> None:
    """target ← target + share · (source − target)."""
    torch._foreach_lerp_(list(target.parameters()), list(source.parameters()), share)
