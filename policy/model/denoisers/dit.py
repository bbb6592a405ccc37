"""A denoiser that is a diffusion transformer: actions are tokens, time and observations modulate every block.

    chunk [B, H, A] ─▶ embed, add positions ─▶ block × layers ─▶ norm, modulate ─▶ linear ─▶ [B, H, A]
    block:  x + gate · attention(scale, shift (norm(x))),  then the same with an MLP
    all gates, scales and shifts:  W_t · silu(embed(time)) + W_o · silu(embed(condition)) + bias,  0 at first

DiT modulates by W · silu(embed(time) + embed(condition)), per block. Here both have a matrix of their own, so that the
two products are computed once per chunk for all blocks and steps together (`prepare`), as for the U-Net.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from action_diffusion.policy.model.conv import Linear
from action_diffusion.policy.model.denoisers.attention import SelfAttention, check_sizes
from action_diffusion.policy.model.denoisers.denoiser import Denoiser, Film, SinusoidalEmbedding, embed_times, time_mlp


class DiTBlock(nn.Module):
    """Attention of all actions to all, then an MLP, each modulated (adaLN-Zero).

    x [B, H, D], film [B, 6 D]: shift, scale and gate of either → [B, H, D].
    """

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.attention = SelfAttention(width, heads)
        self.mlp = nn.Sequential(Linear(width, 4 * width), nn.GELU("tanh"), Linear(4 * width, width))

    def forward(self, x: Tensor, film: Tensor) -> Tensor:
        shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = film.unsqueeze(1).chunk(6, dim=-1)
        x = torch.addcmul(x, gate_1, self.attention(modulated(x, shift_1, scale_1)))
        return torch.addcmul(x, gate_2, self.mlp(modulated(x, shift_2, scale_2)))


def modulated(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """x [B, H, D], its tokens normalised, then scaled by 1 + scale and shifted, [B, 1, D]."""
    return torch.addcmul(shift, F.layer_norm(x, x.shape[-1:], eps=1e-6), 1.0 + scale)


class DiffusionTransformer(Denoiser):
    """DiT (Peebles and Xie 2023) on a chunk of actions, as policies have it ("The Ingredients for Robotic Diffusion
    Transformers", Dasari et al. 2024: adaLN-Zero is what makes training stable).

    action_dim: A. condition_dim: C, of the encoded observation history. marked: the input has one channel more, which
    marks the steps of a chunk that are given clean (`policy.Prefix`). two_times: told how far a step goes as well.
    width: D. Positions are sines and cosines, so chunks have any length.
    """

    def __init__(
        self,
        *,
        action_dim: int,
        condition_dim: int,
        marked: bool = False,
        two_times: bool = False,
        width: int = 96,
        layers: int = 3,
        heads: int = 4,
    ):
        super().__init__()
        check_sizes(width, heads)
        self.input_embedding, self.position_embedding = Linear(action_dim + marked, width), SinusoidalEmbedding(width)
        self.time_embedding = time_mlp(width)
        self.span_embedding = time_mlp(width) if two_times else None
        self.condition_embedding = nn.Sequential(nn.Linear(condition_dim, width), nn.SiLU(), nn.Linear(width, width))
        self.blocks = nn.ModuleList(DiTBlock(width, heads) for _ in range(layers))
        self.out = Linear(width, action_dim)
        self.film_sizes = [6 * width] * layers + [2 * width]
        self.time_film = nn.Linear(width, sum(self.film_sizes))
        self.condition_film = nn.Linear(width, sum(self.film_sizes), bias=False)
        for layer in self.modules():
            if isinstance(layer, Linear):
                nn.init.xavier_uniform_(layer.weight)
                nn.init.zeros_(layer.bias)
        for parameter in (
            *self.out.parameters(),
            *self.time_film.parameters(),
            *self.condition_film.parameters(),
        ):  # every block passes on what it gets, and the output is 0
            nn.init.zeros_(parameter)

    def prepare(self, condition: Tensor, times: Tensor) -> Film:
        """Everything that depends only on the observation or only on the step. condition [B, C], times [K] or
        [K, 2]."""
        embedded = embed_times(times, self.time_embedding, self.span_embedding)
        return Film(
            steps=self.time_film(F.silu(embedded)),
            condition=self.condition_film(F.silu(self.condition_embedding(condition))),
        )

    def forward(self, x: Tensor, film: Tensor) -> Tensor:
        """x [B, H, A] (A + 1: `marked`), film [B, F] (of `Film.at`, in training the sum of its parts) → [B, H, A]."""
        *films, last = film.split(self.film_sizes, dim=-1)
        h = self.input_embedding(x) + self.position_embedding(torch.arange(x.shape[1], device=x.device))
        for block, modulation in zip(self.blocks, films, strict=True):
            h = block(h, modulation)
        result: Tensor = self.out(modulated(h, *last.unsqueeze(1).chunk(2, dim=-1)))
        return result
