"""Two heads on one encoder: tokens choose, the denoiser does (after HybridVLA, Liu et al. 2025).

A token head (`token_head`) is trained on the policy's own encoded observations, whose weights stay as they are.
It commits itself: after the first token says left, no later one says right. A denoiser in few steps does not: between
two ways its first estimate is their mean. Tokens are rounded, and the denoiser is not. So

    first steps, tau ≤ until     x̂0 ← the tokens' chunk, where its confidence, the mean of p(token), is ≥ confidence
    the others                   x̂0 is the denoiser's, from there on

HybridVLA takes the mean of both heads' actions where the tokens are sure, and the denoiser's alone elsewhere. A mean of
two ways is neither, so here the one begins and the other ends.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any

import numpy as np
import torch
from torch import Tensor

from action_diffusion.datasets.batches.loader import BatchSource
from action_diffusion.errors import InputError
from action_diffusion.options.extensions import TokensOptions
from action_diffusion.policy.diffusion.sampler import Hook, StepState
from action_diffusion.policy.extensions.extension import Extension, Fitted
from action_diffusion.policy.extensions.token_head import ChunkTokens, TokenHead
from action_diffusion.policy.policy import DiffusionPolicy
from action_diffusion.policy.sample import Encoded
from action_diffusion.progress import progress
from action_diffusion.schema import Above, check, hints

BATCH = 256
OPTIONS = hints(TokensOptions)


class Tokens(Extension):
    """Notes: "tokens.confidence" [B]."""

    def __init__(self, policy: DiffusionPolicy, fitted: Fitted) -> None:
        super().__init__(policy, fitted)
        try:
            for option in ("frequencies", "levels", "hidden", "until", "confidence"):
                check(fitted.options[option], OPTIONS[option], option)
            check(fitted.options["size"], Annotated[float, Above(0, 1e12)], "size")
            with torch.device("meta"):  # no memory before the arrays' shapes are looked at
                self.tokens, self.head = _parts(policy, fitted.options)
            self.until, self.confidence = float(fitted.options["until"]), float(fitted.options["confidence"])
            weights = {name: torch.from_numpy(value) for name, value in fitted.arrays.items()}
            self.head.load_state_dict(weights, assign=True)
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise InputError(f"extension tokens does not belong to this policy: {str(error)[:200]}") from None
        self.head = self.head.to(policy.device).eval().requires_grad_(False)
        self._sure: Tensor | None = None

    @classmethod
    def fit(
        cls, policy: DiffusionPolicy, train: BatchSource, held_out: BatchSource, options: Mapping[str, Any]
    ) -> Fitted:
        """Train the token head; `Fitted.options` then has its accuracy and confidence on held-out windows."""
        torch.manual_seed(options["seed"])
        if options["frequencies"] > policy.spec.horizon:
            raise InputError(
                f"frequencies={options['frequencies']} must be at most {policy.spec.horizon}, the steps of a chunk"
            )
        dim = _examples(policy, train, np.zeros(1, np.int64))[0].shape[1]
        options = {**options, "condition_dim": dim, "size": _size(policy, train, options)}
        tokens, head = _parts(policy, options)
        head = head.to(policy.device)
        optimizer = torch.optim.AdamW(head.parameters(), lr=options["lr"], weight_decay=1e-6)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, options["steps"])
        random = np.random.default_rng(options["seed"])
        with progress("token head", options["steps"]) as advance:
            for _ in range(options["steps"]):
                condition, chunk = _examples(policy, train, random.integers(len(train), size=BATCH))
                loss = head.loss(condition, tokens.encode(chunk))
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                advance(1)
        right, sure = [], []
        for indices in _batches(len(held_out)):
            condition, chunk = _examples(policy, held_out, indices)
            said, probability = head.most_likely(condition)
            right.append((said == tokens.encode(chunk)).float().mean(dim=1))
            sure.append(probability.mean(dim=1))
        found = {"accuracy": float(torch.cat(right).mean()), "mean_confidence": float(torch.cat(sure).mean())}
        arrays = {name: value.detach().cpu().numpy() for name, value in head.state_dict().items()}
        return Fitted({**options, **found}, arrays)

    def hooks(self, seen: Encoded) -> Sequence[Hook]:
        said, probability = self.head.most_likely(seen.condition.float())
        self._sure = probability.mean(dim=1)
        return [_SureBegin(self.tokens.decode(said), self._sure >= self.confidence, self.until)]

    def finish(self, seen: Encoded, normalized: Tensor) -> tuple[Tensor, Mapping[str, Tensor]]:
        assert self._sure is not None
        return normalized, {"tokens.confidence": self._sure}


class _SureBegin(Hook):
    """chunk [B, H, A], sure: bool [B]."""

    def __init__(self, chunk: Tensor, sure: Tensor, until: float) -> None:
        self.chunk, self.sure, self.until = chunk, sure.view(-1, 1, 1), until

    def edit_x0(self, state: StepState) -> Tensor:
        if state.tau > self.until:
            return state.x0_hat
        return torch.where(self.sure, self.chunk.to(state.x0_hat.dtype), state.x0_hat)


def _parts(policy: DiffusionPolicy, options: Mapping[str, Any]) -> tuple[ChunkTokens, TokenHead]:
    spec = policy.spec
    kept = {name: options[name] for name in ("frequencies", "levels", "size")}
    tokens = ChunkTokens(horizon=spec.horizon, **kept)
    head = TokenHead(
        condition_dim=options["condition_dim"],
        n_tokens=options["frequencies"] * spec.noise_shape[1],
        vocabulary=tokens.vocabulary,
        hidden=options["hidden"],
    )
    return tokens, head


def _examples(policy: DiffusionPolicy, source: BatchSource, indices: np.ndarray) -> tuple[Tensor, Tensor]:
    """Conditions [B, C] and normalised chunks [B, H, A] of windows."""
    batch = source.gather(indices)
    with torch.no_grad():
        seen = policy.see(batch.obs)
        return seen.condition, policy.normalize_action(batch.action, seen.obs)


def _size(policy: DiffusionPolicy, source: BatchSource, options: Mapping[str, Any]) -> float:
    """Of a level: so that the largest demonstrated coefficient is the last one."""
    most, plain = 0.0, ChunkTokens(horizon=policy.spec.horizon, frequencies=options["frequencies"], levels=1, size=1.0)
    for indices in _batches(len(source)):
        _, chunk = _examples(policy, source, indices)
        most = max(most, float(torch.einsum("fh,bha->bfa", plain.basis.to(chunk), chunk).abs().max()))
    return max(most, 1e-6) / int(options["levels"])


def _batches(n: int, most: int = 4096) -> Iterator[np.ndarray]:
    """At most so many windows, spread evenly over all."""
    chosen = np.unique(np.linspace(0, n - 1, min(n, most)).round().astype(np.int64))
    yield from (chosen[first : first + BATCH] for first in range(0, len(chosen), BATCH))
