"""Random numbers of a training batch that several processes share.

A process draws those of the whole batch and takes its own rows, so that 1, 2 and 4 processes with the same batch
together train on the same times, noise and crops:

    whole batch  [ process 0 | process 1 | … ]      drawn by each, from the same seed
    its share                  [ rows ]
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


class Share(torch.Generator):
    """Draws for itself as any generator does, and by `drawn` for its rows of the whole batch.

    own, together: seeds; the second is the same in all processes. rows: of this process, which is `rank` of `world`.
    """

    def __new__(cls, device: torch.device, **_: int) -> Share:
        return super().__new__(cls, device)  # type: ignore[call-arg]

    def __init__(self, device: torch.device, *, own: int, together: int, rows: int, rank: int, world: int) -> None:
        self.manual_seed(own)
        self.together = torch.Generator(device).manual_seed(together)
        self.rows, self.rank, self.world = rows, rank, world


def drawn(draw: Callable[[int, torch.Generator | None], Tensor], n: int, generator: torch.Generator | None) -> Tensor:
    """`draw(n, generator)`, a tensor [n, …]; of a `Share`, the rows of this process of what all of them draw.

    n: as many rows as this process has, or several times as many, one batch behind the other.
    """
    return _shared(draw, n, generator) if isinstance(generator, Share) else draw(n, generator)


# torch.compile knows no members of a generator.
@torch.compiler.disable  # type: ignore[untyped-decorator]
def _shared(draw: Callable[[int, torch.Generator | None], Tensor], n: int, generator: Share) -> Tensor:
    if n % generator.rows:
        return draw(n, generator)
    whole = draw(n * generator.world, generator.together)
    times = n // generator.rows
    of_all = whole.view(times, generator.world, generator.rows, *whole.shape[1:])
    return of_all[:, generator.rank].flatten(0, 1)
