"""What the transformers share: attention between the tokens of a sequence, [B, T, D]."""

from __future__ import annotations

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from action_diffusion.errors import InputError
from action_diffusion.policy.model.conv import Linear


class SelfAttention(nn.Module):
    """Multi-head attention of each token to all, or with `causal` to itself and those before (Vaswani et al. 2017)."""

    def __init__(self, width: int, heads: int, *, causal: bool = False, dropout: float = 0.0):
        super().__init__()
        self.heads, self.causal, self.dropout = heads, causal, dropout
        self.in_proj, self.out_proj = Linear(width, 3 * width), Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, T, D] → [B, T, D]."""
        q, k, v = rearrange(self.in_proj(x), "b t (part h d) -> part b h t d", part=3, h=self.heads)
        dropout = self.dropout if self.training else 0.0
        out = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal, dropout_p=dropout)
        result: Tensor = self.out_proj(rearrange(out, "b h t d -> b t (h d)"))
        return result


def check_sizes(width: int, heads: int) -> None:
    """`InputError` for tokens of `width` values that cannot be cut into heads, or into sines and cosines."""
    if width % heads:
        raise InputError(f"denoiser.width={width} must be divisible by denoiser.heads={heads}")
    if width % 2 or width < 4:
        raise InputError(f"denoiser.width={width} must be even, and at least 4: half are sines, half are cosines")
