"""What was tried and what came of it, a row a chunk, in fixed memory: the newest rows replace the oldest.

    condition [C] ── action [Ta · A], of a chunk that began with noise [H · A] ──▶ reward, next_condition, discount

reward: Σ_i γ^i r_i over the n steps that were executed; discount: γ^n, or 0 where the episode came to its end with
them, so that r + discount · V(next) is right in both cases. An episode that was cut off by its time limit is no end:
what follows it nobody has seen, so its last row is left out.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from action_diffusion.errors import InputError

Rows = dict[str, Tensor]
"""Name → float32 [B, …], rows in the same order."""


class Transitions:
    """At most `capacity` rows on a device. The first `add` says which names and shapes there are."""

    def __init__(self, capacity: int, device: str | torch.device = "cpu") -> None:
        self.capacity, self.device = capacity, torch.device(device)
        self._arrays: Rows = {}
        self._added = 0

    def __len__(self) -> int:
        return min(self._added, self.capacity)

    def add(self, rows: Mapping[str, Tensor]) -> None:
        """Rows [B, …] of each name. Raises `InputError` where one is not finite: nothing is learnt from that."""
        counts = {len(value) for value in rows.values()}
        if len(counts) > 1 or (self._arrays and rows.keys() != self._arrays.keys()):
            raise ValueError(f"rows { ({name: len(value) for name, value in rows.items()}) } do not belong together")
        for name, value in rows.items():
            if not torch.isfinite(value).all():
                raise InputError(f"{name} of a trial holds NaN or infinity")
            if name not in self._arrays:
                self._arrays[name] = torch.zeros((self.capacity, *value.shape[1:]), device=self.device)
        n = counts.pop() if counts else 0
        places = (self._added + torch.arange(n, device=self.device)) % self.capacity
        for name, value in rows.items():
            self._arrays[name][places] = value.detach().to(self.device, torch.float32)
        self._added += n

    def sample(self, n: int, generator: torch.Generator | None = None) -> Rows:
        """n rows, each of those that are there as likely."""
        chosen = torch.randint(len(self), (n,), generator=generator).to(self.device)
        return {name: value[chosen] for name, value in self._arrays.items()}

    def newest(self, n: int) -> Rows:
        """The last n rows, oldest first."""
        places = (self._added - min(n, len(self)) + torch.arange(min(n, len(self)), device=self.device)) % self.capacity
        return {name: value[places] for name, value in self._arrays.items()}

    def state(self) -> Rows:
        """What is there, for a checkpoint."""
        return self.newest(len(self))


def mixed(sources: list[Transitions], n: int, generator: torch.Generator | None = None) -> Rows:
    """n rows, as many from each source that has any (half offline, half online: RLPD, Ball et al. 2023).

    Only names that all of them have.
    """
    there = [source for source in sources if len(source)]
    counts = [n // len(there) + (index < n % len(there)) for index in range(len(there))]
    parts = [source.sample(count, generator) for source, count in zip(there, counts, strict=True)]
    names = set.intersection(*(set(part) for part in parts))
    return {name: torch.cat([part[name] for part in parts]) for name in sorted(names)}
