"""What happens to uint8 frames before the network: crops, colour jitter, and the way to [-1, 1].

Every draw is made once per window and holds for all its To frames: a camera that jumps between two consecutive
observations would show the policy a motion that did not happen.

    frames [B, To, H, W, 3]       a crop is (top, left) in [0, H - h] x [0, W - w], one per window
    +---------- W ----------+
    |   left                |
    |<------>+-- w --+      |
    |        h       h      |
    |        +-------+      |
    +-----------------------+
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple, Protocol

import torch
from einops import rearrange
from torch import Tensor
from torch.nn.functional import interpolate

from action_diffusion.datasets.batches import pixels
from action_diffusion.errors import InputError, unknown
from action_diffusion.policy.model.shares import drawn

_GRAY = (0.2989, 0.587, 0.114)
"""Weights of red, green and blue in a gray level (ITU-R BT.601, as torchvision rounds them)."""


def to_float(frames: Tensor) -> Tensor:
    """uint8 [N, h, w, 3], 0 to 255, as float32 [N, 3, h, w], 0 to 1; the memory stays channels-last."""
    return rearrange(pixels.to_float(frames), "n h w c -> n c h w")


def centred(images: Tensor) -> Tensor:
    """Images in [0, 1] to [-1, 1], in place and in one pass over the memory."""
    return torch.add(images.new_full((), -1.0), images, alpha=2.0, out=images)


def resized(images: Tensor, size: tuple[int, int]) -> Tensor:
    """Images [N, 3, H, W] scaled to `size` (h, w): bilinear, and smoothed first where that shrinks them."""
    return interpolate(images, size=size, mode="bilinear", antialias=True)


def random_corners(n: int, room: tuple[int, int], generator: torch.Generator | None) -> Tensor:
    """`n` corners (top, left), int64 [n, 2], uniform over 0..room in each direction, on the generator's device."""
    device = None if generator is None else generator.device

    def along(space: int) -> Tensor:
        return drawn(lambda rows, g: torch.randint(space + 1, (rows,), generator=g, device=device), n, generator)

    return torch.stack([along(space) for space in room], dim=1)


def crop_windows(frames: Tensor, corners: Tensor, size: tuple[int, int]) -> Tensor:
    """Cut `size` (h, w) at corners [B, 2] out of frames [B, To, H, W, 3]: [B, To, h, w, 3], a copy."""
    b, to = frames.shape[:2]
    rows = torch.arange(b * to, device=frames.device).view(b, to)
    return pixels.cut(frames.flatten(0, 1).contiguous(), rows, corners.to(frames.device), size)


def crop_at(frames: Tensor, size: tuple[int, int], corner: tuple[int, int] | None = None) -> Tensor:
    """`size` (h, w) of frames [..., H, W, 3] from `corner` (top, left) on, as a view.

    Without one the middle, where an odd pixel is left over below and right.
    """
    middle = ((have - want) // 2 for have, want in zip(frames.shape[-3:-1], size, strict=True))
    top, left = middle if corner is None else corner
    return frames[..., top : top + size[0], left : left + size[1], :]


class Augmentation(Protocol):
    """What may happen to images in training, beside crops and colour jitter."""

    def __call__(self, images: Tensor, generator: torch.Generator | None) -> Tensor:
        """Images [B, To, 3, h, w] in [0, 1] as others of the same shape; a window's To frames change alike."""
        ...


class Noise:
    """Gaussian noise of standard deviation `sigma` (0 to 1, of the whole range) on every pixel, clipped to [0, 1]."""

    def __init__(self, *, sigma: float):
        if not 0 <= sigma <= 1:
            raise InputError(f"augmentation noise: sigma={sigma} must be from 0 to 1")
        self.sigma = sigma

    def __call__(self, images: Tensor, generator: torch.Generator | None) -> Tensor:
        device = images.device if generator is None else generator.device
        noise = torch.randn(images.shape, generator=generator, device=device).to(images)
        return (images + self.sigma * noise).clamp_(0, 1)


class JitterFactors(NamedTuple):
    """What to do to each image, [N] each: brightness, contrast and saturation multiply, hue is a shift in turns."""

    brightness: Tensor
    contrast: Tensor
    saturation: Tensor
    hue: Tensor


class ColorJitter:
    """Random brightness, contrast, saturation and hue, in this order, for a whole batch at once.

    strength: one number s for brightness, contrast and saturation, or a mapping with any of "brightness", "contrast",
    "saturation" and "hue". The first three draw a factor from [max(0, 1 - s), 1 + s], hue a shift from [-s, s] turns,
    s <= 0.5; hue has to be asked for by name, because it changes what a colour says about an object. Each operation
    does what the `adjust_...` function of `torchvision.transforms.v2.functional` does with the same factor.
    Raises `InputError` for an unknown name or a strength out of range.
    """

    def __init__(self, *, strength: float | Mapping[str, float]):
        if not isinstance(strength, Mapping):
            strength = dict.fromkeys(("brightness", "contrast", "saturation"), strength)
        for name, value in strength.items():
            if name not in JitterFactors._fields:
                raise unknown("color_jitter", name, JitterFactors._fields)
            largest = 0.5 if name == "hue" else float("inf")
            if not (isinstance(value, int | float) and 0 <= value <= largest):
                raise InputError(f"color_jitter {name}={value!r}: expected a number from 0 to {largest:g}")
        self.strength = {name: float(strength.get(name, 0.0)) for name in JitterFactors._fields}

    def __bool__(self) -> bool:
        return any(self.strength.values())

    def draw(self, n: int, generator: torch.Generator | None) -> JitterFactors:
        """Factors for `n` windows, float32 [n] each, on the generator's device."""
        device = None if generator is None else generator.device
        uniform = drawn(lambda rows, g: torch.rand(4, rows, generator=g, device=device).T, n, generator).T
        factors = {}
        for u, (name, s) in zip(uniform, self.strength.items(), strict=True):
            low, high = (-s, s) if name == "hue" else (max(0.0, 1.0 - s), 1.0 + s)
            factors[name] = low + (high - low) * u
        return JitterFactors(**factors)

    def __call__(self, images: Tensor, factors: JitterFactors) -> Tensor:
        """Images [N, 3, h, w] in [0, 1] with factors [N]; operations of strength 0 are skipped."""
        for name, adjust in ADJUST.items():
            if self.strength[name]:
                factor = getattr(factors, name).to(images.device)
                images = adjust(images, factor.view(-1, 1, 1, 1))
        return images


def adjust_brightness(images: Tensor, factor: Tensor) -> Tensor:
    """Images [N, 3, h, w] in [0, 1] times factor [N, 1, 1, 1], clipped to [0, 1]."""
    return (images * factor).clamp_(0, 1)


def adjust_contrast(images: Tensor, factor: Tensor) -> Tensor:
    """Images [N, 3, h, w] in [0, 1] moved from their mean gray level by factor [N, 1, 1, 1], clipped."""
    return torch.lerp(_gray(images).mean(dim=(1, 2, 3), keepdim=True), images, factor).clamp_(0, 1)


def adjust_saturation(images: Tensor, factor: Tensor) -> Tensor:
    """Images [N, 3, h, w] in [0, 1], each pixel moved from its gray level by factor [N, 1, 1, 1], clipped."""
    return torch.lerp(_gray(images), images, factor).clamp_(0, 1)


def adjust_hue(images: Tensor, shift: Tensor) -> Tensor:
    """Images [N, 3, h, w] in [0, 1] with their hue turned by shift [N, 1, 1, 1], in turns."""
    value, minimum = images.amax(dim=1, keepdim=True), images.amin(dim=1, keepdim=True)
    chroma = value - minimum
    hue = (_hue(images, value, chroma) + shift) % 1.0
    # Back to RGB: a channel is V - C * clip(min(k, 4 - k), 0, 1) with k = (n + 6 hue) mod 6, n = 5, 3, 1 for R, G, B.
    k = (torch.tensor([5.0, 3.0, 1.0], device=images.device).view(1, 3, 1, 1) + 6.0 * hue) % 6.0
    return value - chroma * torch.minimum(k, 4.0 - k).clamp_(0, 1)


def _hue(images: Tensor, value: Tensor, chroma: Tensor) -> Tensor:
    """Hue [N, 1, h, w] in turns, 0 for gray: which channel is largest, and where the others lie around it."""
    r, g, b = images.split(1, dim=1)
    divisor = torch.where(chroma == 0, 1.0, chroma)
    from_green = 2.0 + (b - r) / divisor
    from_blue = 4.0 + (r - g) / divisor
    sixth = torch.where(value == r, (g - b) / divisor, torch.where(value == g, from_green, from_blue))
    return sixth / 6.0


def _gray(images: Tensor) -> Tensor:
    """Gray level [N, 1, h, w] of images [N, 3, h, w]."""
    r, g, b = images.split(1, dim=1)
    result: Tensor = r * _GRAY[0] + g * _GRAY[1] + b * _GRAY[2]
    return result


ADJUST = {
    "brightness": adjust_brightness,
    "contrast": adjust_contrast,
    "saturation": adjust_saturation,
    "hue": adjust_hue,
}
