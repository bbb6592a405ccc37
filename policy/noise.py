"""Who draws the noise of chunks: torch's generator on a CPU, or one that draws the same numbers without torch.

    generator(seed)          torch's where torch is loaded, else a `NumpyGenerator`
    draw(shape, generator)   standard normal numbers of either

A policy that needs no torch (`runtime`, a policy server's client) thus meets the noise that it was evaluated with: the
same numbers, up to rounding in float32. States are torch's, byte for byte, so that they travel between both kinds.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from action_diffusion.errors import InputError

if TYPE_CHECKING:
    import torch

_STATE = np.dtype(
    [
        ("seed", "<u8"),
        ("left", "<i4"),
        ("seeded", "<i4"),
        ("next", "<u8"),
        ("key", "<u8", 624),
        ("unused", "<f8"),
        ("double", "<f8"),
        ("unused_too", "<f8"),
        ("has_double", "<i4"),
        ("padding", "V4"),
        ("single", "<f4"),
        ("has_single", "?"),
        ("padding_too", "V3"),
    ]
)
"""Of a torch.Generator on a CPU, as `get_state` gives it: a Mersenne Twister, and a number that is left over."""
_WORDS = 624
_BLOCK = 16


class NumpyGenerator:
    """`torch.Generator` of a CPU as far as noise needs it: seeds, states, and the normal numbers of `torch.randn`."""

    def __init__(self, seed: int = 0) -> None:
        self.manual_seed(seed)

    def manual_seed(self, seed: int) -> NumpyGenerator:
        """Begin anew; `seed` from 0 to 2^64 - 1."""
        self._seed = seed
        self._bits = np.random.MT19937()
        self._bits._legacy_seeding(seed & 0xFFFFFFFF)  # torch's way, of 32 bits
        self._left_over: float | None = None
        return self

    def initial_seed(self) -> int:
        return self._seed

    def state(self) -> np.ndarray:
        """uint8 [5056]."""
        words, position = self._bits.state["state"]["key"], int(self._bits.state["state"]["pos"])
        state = np.zeros((), _STATE)
        state["seed"], state["seeded"], state["key"] = self._seed, 1, words
        state["left"], state["next"] = _WORDS + 1 - position if position < _WORDS else 1, position
        if self._left_over is not None:
            state["has_double"], state["double"] = 1, self._left_over
        return np.frombuffer(state.tobytes(), np.uint8).copy()

    def set_state(self, state: np.ndarray) -> None:
        """The inverse of `state`. Raises `InputError` for bytes that are none."""
        if state.dtype != np.uint8 or state.shape != (_STATE.itemsize,):
            raise InputError(f"a generator's state is uint8 [{_STATE.itemsize}], not {state.dtype} {list(state.shape)}")
        read = np.frombuffer(state.tobytes(), _STATE)[0]
        left, following, words = int(read["left"]), int(read["next"]), read["key"]
        if read["seeded"] != 1 or not 0 < left <= _WORDS or following > _WORDS or words.max() > 0xFFFFFFFF:
            raise InputError("the bytes are no state of a generator")
        self._seed = int(read["seed"])
        self._left_over = float(read["double"]) if read["has_double"] else None
        position = _WORDS if left == 1 else following
        self._bits.state = {"bit_generator": "MT19937", "state": {"key": words.astype(np.uint32), "pos": position}}

    def normal(self, n: int) -> np.ndarray:
        """float32 [n], as `torch.randn(n)` has them."""
        if n < _BLOCK:
            return np.array([self._one() for _ in range(n)], np.float32)
        values = self._uniform(n)
        whole = n - n % _BLOCK
        values[:whole] = _box_muller(values[:whole])
        if n % _BLOCK:  # torch draws the last block again, over what is there
            values[-_BLOCK:] = _box_muller(self._uniform(_BLOCK))
        return values

    def _uniform(self, n: int) -> np.ndarray:
        """float32 [n] of [0, 1), of 24 bits each."""
        return (self._bits.random_raw(n) & 0xFFFFFF).astype(np.float32) * np.float32(2.0**-24)

    def _one(self) -> float:
        """By Box and Muller in double precision, which make two."""
        if self._left_over is not None:
            value, self._left_over = self._left_over, None
            return value
        high, low, high_too, low_too = (int(word) for word in self._bits.random_raw(4))
        turn, length = (((a << 32 | b) & (2**53 - 1)) * 2.0**-53 for a, b in ((high, low), (high_too, low_too)))
        radius, angle = np.sqrt(-2.0 * np.log1p(-length)), 2.0 * np.pi * turn
        self._left_over = float(radius * np.sin(angle))
        return float(radius * np.cos(angle))


def _box_muller(uniform: np.ndarray) -> np.ndarray:
    """float32 [16 n] → [16 n]: of each block the first half are lengths, and the second angles."""
    length, turn = np.moveaxis(uniform.reshape(-1, 2, _BLOCK // 2), 1, 0)
    radius, angle = np.sqrt(-2 * np.log(1 - length)), np.float32(2 * np.pi) * turn
    return np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1).reshape(-1)


Generator = "torch.Generator | NumpyGenerator"


def generator(seed: int = 0) -> Any:
    """Of this seed, from 0 to 2^64 - 1: torch's where torch is loaded, else one by numpy that draws the same."""
    if "torch" not in sys.modules:
        return NumpyGenerator(seed)
    import torch

    return torch.Generator().manual_seed(seed)


def state_of(generator: torch.Generator | NumpyGenerator) -> np.ndarray:
    """uint8 [5056] of one on a CPU."""
    if isinstance(generator, NumpyGenerator):
        return generator.state()
    state: np.ndarray = generator.get_state().numpy()
    return state


def set_state(generator: torch.Generator | NumpyGenerator, state: np.ndarray) -> None:
    """Go on from a state. Raises `InputError` for bytes that are none."""
    if isinstance(generator, NumpyGenerator):
        generator.set_state(state)
        return
    import torch

    try:
        generator.set_state(torch.from_numpy(state.copy()))
    except (RuntimeError, TypeError) as error:
        raise InputError(f"the bytes are no state of a torch.Generator on a CPU: {error}") from None


def draw(shape: Sequence[int], generator: Any, *, by_numpy: bool = False) -> np.ndarray:
    """Standard normal numbers float32 [B, …]. generator: one for all rows, or a sequence of one for each; None: anew.

    by_numpy: with the same last bits whether torch is loaded or not; a generator of torch goes on as if it had drawn.
    Raises `InputError` for another number of generators than rows.
    """
    if isinstance(generator, Sequence):
        if len(generator) != shape[0]:
            raise InputError(f"{len(generator)} generators for {shape[0]} rows; give one, or one per row")
        return np.concatenate([draw((1, *shape[1:]), one, by_numpy=by_numpy) for one in generator])
    if generator is None:
        generator = NumpyGenerator(int(np.random.SeedSequence().generate_state(1, np.uint64)[0]))
    if isinstance(generator, NumpyGenerator):
        return generator.normal(int(np.prod(shape))).reshape(shape)
    if by_numpy:
        ours = NumpyGenerator()
        ours.set_state(state_of(generator))
        values = ours.normal(int(np.prod(shape))).reshape(shape)
        set_state(generator, ours.state())
        return values
    import torch

    from action_diffusion.policy.diffusion.sampler import draw_noise

    return draw_noise(shape, generator, torch.device("cpu"), torch.float32).cpu().numpy()
