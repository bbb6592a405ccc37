"""The observation encoder: the last To observations in, one embedding for the denoiser out.

    states [B, To, n]        ───────────────────────────────────────────────────────────────┐
    frames [B, To, H, W, 3] ─▶ crop, jitter ─▶ [B*To, 3, h, w] ─▶ ResNet ─▶ pool ─▶ [., F] ──┴▶ [B, To * D] ─┐
    depth [B, To, H, W, 2]   ─▶ crop ─▶ [B*To, 2, h, w] ─▶ ResNet ─▶ pool ─▶ [., F], beside those of the frames
    points [B, To, P, C]     ─▶ for each point, then the maximum, see `points` ─▶ [., F], beside them as well
    words [B, To, E]         ─▶ those of the last step ─▶ projection [B, F'] ────────────────────────────────┤
    series [B, To, n]        ─▶ causal convolutions over all samples, see `series` ─▶ [B, F"] ───────────────┴▶ [B, C]

All To frames of all windows go through the network as one batch. An embedding is its steps one after the other, oldest
first, and a step is its states, in order, its cameras, its depth and its points: D is the sum of all n and of all F.
What a robot is told does not change from step to step, so that it is there once, as are the features of a series. Where
depth is known is a channel of its own: norms take the mean out, and it tells how far a wall is that fills the frame.

Names of weights: `cameras.<i>.` for camera i, or `cameras.0.` when they share a network; in it
`backbone.<0, 1, 4 to 7>` (see `resnet`), `pool.nets`, `pool.pos_grid` and `out`;
`depths.<i>.` likewise, `points.<i>.` for points i, `texts.<i>.` for the words of text i, `series.<i>.` for series i.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from einops import rearrange
from torch import Tensor, nn

from action_diffusion.errors import InputError, unknown
from action_diffusion.options.policy import check_crop
from action_diffusion.policy.model.encoders import augment as augmentation
from action_diffusion.policy.model.encoders import resnet
from action_diffusion.policy.model.encoders.context import Context
from action_diffusion.policy.model.encoders.points import PointEncoder
from action_diffusion.policy.model.encoders.series import Series
from action_diffusion.registry import AUGMENTATIONS, check_arguments

Size = tuple[int, int]


class SpatialSoftmax(nn.Module):
    """Where in the image each of K learned features is (Levine et al. 2016, "End-to-end training of deep visuomotor
    policies"): features [N, C, h, w] to expected positions [N, K, 2].

    A 1 x 1 convolution makes K maps; the softmax of a map over all its places is a distribution, and its mean the
    position (x, y): x from -1 (left) to 1 (right), y from -1 (top) to 1 (bottom), centres of the outermost places.
    """

    pos_grid: Tensor

    def __init__(self, *, channels: int, size: Size, keypoints: int):
        super().__init__()
        self.nets = nn.Conv2d(channels, keypoints, kernel_size=1)
        y, x = torch.meshgrid(_axis(size[0]), _axis(size[1]), indexing="ij")
        self.register_buffer("pos_grid", torch.stack([x.flatten(), y.flatten()], dim=1))  # (h * w, 2)

    def forward(self, features: Tensor) -> Tensor:
        logits = self.nets(features).flatten(2).float()
        # A sum, not a matrix product: autocast would do the product in bfloat16, which has eight bits for a position.
        result: Tensor = (logits.softmax(dim=2).unsqueeze(3) * self.pos_grid).sum(dim=2)
        return result


class CameraEncoder(nn.Module):
    """Frames of one camera, float32 [N, 3, h, w] in [-1, 1], to features [N, feature_dim], not negative."""

    def __init__(self, *, backbone: resnet.ResNet, size: Size, pooling: str, keypoints: int, feature_dim: int):
        super().__init__()
        if keypoints < 1 or feature_dim < 1:
            raise InputError(f"encoder.keypoints={keypoints}, encoder.feature_dim={feature_dim}: expected at least 1")
        self.backbone = backbone
        self.pool: nn.Module
        if pooling == "spatial_softmax":
            height, width = (-(-side // backbone.stride) for side in size)
            self.pool = SpatialSoftmax(channels=backbone.out_channels, size=(height, width), keypoints=keypoints)
            pooled = 2 * keypoints
        elif pooling == "average":
            self.pool = nn.AdaptiveAvgPool2d(1)
            pooled = backbone.out_channels
        else:
            raise unknown("encoder.pooling", pooling, ("spatial_softmax", "average"))
        self.out = nn.Linear(pooled, feature_dim)

    def forward(self, images: Tensor) -> Tensor:
        result: Tensor = self.out(self.pool(self.backbone(images)).flatten(1)).relu()
        return result


class ObservationEncoder(nn.Module):
    """Encodes cameras and states for a diffusion policy (Chi et al. 2023).

    image_keys: cameras, in order. image_shapes: key to (H, W, 3). state_dims: state key to n, in order.
    backbone: resnet18, 34, 50, 101 or 152. width, stages: thinner and shorter networks, see `resnet.ResNet`.
    pooling: "spatial_softmax" (positions of `keypoints` features) or "average". feature_dim: F, per camera.
    resize: (h, w) that frames are scaled to first. crop: (h, w) cut then, at random in training and from the centre
    otherwise, or at crop_at: (top, left). color_jitter: see `augment.ColorJitter`; in training only.
    augment: further augmentations in order, each {name, …} of `registry.AUGMENTATIONS`: called with images
    [B, To, 3, h, w] in [0, 1] and a generator, in training only.
    share: one network for all cameras, or one each.
    weights: safetensors file with torchvision weights of the backbone, to start from.
    channels_last: memory layout of the convolutions, faster on CPUs and on tensor cores.
    norm, group_norm_channels: of the backbone, see `resnet.ResNet`.
    pixels: camera to {mean, std} of its red, green and blue in [0, 1], which then go to (pixel − mean) / std; others go
    to [-1, 1]. Weights from ImageNet saw mean [0.485, 0.456, 0.406] and std [0.229, 0.224, 0.225].
    context: options of `context.Context`, which tells from all To steps what is not observed; then only the last ones
    are in the embedding. None: all To steps are.
    text_dims: key of a text to E, in order. text_feature_dim: F' of each.
    depth_shapes: depth to (H, W); cropped and resized as cameras are, each with a network of its own.
    point_shapes: points to (P, C). points: options of `points.PointEncoder`, of which each has one of its own.
    series: state that is many samples a step, such as a wrench [T, 6], to options of `series.Series`.

    Raises `InputError` for a key without a shape, a shape that is not (H, W, 3), a crop outside of its frame, cameras
    that share a network but differ in size, and what the parts refuse.
    """

    def __init__(
        self,
        *,
        image_keys: Sequence[str],
        image_shapes: Mapping[str, Sequence[int]],
        state_dims: Mapping[str, int],
        n_obs_steps: int,
        backbone: str = "resnet18",
        width: float = 1.0,
        stages: int = 4,
        pooling: str = "spatial_softmax",
        keypoints: int = 32,
        feature_dim: int = 64,
        crop: Sequence[int] | None = None,
        crop_at: Sequence[int] | None = None,
        resize: Sequence[int] | None = None,
        color_jitter: float | Mapping[str, float] = 0.0,
        augment: Sequence[Mapping[str, Any]] | None = None,
        share: bool = False,
        weights: str | None = None,
        channels_last: bool = True,
        norm: str = "group",
        group_norm_channels: int = 16,
        pixels: Mapping[str, Mapping[str, Sequence[float]]] | None = None,
        context: Mapping[str, int] | None = None,
        text_dims: Mapping[str, int] | None = None,
        text_feature_dim: int = 32,
        series: Mapping[str, Mapping[str, int]] | None = None,
        depth_shapes: Mapping[str, Sequence[int]] | None = None,
        points: Mapping[str, Any] | None = None,
        point_shapes: Mapping[str, Sequence[int]] | None = None,
    ):
        super().__init__()
        self.image_keys = tuple(image_keys)
        self.series_dims = {key: state_dims[key] for key in _series_keys(series or {}, state_dims)}
        self.state_dims = {key: n for key, n in state_dims.items() if key not in self.series_dims}
        self.n_obs_steps = n_obs_steps
        self.crop, self.resize = _size("crop", crop), _size("resize", resize)
        self.crop_at = None if crop_at is None else (crop_at[0], crop_at[1])
        self.jitter = augmentation.ColorJitter(strength=color_jitter)
        self.augmentations = [_augmentation(options) for options in augment or ()]
        self.image_shapes = {key: _frame_shape(key, image_shapes) for key in self.image_keys}
        self.depth_shapes = {key: (size[0], size[1]) for key, size in (depth_shapes or {}).items()}
        sizes = [self._input_size(key) for key in self.image_keys]
        if share and len(set(sizes)) > 1:
            given = ", ".join(f"{key} {list(size)}" for key, size in zip(self.image_keys, sizes, strict=True))
            raise InputError(f"encoder.share=true needs frames of one size, found {given}; set encoder.resize or crop")

        def camera(size: Size, in_channels: int = 3) -> CameraEncoder:
            trunk = resnet.ResNet(
                backbone=backbone,
                width=width,
                stages=stages,
                norm=norm,
                group_norm_channels=group_norm_channels,
                in_channels=in_channels,
            )
            if weights is not None and in_channels == 3:
                described = f"{backbone} (width {width:g}, {stages} stages)"
                resnet.load_weights(trunk, weights, described=described)
            return CameraEncoder(
                backbone=trunk, size=size, pooling=pooling, keypoints=keypoints, feature_dim=feature_dim
            )

        self.cameras = nn.ModuleList(camera(size) for size in (sizes[:1] if share else sizes))
        self.depths = nn.ModuleList(camera(self._input_size(key), 2) for key in self.depth_shapes)
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format
        self.to(memory_format=self.memory_format)
        self.point_shapes = {key: (shape[0], shape[1]) for key, shape in (point_shapes or {}).items()}
        self.points = nn.ModuleList(
            PointEncoder(channels=channels, **(points or {})) for _, channels in self.point_shapes.values()
        )
        self.step_dim = sum(self.state_dims.values()) + feature_dim * (len(self.image_keys) + len(self.depths))
        self.step_dim += sum(cast(PointEncoder, part).output_dim for part in self.points)
        self._set_pixels(pixels or {})
        self.context: Context | None = None
        if context is not None:
            self.context = Context(step_dim=self.step_dim, n_obs_steps=n_obs_steps, **context)
        self.output_dim = n_obs_steps * self.step_dim if self.context is None else self.context.output_dim
        self.text_dims = dict(text_dims or {})
        self.texts = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(n, elementwise_affine=False), nn.Linear(n, text_feature_dim))
            for n in self.text_dims.values()  # normalised, as each of many numbers of a short vector is small
        )
        self.series = nn.ModuleList(
            Series(n=n, n_obs_steps=n_obs_steps, **(series or {})[key]) for key, n in self.series_dims.items()
        )
        self.output_dim += text_feature_dim * len(self.text_dims)
        self.output_dim += sum(cast(Series, part).output_dim for part in self.series)

    def forward(self, obs: Mapping[str, Tensor], generator: torch.Generator | None = None) -> Tensor:
        """Embedding [B, C], float32; with a `context` [B, recent * D + size] are in the place of [B, To * D].

        obs: a state is a float [B, To, n], normalised already, a text likewise [B, To, E], depth
        [B, To, H, W, 2], which has 1 where it is known, points float [B, To, P, C]; a camera is uint8
        [B, To, H, W, 3], 0 to 255, or in training [B, To, h, w, 3] when the `early_crop` has been cut already.
        `generator` draws crops and jitter, camera after camera; the global one does without it. Raises `InputError` for
        anything else.
        """
        parts = [self._vector(key, obs, n) for key, n in self.state_dims.items()]
        for i, key in enumerate(self.image_keys):
            frames = self._frames(key, obs)
            images = self._prepare(key, frames, generator).to(memory_format=self.memory_format)
            features = self.cameras[i % len(self.cameras)](images)
            parts.append(features.float().unflatten(0, frames.shape[:2]))
        for depth, key in zip(self.depths, self.depth_shapes, strict=True):
            images = self._prepare_depth(key, obs, generator).to(memory_format=self.memory_format)
            parts.append(depth(images).float().unflatten(0, (-1, self.n_obs_steps)))
        for part, (key, shape) in zip(self.points, self.point_shapes.items(), strict=True):
            parts.append(part(self._vector(key, obs, *shape)).float())
        if any(part.shape[0] != parts[0].shape[0] for part in parts[1:]):
            keys = (*self.state_dims, *self.image_keys, *self.depth_shapes, *self.point_shapes)
            counts = ", ".join(f"{key} {len(obs[key])}" for key in keys)
            raise InputError(f"observations have different numbers of windows: {counts}")
        embedding = []
        if parts:
            steps = torch.cat(parts, dim=2)
            embedding = [steps.flatten(1) if self.context is None else cast(Tensor, self.context(steps))]
        texts, series = (
            zip(parts, dims.items(), strict=True)
            for parts, dims in ((self.texts, self.text_dims), (self.series, self.series_dims))
        )
        embedding += [text(self._vector(key, obs, n)[:, -1]).float() for text, (key, n) in texts]
        embedding += [part(self._vector(key, obs, n)).float() for part, (key, n) in series]
        return torch.cat(embedding, dim=1)

    @property
    def early_crop(self) -> Size | None:
        """The random crop, where whoever gathers frames to train on may cut it: nothing comes before it."""
        return None if self.resize is not None else self.crop

    def _prepare(self, key: str, frames: Tensor, generator: torch.Generator | None) -> Tensor:
        """Frames uint8 [B, To, H, W, 3] to images float32 [B * To, 3, h, w], resized, cropped, jittered, and in [-1, 1]
        or as `pixels` has them."""
        b, to = frames.shape[:2]
        if self.resize is not None:
            images = augmentation.resized(augmentation.to_float(frames.flatten(0, 1)), self.resize)
            frames = rearrange(images, "(b t) c h w -> b t h w c", b=b)
        if self.crop is not None and frames.shape[2:4] != self.crop:
            if self.training:
                room = (frames.shape[2] - self.crop[0], frames.shape[3] - self.crop[1])
                frames = augmentation.crop_windows(frames, augmentation.random_corners(b, room, generator), self.crop)
            else:
                frames = augmentation.crop_at(frames, self.crop, self.crop_at)
        flat = frames.flatten(0, 1)
        images = augmentation.to_float(flat) if self.resize is None else rearrange(flat, "n h w c -> n c h w")
        if self.training and self.jitter:
            factors = self.jitter.draw(b, generator)
            images = self.jitter(images, augmentation.JitterFactors(*(f.repeat_interleave(to) for f in factors)))
        for change in self.augmentations if self.training else ():
            images = change(images.unflatten(0, (b, to)), generator).flatten(0, 1)
        if key not in self.pixels:
            return augmentation.centred(images)
        mean, std = (getattr(self, name) for name in self.pixels[key])
        return images.sub_(mean).div_(std)

    def _prepare_depth(self, key: str, obs: Mapping[str, Tensor], generator: torch.Generator | None) -> Tensor:
        """Depth and where it is known, float [B, To, H, W, 2], to float32 [B * To, 2, h, w], resized and cropped."""
        frames, (height, width) = _get(key, obs), self.depth_shapes[key]
        if not frames.is_floating_point() or frames.shape[1:] != (self.n_obs_steps, height, width, 2):
            expected = f"[B, {self.n_obs_steps}, {height}, {width}, 2]"
            raise InputError(f"depth {key!r} is {_describe(frames)}, expected float32 {expected}")
        if self.resize is not None:
            flat = rearrange(frames, "b t h w c -> (b t) c h w")
            small = nn.functional.interpolate(flat, self.resize, mode="nearest")  # no mean of known and unknown
            frames = rearrange(small, "(b t) c h w -> b t h w c", b=len(frames))
        if self.crop is not None and frames.shape[2:4] != self.crop:
            if self.training:
                room = (frames.shape[2] - self.crop[0], frames.shape[3] - self.crop[1])
                corners = augmentation.random_corners(len(frames), room, generator)
                frames = augmentation.crop_windows(frames, corners, self.crop)
            else:
                frames = augmentation.crop_at(frames, self.crop, self.crop_at)
        return rearrange(frames, "b t h w c -> (b t) c h w")

    def _set_pixels(self, pixels: Mapping[str, Mapping[str, Sequence[float]]]) -> None:
        """Constants [3, 1, 1] of each camera that has some, out of the weights: config.yaml says them."""
        self.pixels: dict[str, tuple[str, str]] = {}
        for i, (key, constants) in enumerate(pixels.items()):
            if key not in self.image_keys:
                raise unknown("camera in encoder.pixels", key, self.image_keys)
            self.pixels[key] = f"pixel_mean_{i}", f"pixel_std_{i}"
            for name, constant in zip(self.pixels[key], ("mean", "std"), strict=True):
                value = torch.tensor(constants[constant], dtype=torch.float32).view(3, 1, 1)
                self.register_buffer(name, value, persistent=False)

    def _frames(self, key: str, obs: Mapping[str, Tensor]) -> Tensor:
        frames = _get(key, obs)
        size = self.image_shapes[key][:2]
        accepted = [size]
        if self.training and self.early_crop is not None:
            accepted.append(self.early_crop)
        to = self.n_obs_steps
        if frames.dtype != torch.uint8 or frames.shape[1:] not in [(to, *size, 3) for size in accepted]:
            expected = " or ".join(f"[B, {to}, {h}, {w}, 3]" for h, w in accepted)
            raise InputError(f"camera {key!r} is {_describe(frames)}, expected uint8 {expected}")
        return frames

    def _vector(self, key: str, obs: Mapping[str, Tensor], *shape: int) -> Tensor:
        state, expected = _get(key, obs), (self.n_obs_steps, *shape)
        if not state.is_floating_point() or state.shape[1:] != expected:
            what = "state" if len(shape) == 1 else "points"
            raise InputError(
                f"{what} {key!r} is {_describe(state)}, expected float32 [B, {', '.join(map(str, expected))}]"
            )
        return state.float()

    def _input_size(self, key: str) -> Size:
        """Height and width that the network sees."""
        size = self.resize or (self.depth_shapes.get(key) or self.image_shapes[key][:2])
        check_crop(key, size, self.crop, self.crop_at)
        return self.crop or size


def _augmentation(options: Mapping[str, Any]) -> augmentation.Augmentation:
    rest = dict(options)
    name = str(rest.pop("name", None))
    part = AUGMENTATIONS.load(name, "encoder.augment name")
    check_arguments(part, rest, f"augmentation {name}")
    return cast(augmentation.Augmentation, part(**rest))


def _series_keys(series: Mapping[str, Any], state_dims: Mapping[str, int]) -> list[str]:
    for key in series:
        if key not in state_dims:
            raise unknown("state in encoder.series", key, state_dims)
    return [key for key in state_dims if key in series]


def _axis(n: int) -> Tensor:
    return torch.linspace(-1, 1, n) if n > 1 else torch.zeros(1)


def _size(name: str, value: Sequence[int] | None) -> Size | None:
    if value is None:
        return None
    if len(value) != 2 or any(not isinstance(side, int) or side < 1 for side in value):
        raise InputError(f"encoder.{name}={value}: expected [height, width] in pixels")
    return value[0], value[1]


def _frame_shape(key: str, shapes: Mapping[str, Sequence[int]]) -> tuple[int, int, int]:
    if key not in shapes:
        raise InputError(f"camera {key!r} has no shape; shapes are given for {', '.join(shapes) or 'no camera'}")
    shape = tuple(shapes[key])
    if len(shape) != 3 or shape[2] != 3 or min(shape) < 1:
        raise InputError(f"camera {key!r} has shape {list(shape)}, expected [height, width, 3]")
    return shape[0], shape[1], 3


def _get(key: str, obs: Mapping[str, Tensor]) -> Tensor:
    if key not in obs:
        raise InputError(f"observation {key!r} is missing; there are {', '.join(obs) or 'none'}")
    return obs[key]


def _describe(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
