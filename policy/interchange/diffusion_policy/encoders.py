"""diffusion_policy's encoders as ours: robomimic's, and MultiImageObsEncoder of torchvision's ResNets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from action_diffusion.errors import InputError
from action_diffusion.policy.interchange.diffusion_policy import theirs, weights
from action_diffusion.policy.interchange.diffusion_policy.normalizer import NORMALIZER, numbers
from action_diffusion.policy.interchange.lerobot.weights import order
from action_diffusion.policy.model.encoders.resnet import ResNet
from action_diffusion.policy.spec import ObservationSpec
from action_diffusion.schema import check, shown

ENCODER, WHERE = "obs_encoder.", "cfg.policy.obs_encoder"
IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Mean and standard deviation of its pixels, in [0, 1]."""
AS_THEY_ARE = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
Part = tuple[str, int]
"""Of an embedding: an observation, and how many numbers it becomes."""


class Encoder(NamedTuple):
    """options: of our encoder. weights: of it, by name. said: what is done in one way only here.

    here, there: the parts of one step's embedding in our order, and in theirs.
    """

    options: dict[str, Any]
    weights: dict[str, Tensor]
    here: list[Part]
    there: list[Part]
    said: tuple[str, ...] = ()

    def columns(self, n_steps: int) -> Tensor:
        """For each of our columns of an embedding of so many steps, theirs."""
        return order(self.here, self.there, n_steps)


def encoder_of(
    options: theirs.TheirPolicy, state: Mapping[str, Tensor], observations: Mapping[str, ObservationSpec]
) -> Encoder:
    """Raises `InputError` for parts of theirs that there are not here."""
    cameras = {key: value for key, value in observations.items() if value.kind == "image"}
    made: dict[str, Any] = {"name": "observation"}
    found: dict[str, Tensor] = {}
    said: tuple[str, ...] = ()
    if cameras:
        made["norm"] = "frozen_batch" if any(name.endswith(".running_mean") for name in state) else "group"
    if cameras and isinstance(options, theirs.Hybrid):
        made, found, said = _robomimic(options, made, state, cameras)
    elif cameras and isinstance(options, theirs.UnetImage):
        made, found, said = _torchvision(options, made, state, cameras)
    sizes = {key: made["feature_dim"] if key in cameras else value.shape[0] for key, value in observations.items()}
    states, images = [part for part in sizes.items() if part[0] not in cameras], [(key, sizes[key]) for key in cameras]
    there = [*sizes.items()]
    if isinstance(options, theirs.UnetImage):  # images first, each kind in the order of the alphabet
        there = [*sorted(images), *sorted(states)]
    return Encoder(made, found, [*states, *images], there, said)


_Made = tuple[dict[str, Any], dict[str, Tensor], tuple[str, ...]]


def _robomimic(
    options: theirs.Hybrid,
    made: dict[str, Any],
    state: Mapping[str, Tensor],
    cameras: Mapping[str, ObservationSpec],
) -> _Made:
    found = weights.robomimic(state, list(cameras))
    made = {
        **made,
        "backbone": "resnet18",
        "pooling": "spatial_softmax",
        "keypoints": len(found["encoder.cameras.0.pool.nets.weight"]),
        "feature_dim": len(found["encoder.cameras.0.out.weight"]),
        **_pixels(state, cameras, *AS_THEY_ARE),
        **_crop(options.crop_shape, None, cameras, rounds=options.eval_fixed_crop),
    }
    said = "eval_fixed_crop=false: crops come from the middle here; robomimic 0.2 cut them at random while acting"
    return made, found, () if options.eval_fixed_crop or options.crop_shape is None else (said,)


def _torchvision(
    options: theirs.UnetImage,
    made: dict[str, Any],
    state: Mapping[str, Tensor],
    cameras: Mapping[str, ObservationSpec],
) -> _Made:
    section = theirs.named(options.obs_encoder, "MultiImageObsEncoder", WHERE)
    encoder: theirs.ImageEncoder = check(section, theirs.ImageEncoder, WHERE)
    section = theirs.named(encoder.rgb_model, "get_resnet", f"{WHERE}.rgb_model")
    backbone: theirs.Backbone = check(section, theirs.Backbone, f"{WHERE}.rgb_model")
    with torch.device("meta"):
        features = ResNet(backbone=backbone.name).out_channels
    crop, resize = (_one(name, getattr(encoder, name), cameras) for name in ("crop_shape", "resize_shape"))
    made = {
        **made,
        "backbone": backbone.name,
        "pooling": "average",
        "feature_dim": features,
        "share": encoder.share_rgb_model,
        **_pixels(state, cameras, *(IMAGENET if encoder.imagenet_norm else AS_THEY_ARE)),
        **_crop(crop if encoder.random_crop else None, resize, cameras, rounds=True),
    }
    said = []
    if crop is not None and not encoder.random_crop:
        said.append("random_crop=false: their code then cuts nothing while acting, and so does this")
    if made["resize"] is not None:
        said.append("frames that become smaller are smoothed first, as torchvision does from 0.17 on; 0.13 did not")
    networks = [weights.SHARED] if encoder.share_rgb_model else list(cameras)
    return made, weights.torchvision(state, networks, features), tuple(said)


def _one(name: str, given: Any, cameras: Mapping[str, ObservationSpec]) -> list[int] | None:
    """A size that may be given for each camera, and has to be one for all."""
    sizes = [given.get(camera) for camera in cameras] if isinstance(given, dict) else [given]
    if any(size != sizes[0] for size in sizes):
        raise InputError(f"{WHERE}.{name}={shown(given)}: cameras have one size for all of them here")
    return sizes[0] if sizes else None


def _crop(
    crop: list[int] | None, resize: list[int] | None, cameras: Mapping[str, ObservationSpec], *, rounds: bool
) -> dict[str, list[int] | None]:
    """resize, crop and where it is cut.

    rounds: from torchvision's middle, to the nearest whole number (the even one of two); else from the one below.
    """
    sides = {tuple(value.shape[:2]) for value in cameras.values()}
    if resize is not None and sides != {tuple(resize)}:
        sides = {tuple(resize)}
    else:
        resize = None  # they have the size already
    if crop is None:
        return {"resize": resize, "crop": None}
    rooms = [[have - cut for have, cut in zip(side, crop, strict=True)] for side in sides]
    corners = {tuple(round(gap / 2) if rounds else gap // 2 for gap in room) for room in rooms}
    if corners == {tuple(gap // 2 for gap in room) for room in rooms}:
        return {"resize": resize, "crop": crop}
    if len(corners) > 1:
        raise InputError(f"cfg.policy: crop_shape={crop} is not in the same place of all cameras, of {sorted(sides)}")
    return {"resize": resize, "crop": crop, "crop_at": list(corners.pop())}


def _pixels(
    state: Mapping[str, Tensor],
    cameras: Mapping[str, ObservationSpec],
    mean: Sequence[float],
    std: Sequence[float],
) -> dict[str, Any]:
    """What is done to values from 0 to 1: their normaliser's scale and offset, and then (… − mean) / std."""
    found = {}
    for camera in cameras:
        scale, offset = (float(numbers(state, camera, name, 1)[0]) for name in ("scale", "offset"))
        if not scale > 0:
            raise InputError(f"{NORMALIZER}{camera}.scale={scale:g}, expected a positive number")
        means, deviations = [(value - offset) / scale for value in mean], [value / scale for value in std]
        if (means, deviations) != ([0.5] * 3, [0.5] * 3):
            found[camera] = {"mean": means, "std": deviations}
    return {"pixels": found} if found else {}
