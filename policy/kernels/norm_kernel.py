"""What stands between two convolutions of the U-Net, as one kernel of a GPU, written in Triton (Tillet et al. 2019).

    y [B·T, C] ─▶ + bias ─▶ group norm ─▶ activation ─▶ FiLM ─▶ + shortcut ─▶ [B·T, taps, C] of one or two later layers

A later convolution is one product with rows that hold what its kernel sees, side by side, so the kernel writes every
value to each place where one is seen: at step t of tap j stands step t + j − taps // 2, or zero beyond the ends.
`import` needs the package triton, which torch for CUDA brings along.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import triton
import triton.language as tl

if TYPE_CHECKING:
    from torch import Tensor

ACTIVATIONS = ("silu", "mish", "relu", "gelu")
MOST = 2**15
"""Values of a program at most: the steps of a chunk times the channels of a group, each rounded up to a power of 2."""


@triton.jit  # type: ignore[untyped-decorator]
def _activate(x, name: tl.constexpr):  # type: ignore[no-untyped-def]
    if name == "silu":
        x = x * tl.sigmoid(x)
    elif name == "mish":  # tanh(log(1 + e)) = n / (n + 2) with n = e² + 2 e; 1 within rounding from 20 on
        e = tl.exp(tl.minimum(x, 20.0))
        n = e * (e + 2.0)
        x = x * (n / (n + 2.0))
    elif name == "relu":
        x = tl.maximum(x, 0.0)
    elif name == "gelu":
        x = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    return x


@triton.jit  # type: ignore[untyped-decorator]
def _spread(  # type: ignore[no-untyped-def]
    out,
    value,
    row,
    step,
    channel,
    inside,
    out_row,
    out_tap,
    steps: tl.constexpr,
    taps: tl.constexpr,
):
    """Steps that a tap would read beyond one end are the rows, past the other end, that get its zeros."""
    for tap in tl.static_range(taps):
        seen_at = step - (tap - taps // 2)
        within = (seen_at >= 0) & (seen_at < steps)
        place = (row * steps + (seen_at + taps * steps) % steps) * out_row + tap * out_tap + channel
        tl.store(out + place, tl.where(within, value, 0.0), mask=inside)


@triton.jit  # type: ignore[untyped-decorator]
def _between(  # type: ignore[no-untyped-def]
    y,
    bias,
    gamma,
    beta,
    film,
    add,
    out,
    other,
    channels,
    group,
    eps,
    film_row,
    add_row,
    out_row,
    out_tap,
    other_row,
    other_tap,
    steps: tl.constexpr,
    steps_block: tl.constexpr,
    group_block: tl.constexpr,
    out_taps: tl.constexpr,
    other_taps: tl.constexpr,
    has_bias: tl.constexpr,
    has_norm: tl.constexpr,
    has_film: tl.constexpr,
    has_add: tl.constexpr,
    activation: tl.constexpr,
):
    """One chunk of the batch, one group of channels."""
    row = tl.program_id(0).to(tl.int64)
    within = tl.arange(0, group_block)[None, :]
    channel = tl.program_id(1) * group + within
    step = tl.arange(0, steps_block)[:, None]
    known = (within < group) & (channel < channels)
    inside = (step < steps) & known
    place = row * steps + step
    x = tl.load(y + place * channels + channel, mask=inside, other=0.0).to(tl.float32)
    if has_bias:
        x += tl.load(bias + channel, mask=known, other=0.0).to(tl.float32)
    if has_norm:
        n = group * steps
        x = tl.where(inside, x, 0.0)
        x = tl.where(inside, x - tl.sum(tl.sum(x, 1), 0) / n, 0.0)
        x *= 1.0 / tl.sqrt(tl.sum(tl.sum(x * x, 1), 0) / n + eps)
        x = x * tl.load(gamma + channel, mask=known, other=0.0) + tl.load(beta + channel, mask=known, other=0.0)
        x = _activate(x, activation)
    if has_film:
        scale = film + row * film_row + channel
        x = x * tl.load(scale, mask=known, other=0.0) + tl.load(scale + channels, mask=known, other=0.0)
    if has_add:
        x += tl.load(add + place * add_row + channel, mask=inside, other=0.0).to(tl.float32)
    _spread(out, x, row, step, channel, inside, out_row, out_tap, steps, out_taps)
    if other_taps > 0:
        _spread(other, x, row, step, channel, inside, other_row, other_tap, steps, other_taps)


def tile(steps: int, group: int) -> tuple[int, int]:
    """Rows and columns of what a program holds: powers of two."""
    return triton.next_power_of_2(steps), triton.next_power_of_2(group)


def between(
    y: Tensor,
    out: Tensor,
    other: Tensor | None = None,
    *,
    steps: int,
    group: int,
    bias: Tensor | None = None,
    norm: tuple[Tensor, Tensor, float] | None = None,
    activation: str = "none",
    film: Tensor | None = None,
    add: Tensor | None = None,
) -> None:
    """From y [B · steps, C], contiguous, to out and other [B · steps, taps, C], rows and taps at any distance.

    bias [C]. group: channels that are normalised together, or without `norm` that a program takes. norm: weight and
    bias [C], float32, and eps. activation: one of `ACTIVATIONS`, after a norm. film [B, 2 C], float32: scales, then
    shifts. add [B · steps, C], rows at any distance. All is computed in float32.
    """
    rows, channels = y.shape
    gamma, beta, eps = norm or (y, y, 0.0)
    rows_held, columns_held = tile(steps, group)
    _between[(rows // steps, triton.cdiv(channels, group))](
        y,
        y if bias is None else bias,
        gamma,
        beta,
        y if film is None else film,
        y if add is None else add,
        out,
        out if other is None else other,
        channels,
        group,
        eps,
        0 if film is None else film.stride(0),
        0 if add is None else add.stride(0),
        out.stride(0),
        out.stride(1),
        0 if other is None else other.stride(0),
        0 if other is None else other.stride(1),
        steps=steps,
        steps_block=rows_held,
        group_block=columns_held,
        out_taps=out.shape[1],
        other_taps=0 if other is None else other.shape[1],
        has_bias=bias is not None,
        has_norm=norm is not None,
        has_film=film is not None,
        has_add=add is not None,
        activation=activation,
        num_warps=4 if rows_held * columns_held <= 2**12 else 8,
    )
