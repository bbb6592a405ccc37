"""A denoiser that is a transformer decoder: actions are tokens, time and observations are what they look at.

    memory:  [time, obs₁ … obs_To] ─▶ embed, add positions ─▶ MLP of each ─▶ keys and values of all layers
    chunk [B, H, A] ─▶ embed, add positions ─▶ (self-attention ─▶ attention to the memory ─▶ MLP) × layers ─▶ [B, H, A]

Each token of the memory is made by itself, so the time's keys and values are the same for every chunk, and those of the
observations stay for all steps of one: both are computed once per chunk (`prepare`), and lie side by side in what a
step is given.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import cast

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from action_diffusion.errors import InputError
from action_diffusion.policy.model.conv import Linear
from action_diffusion.policy.model.denoisers.attention import SelfAttention, check_sizes
from action_diffusion.policy.model.denoisers.denoiser import Denoiser, Film, SinusoidalEmbedding, embed_times


class MemoryAttention(nn.Module):
    """Multi-head attention of tokens [B, T, D] to a memory whose keys and values are made beforehand."""

    def __init__(self, width: int, heads: int, dropout: float):
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.query, self.key_value, self.out_proj = Linear(width, width), Linear(width, 2 * width), Linear(width, width)

    def forward(self, x: Tensor, key_value: Tensor, mask: Tensor | None) -> Tensor:
        """key_value [B, S, 2 D], of `self.key_value`; mask [T, S], True: is looked at → [B, T, D]."""
        q = rearrange(self.query(x), "b t (h d) -> b h t d", h=self.heads)
        k, v = rearrange(key_value, "b s (part h d) -> part b h s d", part=2, h=self.heads)
        dropout = self.dropout if self.training else 0.0
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)
        result: Tensor = self.out_proj(rearrange(out, "b h t d -> b t (h d)"))
        return result


class DecoderLayer(nn.Module):
    """`torch.nn.TransformerDecoderLayer` with norms first and GELU."""

    def __init__(self, width: int, heads: int, *, causal: bool, dropout: float):
        super().__init__()
        self.self_attn = SelfAttention(width, heads, causal=causal, dropout=dropout)
        self.multihead_attn = MemoryAttention(width, heads, dropout)
        self.linear1, self.linear2 = Linear(width, 4 * width), Linear(4 * width, width)
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(width) for _ in range(3))
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, key_value: Tensor, mask: Tensor | None) -> Tensor:
        """x [B, T, D] → [B, T, D]; the rest as `MemoryAttention`."""
        x = x + self.dropout(self.self_attn(self.norm1(x)))
        x = x + self.dropout(self.multihead_attn(self.norm2(x), key_value, mask))
        result: Tensor = x + self.dropout(self.linear2(self.dropout(F.gelu(self.linear1(self.norm3(x))))))
        return result


class TransformerDenoiser(Denoiser):
    """The transformer of Diffusion Policy (Chi et al. 2023), their `TransformerForDiffusion` with time and observations
    as condition.

    action_dim: A. condition_dim: of an encoded history of n_obs_steps equal parts, oldest first, a token each. marked:
    the input has one channel more, which marks the steps of a chunk that are given clean (`policy.Prefix`). two_times:
    the time's token is told how far the step goes as well. horizon: the longest chunk that has positions. width: D.
    causal: an action sees those before it and, as chunks and histories begin at the same step, no later observation.
    dropout: of attention, and of what each part of a layer adds.

    Weights have the names of theirs, but for `decoder.layers.<i>`, here `decoder.<i>`; `pos_emb` and `cond_pos_emb`
    [1, T, D], here the `.weight` [T, D] of an embedding; and `in_proj_weight` [3 D, D] and `in_proj_bias`, here in
    `self_attn` `in_proj.weight` and `.bias`, in `multihead_attn` the first D rows of `query`, the others of
    `key_value`. Their `n_cond_layers` > 0, where tokens of the memory see each other, is not here: then nothing of it
    could be computed once; their configurations have 0.
    """

    def __init__(
        self,
        *,
        action_dim: int,
        condition_dim: int,
        n_obs_steps: int = 1,
        horizon: int = 16,
        marked: bool = False,
        two_times: bool = False,
        width: int = 96,
        layers: int = 3,
        heads: int = 4,
        causal: bool = True,
        dropout: float = 0.0,
    ):
        super().__init__()
        check_sizes(width, heads)
        if condition_dim % n_obs_steps:
            raise InputError(f"a condition of {condition_dim} values has no {n_obs_steps} equal parts")
        self.n_obs_steps, self.horizon = n_obs_steps, horizon
        self.input_emb, self.pos_emb = Linear(action_dim + marked, width), nn.Embedding(horizon, width)
        self.time_emb = SinusoidalEmbedding(width)
        self.span_emb = nn.Linear(width, width) if two_times else None
        self.cond_obs_emb = nn.Linear(condition_dim // n_obs_steps, width)
        self.cond_pos_emb = nn.Embedding(1 + n_obs_steps, width)
        self.encoder = nn.Sequential(nn.Linear(width, 4 * width), nn.Mish(), nn.Linear(4 * width, width))
        self.decoder = nn.ModuleList(DecoderLayer(width, heads, causal=causal, dropout=dropout) for _ in range(layers))
        self.ln_f, self.head = nn.LayerNorm(width), Linear(width, action_dim)
        self.memory_mask: Tensor | None
        step, token = torch.arange(horizon)[:, None], torch.arange(1 + n_obs_steps)
        self.register_buffer("memory_mask", token <= step + 1 if causal else None, persistent=False)
        self.apply(_initialise)

    def check_horizon(self, horizon: int) -> None:
        """`InputError` for a chunk that is longer than there are positions."""
        if horizon > self.horizon:
            raise InputError(f"horizon={horizon}: this transformer has positions for {self.horizon} steps")

    def prepare(self, condition: Tensor, times: Tensor) -> Film:
        """Keys and values of the memory, [K, F] and [B, F]: for each token (time first), for each layer, 2 D values;
        each part with zeros where the other has its own. condition [B, C], times [K] or [K, 2]."""
        span = None if self.span_emb is None else nn.Sequential(self.time_emb, self.span_emb)
        time = embed_times(times, self.time_emb, span)
        observations = self.cond_obs_emb(rearrange(condition, "b (t c) -> b t c", t=self.n_obs_steps))
        positions = self.cond_pos_emb.weight
        steps = self._keys_and_values(time.unsqueeze(1) + positions[:1])
        history = self._keys_and_values(observations + positions[1:])
        return Film(
            steps=F.pad(steps, (0, history.shape[1])),
            condition=F.pad(history, (steps.shape[1], 0)),
        )

    def _keys_and_values(self, tokens: Tensor) -> Tensor:
        """tokens [N, S, D] → [N, S · layers · 2 D]."""
        memory = self.encoder(tokens)
        layers = cast(Iterable[DecoderLayer], self.decoder)
        return torch.cat([layer.multihead_attn.key_value(memory) for layer in layers], dim=-1).flatten(1)

    def forward(self, x: Tensor, film: Tensor) -> Tensor:
        """x [B, H, A] (A + 1: `marked`), film [B, F] (of `Film.at`, in training the sum of its parts) → [B, H, A]."""
        keys_values = rearrange(
            film, "b (token layer d) -> layer b token d", token=1 + self.n_obs_steps, layer=len(self.decoder)
        )
        mask = None if self.memory_mask is None else self.memory_mask[: x.shape[1]]
        h = self.input_emb(x) + self.pos_emb.weight[: x.shape[1]]
        for layer, key_value in zip(self.decoder, keys_values, strict=True):
            h = layer(h, key_value, mask)
        result: Tensor = self.head(self.ln_f(h))
        return result


def _initialise(module: nn.Module) -> None:
    """As theirs (and GPT-2): weights of a spread of 0.02, no biases."""
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)
    if isinstance(module, nn.Linear):
        nn.init.zeros_(module.bias)
