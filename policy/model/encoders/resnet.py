"""ResNets without classifier and without statistics of the batch, for camera frames.

The blocks are torchvision's (He et al. 2016), with BatchNorm replaced by GroupNorm (Wu & He 2018): the weights that run
are an average over training steps (EMA), and batch statistics do not survive averaging (Chi et al. 2023). Those of a
network that was trained with them can be kept as constants, which they are when it runs ("frozen_batch"). The trunk is
a `Sequential` with its weights in torchvision's places, so that these, and those of policies built on it, are found:

    0 convolution   1 norm   2 max pool   3 ReLU   4 5 6 7 stages, each but the first halves height and width
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck
from torchvision.ops import FrozenBatchNorm2d

from action_diffusion.errors import InputError, unknown


class _Kind(NamedTuple):
    block: type[BasicBlock] | type[Bottleneck]
    depths: tuple[int, int, int, int]


BACKBONES = {
    "resnet18": _Kind(BasicBlock, (2, 2, 2, 2)),
    "resnet34": _Kind(BasicBlock, (3, 4, 6, 3)),
    "resnet50": _Kind(Bottleneck, (3, 4, 6, 3)),
    "resnet101": _Kind(Bottleneck, (3, 4, 23, 3)),
    "resnet152": _Kind(Bottleneck, (3, 8, 36, 3)),
}


class ResNet(nn.Sequential):
    """The trunk of a ResNet: images [N, 3, h, w] to features [N, out_channels, ceil(h / stride), ceil(w / stride)].

    width: scales all channels; half the width is about a quarter of the work. With 1, the stages have 64, 128, 256 and
    512 channels (four times that from resnet50 on), as in the paper. stages: how many of the four there are; without
    the last, a small frame keeps a feature map twice as fine (stride 16, not 32). norm: "group", or "frozen_batch":
    BatchNorm whose scales, shifts and statistics are constants, for weights that were trained with it.
    group_norm_channels: channels that are normalised together. Convolutions start as in He et al. (2015), fan-out.

    What it costs, resnet18, forward and backward of 128 frames of 84 x 84 on one AVX2 core (90 GFLOP/s in fp32):

        width    1       1 (3 stages)  0.5     0.5 (3)  0.25    0.25 (3)
        GFLOP    223     165           58      44       16      12
        seconds  3.0     2.1           0.82    0.62     0.25    0.20

    Raises `InputError` for an unknown backbone, a number of stages out of range, and groups that do not divide.
    """

    def __init__(
        self,
        *,
        backbone: str,
        width: float = 1.0,
        stages: int = 4,
        norm: str = "group",
        group_norm_channels: int = 16,
        in_channels: int = 3,
    ):
        if backbone not in BACKBONES:
            raise unknown("encoder.backbone", backbone, BACKBONES)
        if stages not in (1, 2, 3, 4):
            raise InputError(f"encoder.stages={stages}: expected 1 to 4")
        channels = round(64 * width)
        if norm not in ("group", "frozen_batch"):
            raise unknown("encoder.norm", norm, ("group", "frozen_batch"))
        if group_norm_channels < 1 or channels < 1 or channels % group_norm_channels:
            raise InputError(
                f"encoder.width={width} gives {channels} channels, expected a multiple of "
                f"encoder.group_norm_channels={group_norm_channels}"
            )
        kind = BACKBONES[backbone]
        make_norm = FrozenBatchNorm2d if norm == "frozen_batch" else partial(_group_norm, group_norm_channels)
        layers: list[nn.Module] = [
            nn.Conv2d(in_channels, channels, kernel_size=7, stride=2, padding=3, bias=False),
            make_norm(channels),
            nn.MaxPool2d(kernel_size=3, stride=2, padding=1),
            nn.ReLU(inplace=True),  # after the pool: the same, of a quarter of the values
        ]
        entering = channels
        for stage, depth in enumerate(kind.depths[:stages]):
            planes = channels * 2**stage
            layers.append(_stage(kind.block, entering, planes, depth, 1 if stage == 0 else 2, make_norm))
            entering = planes * kind.block.expansion
        super().__init__(*layers)
        self.out_channels = entering
        self.stride = 4 * 2 ** (stages - 1)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


def load_weights(trunk: nn.Sequential, path: str | Path, *, described: str) -> None:
    """Copy torchvision ResNet weights, a safetensors file, into `trunk`; `described` names the trunk in errors.

    Convolutions are taken as they are, and scales and shifts of BatchNorm go to GroupNorm. Its running statistics have
    a place in a frozen one only; the classifier `fc` and stages that the trunk leaves out have none. All else must
    match, in name and shape.
    Raises `InputError` for an unreadable file, and for the first weight that differs, naming both sides.
    """
    try:
        state = load_file(path)
    except (OSError, SafetensorError) as error:
        raise InputError(f"encoder.weights={path}: not a readable safetensors file: {error}") from None
    own = trunk.state_dict()
    left_out = UNUSED if isinstance(trunk[1], FrozenBatchNorm2d) else (*UNUSED, "running_mean", "running_var")
    given = {trunk_name(name): value for name, value in state.items() if _belongs(name, len(trunk), left_out)}
    for name in (*own, *given):
        if _shape(own, name) != _shape(given, name):
            raise InputError(
                f"encoder.weights={path} does not fit {described}: {_torchvision_name(name)} is "
                f"{_shape(given, name)} in the file, {_shape(own, name)} in the network"
            )
    trunk.load_state_dict(given)


def _stage(
    block: type[BasicBlock] | type[Bottleneck],
    entering: int,
    planes: int,
    depth: int,
    stride: int,
    norm: Callable[[int], nn.Module],
) -> nn.Sequential:
    leaving = planes * block.expansion
    shortcut = None
    if stride != 1 or entering != leaving:
        shortcut = nn.Sequential(nn.Conv2d(entering, leaving, kernel_size=1, stride=stride, bias=False), norm(leaving))
    first = block(entering, planes, stride, shortcut, norm_layer=norm)
    return nn.Sequential(first, *(block(leaving, planes, norm_layer=norm) for _ in range(depth - 1)))


def _group_norm(channels_per_group: int, channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(channels // channels_per_group, channels)


UNUSED = ("num_batches_tracked",)
_PLACES = {"conv1": "0", "bn1": "1", "layer1": "4", "layer2": "5", "layer3": "6", "layer4": "7"}


def _belongs(name: str, n_places: int, left_out: Sequence[str]) -> bool:
    head, last = name.partition(".")[0], name.rpartition(".")[2]
    if head == "fc" or last in left_out:
        return False
    return int(_PLACES.get(head, 0)) < n_places


def trunk_name(name: str) -> str:
    """layer2.0.conv1.weight → 5.0.conv1.weight; a name that torchvision does not use stays as it is."""
    head, _, rest = name.partition(".")
    return f"{_PLACES.get(head, head)}.{rest}"


def _torchvision_name(name: str) -> str:
    head, _, rest = name.partition(".")
    return f"{ {place: known for known, place in _PLACES.items()}.get(head, head) }.{rest}"


def _shape(weights: dict[str, Tensor], name: str) -> str:
    return str(list(weights[name].shape)) if name in weights else "missing"
