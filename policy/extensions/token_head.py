"""Chunks as a few whole numbers, and a network that says them one after the other.

    chunk [B, H, A] ──cosine transform over time──▶ the first F frequencies ──rounded──▶ tokens [B, F · A]

A cosine transform gathers what a smooth chunk does in few numbers (FAST, "Efficient Action Tokenization for
Vision-Language-Action Models", Pertsch et al. 2025, which packs them further by byte pairs; here each is a token).
Low frequencies come first, so that the first tokens say the coarse way, and all later ones know it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from action_diffusion.errors import InputError
from action_diffusion.policy.value.noise import cosine_basis


class ChunkTokens:
    """horizon: H. frequencies: F ≤ H, how many are kept. levels: a coefficient is one of −levels, …, levels, in units
    of `size`; the orthonormal transform of a constant 1 is √H. Raises `InputError` for more frequencies than steps."""

    def __init__(self, *, horizon: int, frequencies: int, levels: int, size: float) -> None:
        if frequencies > horizon:
            raise InputError(f"frequencies={frequencies} are more than a chunk of {horizon} steps has")
        self.levels, self.size = levels, size
        with torch.device("cpu"):
            self.basis = cosine_basis(horizon)[:frequencies]
        self.vocabulary = 2 * levels + 1

    def encode(self, chunk: Tensor) -> Tensor:
        """[B, H, A], normalised → int64 [B, F · A] from 0 to `vocabulary` − 1, low frequencies first."""
        coefficients = torch.einsum("fh,bha->bfa", self.basis.to(chunk), chunk)
        whole = (coefficients / self.size).round().clamp(-self.levels, self.levels) + self.levels
        return rearrange(whole, "b f a -> b (f a)").long()

    def decode(self, tokens: Tensor) -> Tensor:
        """The chunk [B, H, A] of tokens [B, F · A]; what was rounded away is not in it."""
        coefficients = rearrange((tokens - self.levels) * self.size, "b (f a) -> b f a", f=len(self.basis))
        return torch.einsum("fh,bfa->bha", self.basis.to(coefficients), coefficients)


class TokenHead(nn.Module):
    """p(token i | those before it, condition), by a recurrent network (Cho et al. 2014) that begins with the condition.

    condition_dim: C. n_tokens: of a chunk. vocabulary: of each. hidden: size of the state.
    """

    def __init__(self, *, condition_dim: int, n_tokens: int, vocabulary: int, hidden: int) -> None:
        super().__init__()
        self.begin = nn.Sequential(nn.Linear(condition_dim, hidden), nn.Mish(), nn.Linear(hidden, hidden))
        self.token = nn.Embedding(vocabulary + 1, hidden)  # the last one: nothing said yet
        self.place = nn.Embedding(n_tokens, hidden)
        self.cell = nn.GRU(hidden, hidden, batch_first=True)
        self.out = nn.Linear(hidden, vocabulary)
        self.n_tokens, self.nothing = n_tokens, vocabulary

    def loss(self, condition: Tensor, tokens: Tensor) -> Tensor:
        """Cross entropy, a scalar. condition [B, C], tokens [B, N]."""
        before = F.pad(tokens[:, :-1], (1, 0), value=self.nothing)
        states, _ = self.cell(self.token(before) + self.place.weight, self.begin(condition).unsqueeze(0).contiguous())
        return F.cross_entropy(self.out(states).flatten(0, 1), tokens.flatten())

    @torch.no_grad()
    def most_likely(self, condition: Tensor) -> tuple[Tensor, Tensor]:
        """The likeliest token after those before, one by one: tokens [B, N], and the probability of each [B, N]."""
        state = self.begin(condition).unsqueeze(0).contiguous()
        last = torch.full((len(condition),), self.nothing, device=condition.device)
        said, sure = [], []
        for place in range(self.n_tokens):
            out, state = self.cell((self.token(last) + self.place.weight[place]).unsqueeze(1), state)
            probability, last = self.out(out[:, 0]).softmax(dim=-1).max(dim=-1)
            said.append(last)
            sure.append(probability)
        return torch.stack(said, dim=1), torch.stack(sure, dim=1)
