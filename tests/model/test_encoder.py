"""The observation encoder: what goes in, where it lands in the embedding, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor, nn
from torchvision.transforms.v2 import functional as reference

from action_diffusion.errors import InputError
from action_diffusion.policy.model.encoders import augment, resnet
from action_diffusion.policy.model.encoders.encoder import CameraEncoder, ObservationEncoder, SpatialSoftmax

THIN = {"width": 0.25, "keypoints": 4, "feature_dim": 8}


def make(**options) -> ObservationEncoder:
    """A thin encoder of two cameras and a state; `options` replace its values."""
    torch.manual_seed(0)
    values: dict[str, Any] = {
        "image_keys": ("left", "right"),
        "image_shapes": {"left": (40, 48, 3), "right": (40, 48, 3)},
        "state_dims": {"pose": 3},
        "n_obs_steps": 2,
        **THIN,
    }
    return ObservationEncoder(**values | options)


def trunk(camera: nn.Module) -> Any:
    """The backbone's layers, by number as in torchvision."""
    return camera.backbone


def observe(b: int = 2, to: int = 2, size: tuple[int, int] = (40, 48), seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    frames = {
        key: torch.randint(256, (b, to, *size, 3), generator=generator, dtype=torch.uint8) for key in ("left", "right")
    }
    return frames | {"pose": torch.rand(b, to, 3, generator=generator)}


# Embedding


@pytest.mark.parametrize("pooling", ["spatial_softmax", "average"])
@pytest.mark.parametrize("crop", [None, (32, 36)])
@pytest.mark.parametrize("resize", [None, (36, 40)])
def test_shapes(pooling, crop, resize):
    encoder = make(pooling=pooling, crop=crop, resize=resize)
    assert encoder.output_dim == 2 * (3 + 2 * 8)
    for training in (True, False):
        embedding = encoder.train(training)(observe(b=3))
        assert embedding.shape == (3, encoder.output_dim)
        assert embedding.dtype == torch.float32
        assert embedding.isfinite().all()


@pytest.mark.parametrize(("backbone", "channels"), [("resnet18", 128), ("resnet34", 128), ("resnet50", 512)])
def test_backbones(backbone, channels):
    trunk = resnet.ResNet(backbone=backbone, width=0.25)
    assert trunk(torch.zeros(1, 3, 65, 33)).shape == (1, channels, 3, 2)
    assert make(backbone=backbone)(observe()).shape == (2, 38)


@pytest.mark.parametrize("stages", [1, 2, 3, 4])
@pytest.mark.parametrize("size", [(40, 48), (33, 65), (96, 84)])
def test_feature_map_size_for_every_number_of_stages(stages, size):
    trunk = resnet.ResNet(backbone="resnet18", width=0.25, stages=stages)
    expected = tuple(-(-side // trunk.stride) for side in size)
    assert trunk(torch.zeros(1, 3, *size)).shape == (1, trunk.out_channels, *expected)


def test_states_come_first_and_steps_lie_one_after_the_other():
    encoder, obs = make().eval(), observe()
    steps = encoder(obs).view(2, 2, encoder.step_dim)
    assert torch.equal(steps[..., :3], obs["pose"])
    changed = obs | {"right": observe(seed=1)["right"]}
    other = encoder(changed).view(2, 2, encoder.step_dim)
    assert torch.equal(steps[..., :11], other[..., :11])
    assert not torch.equal(steps[..., 11:], other[..., 11:])
    newest = obs | {"left": torch.cat([obs["left"][:, :1], changed["right"][:, 1:]], dim=1)}
    assert torch.equal(encoder(newest).view(2, 2, -1)[:, 0], steps[:, 0])


def test_rows_do_not_depend_on_their_neighbours():
    encoder, obs = make().eval(), observe(b=4)
    alone = torch.cat([encoder({key: value[i : i + 1] for key, value in obs.items()}) for i in range(4)])
    torch.testing.assert_close(encoder(obs), alone, rtol=0, atol=1e-5)


def test_states_alone_need_no_network():
    encoder = make(image_keys=(), image_shapes={}, state_dims={"pose": 3, "grip": 1})
    obs = {"pose": torch.rand(4, 2, 3), "grip": torch.rand(4, 2, 1)}
    assert torch.equal(encoder(obs), torch.cat([obs["pose"], obs["grip"]], dim=2).flatten(1))
    assert not list(encoder.parameters())


def test_cameras_share_a_network_or_have_one_each():
    obs = observe()
    same = obs | {"right": obs["left"]}
    shared, separate = make(share=True).eval(), make().eval()
    assert (len(shared.cameras), len(separate.cameras)) == (1, 2)
    features = shared(same).view(2, 2, -1)
    assert torch.equal(features[..., 3:11], features[..., 11:])
    features = separate(same).view(2, 2, -1)
    assert not torch.allclose(features[..., 3:11], features[..., 11:])


def test_camera_order_is_the_order_of_the_keys():
    obs, encoder = observe(), make(share=True).eval()
    swapped = make(share=True, image_keys=("right", "left")).eval()
    a, b = encoder(obs).view(2, 2, -1), swapped(obs).view(2, 2, -1)
    assert torch.equal(a[..., 3:11], b[..., 11:])


def test_every_weight_gets_a_gradient():
    encoder = make(crop=(32, 40))
    encoder(observe()).square().sum().backward()
    for name, parameter in encoder.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
    assert all(trunk(camera)[0].weight.grad.abs().sum() > 0 for camera in encoder.cameras)


def test_memory_layout_changes_nothing():
    obs = observe()
    torch.testing.assert_close(make()(obs), make(channels_last=False)(obs), rtol=0, atol=1e-5)


def test_autocast_gives_a_float32_embedding_close_to_the_plain_one():
    encoder, obs = make(), observe()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = encoder(obs)
    half.sum().backward()
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, encoder(obs), rtol=0, atol=0.1)


def test_names_of_weights_are_stable():
    """Bundles and imported weights rely on them."""
    names = set(make(share=True).state_dict())
    heads = {"pool.nets.weight", "pool.nets.bias", "pool.pos_grid", "out.weight", "out.bias"}
    plain = torchvision.models.resnet18(norm_layer=lambda channels: nn.GroupNorm(1, channels))
    trunk = nn.Sequential(*list(plain.children())[:-2])
    assert names == {f"cameras.0.{name}" for name in heads | {f"backbone.{name}" for name in trunk.state_dict()}}


# Pixels, batch statistics and crops of other projects


def test_pixels_are_normalised_as_each_camera_asks():
    imagenet = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
    encoder = make(pixels={"right": imagenet})
    frames = torch.randint(256, (2, 2, 40, 48, 3), dtype=torch.uint8)
    images = frames.flatten(0, 1).permute(0, 3, 1, 2).float() / 255
    mean, std = (torch.tensor(imagenet[name]).view(3, 1, 1) for name in ("mean", "std"))
    torch.testing.assert_close(encoder._prepare("right", frames, None), (images - mean) / std)
    torch.testing.assert_close(encoder._prepare("left", frames, None), 2 * images - 1)
    assert not [name for name in encoder.state_dict() if "pixel" in name]
    with pytest.raises(InputError, match=r"unknown camera in encoder\.pixels 'front'"):
        make(pixels={"front": imagenet})


def test_a_crop_may_begin_elsewhere_than_in_the_middle():
    encoder = make(crop=(32, 36), crop_at=(5, 12)).eval()
    frames = torch.randint(256, (1, 2, 40, 48, 3), dtype=torch.uint8)
    cut = encoder._prepare("left", frames, None)
    torch.testing.assert_close(cut, frames[0, :, 5:37, 12:48].permute(0, 3, 1, 2) / 127.5 - 1)
    with pytest.raises(InputError, match=r"encoder.crop_at=\[9, 0\]: the crop leaves the frames"):
        make(crop=(32, 36), crop_at=(9, 0))
    with pytest.raises(InputError, match=r"needs encoder\.crop"):
        make(crop_at=(0, 0))


def test_frozen_batch_norm_computes_what_torchvision_does(torchvision_weights):
    path, network = torchvision_weights
    layers = trunk(make(width=1.0, norm="frozen_batch", weights=str(path)).cameras[0])
    expected = nn.Sequential(*list(network.eval().children())[:-2])
    images = torch.randn(2, 3, 40, 48)
    torch.testing.assert_close(layers.train()(images), expected(images), atol=1e-4, rtol=1e-4)
    assert not [name for name, _ in layers.named_parameters() if name.startswith("1.")]


# Random crop and colour


def test_training_crops_follow_the_generator_and_evaluation_takes_the_centre():
    encoder, obs = make(crop=(32, 36)), observe(b=8)
    first, again, other = (encoder(obs, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    encoder.eval()
    middle = {key: value[:, :, 4:36, 6:42] if key != "pose" else value for key, value in obs.items()}
    torch.testing.assert_close(encoder(obs), encoder.train()(middle), rtol=0, atol=1e-6)


def test_frames_cropped_already_are_left_alone():
    encoder = make(crop=(32, 36))
    generator = torch.Generator().manual_seed(0)
    before = generator.get_state()
    encoder(observe(size=(32, 36)), generator)
    assert torch.equal(generator.get_state(), before)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 4), st.integers(1, 3), st.integers(1, 9), st.integers(1, 9), st.data())
def test_crop_windows_cuts_what_slicing_cuts(b, to, height, width, data):
    h, w = data.draw(st.integers(1, height)), data.draw(st.integers(1, width))
    frames = torch.arange(b * to * height * width * 3).view(b, to, height, width, 3)
    corners = augment.random_corners(b, (height - h, width - w), torch.Generator().manual_seed(0))
    expected = [f[:, y : y + h, x : x + w] for f, (y, x) in zip(frames, corners.tolist(), strict=True)]
    assert torch.equal(augment.crop_windows(frames, corners, (h, w)), torch.stack(expected))


def test_corners_reach_every_place():
    corners = augment.random_corners(2000, (3, 5), torch.Generator().manual_seed(0))
    assert len(torch.unique(corners, dim=0)) == 4 * 6
    assert corners.amin(0).tolist() == [0, 0]
    assert corners.amax(0).tolist() == [3, 5]


@pytest.mark.parametrize("name", ["brightness", "contrast", "saturation", "hue"])
def test_colour_changes_are_those_of_torchvision(name):
    images = torch.rand(6, 3, 12, 16, generator=torch.Generator().manual_seed(0))
    images[0] = images[0, :1]  # gray: no hue
    images[1] = 0
    factors = torch.tensor([-0.5, -0.2, 0.0, 0.1, 0.3, 0.5] if name == "hue" else [0.5, 1.7, 0.0, 1.0, 0.3, 2.5])
    ours = augment.ADJUST[name](images, factors.view(-1, 1, 1, 1))
    theirs = getattr(reference, f"adjust_{name}")
    expected = torch.stack([theirs(image, f) for image, f in zip(images, factors.tolist(), strict=True)])
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-5)


def test_jitter_draws_once_per_window_inside_its_range():
    jitter = augment.ColorJitter(strength={"brightness": 0.2, "hue": 0.1})
    factors = jitter.draw(500, torch.Generator().manual_seed(0))
    assert 0.8 <= factors.brightness.min() < 0.81 < 1.19 < factors.brightness.max() <= 1.2
    assert -0.1 <= factors.hue.min() < -0.09 < 0.09 < factors.hue.max() <= 0.1
    assert (factors.contrast == 1).all()
    assert (factors.saturation == 1).all()
    encoder, obs = make(color_jitter=0.5), observe()
    still = obs | {key: obs[key][:, :1].expand(-1, 2, -1, -1, -1) for key in ("left", "right")}
    steps = encoder(still, torch.Generator().manual_seed(0)).view(2, 2, -1)[..., 3:]
    torch.testing.assert_close(steps[:, 0], steps[:, 1])
    assert not torch.allclose(steps, encoder.eval()(still).view(2, 2, -1)[..., 3:])


# Networks


@pytest.mark.slow
@pytest.mark.parametrize(("backbone", "norms"), [("resnet18", 20), ("resnet34", 36), ("resnet50", 53)])
def test_group_norm_is_everywhere_and_nothing_else_differs_from_torchvision(backbone, norms):
    torch.manual_seed(0)
    theirs = getattr(torchvision.models, backbone)(norm_layer=lambda channels: nn.GroupNorm(channels // 16, channels))
    plain = nn.Sequential(*list(theirs.children())[:-2])
    trunk = resnet.ResNet(backbone=backbone)
    trunk.load_state_dict(plain.state_dict())
    kinds = [type(module) for module in trunk.modules()]
    assert kinds.count(nn.GroupNorm) == norms
    assert nn.BatchNorm2d not in kinds
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(trunk(images), plain(images))


def test_spatial_softmax_finds_a_bright_dot():
    pool = SpatialSoftmax(channels=2, size=(5, 9), keypoints=2)
    with torch.no_grad():
        pool.nets.weight.copy_(100 * torch.eye(2).view(2, 2, 1, 1))
    features = torch.zeros(1, 2, 5, 9)
    features[0, 0, 4, 0] = 1  # bottom left
    features[0, 1, 1, 6] = 1
    torch.testing.assert_close(pool(features), torch.tensor([[[-1.0, 1.0], [0.5, -0.5]]]))


def test_spatial_softmax_of_nothing_is_the_centre():
    pool = SpatialSoftmax(channels=3, size=(3, 4), keypoints=5)
    torch.testing.assert_close(pool(torch.zeros(2, 3, 3, 4)), torch.zeros(2, 5, 2))
    assert pool.pos_grid.shape == (12, 2)
    assert SpatialSoftmax(channels=3, size=(1, 1), keypoints=5)(torch.zeros(2, 3, 1, 1)).isfinite().all()


# Weights from a file


@pytest.fixture(scope="module")
def torchvision_weights(tmp_path_factory):
    torch.manual_seed(1)
    network = torchvision.models.resnet18()
    for parameter in network.parameters():  # so that scales and shifts of the norms are not their defaults
        nn.init.normal_(parameter, std=0.1)
    for name, value in network.named_buffers():
        if name.endswith("running_var"):
            nn.init.uniform_(value, 0.5, 1.5)
    path = tmp_path_factory.mktemp("weights") / "resnet18.safetensors"
    save_file(network.state_dict(), path)
    return path, network


def test_weights_come_from_a_torchvision_file(torchvision_weights):
    path, network = torchvision_weights
    encoder = make(width=1.0, weights=str(path))
    for camera in encoder.cameras:
        layers = trunk(camera)
        assert torch.equal(layers[0].weight, network.conv1.weight)
        assert torch.equal(layers[1].bias, network.bn1.bias)
        assert torch.equal(layers[5][0].downsample[0].weight, network.layer2[0].downsample[0].weight)
        assert torch.equal(layers[7][1].bn2.weight, network.layer4[1].bn2.weight)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"backbone": "resnet34"}, r"layer1.2.conv1.weight is missing in the file, \[64, 64, 3, 3\] in the network"),
        ({"width": 0.5}, r"conv1.weight is \[64, 3, 7, 7\] in the file, \[32, 3, 7, 7\] in the network"),
    ],
)
def test_weights_that_do_not_fit_are_refused(torchvision_weights, options, named):
    path, _ = torchvision_weights
    with pytest.raises(InputError, match=named) as caught:
        make(weights=str(path), **{"width": 1.0} | options)
    assert "\n" not in str(caught.value)


def test_stages_left_out_need_no_weights(torchvision_weights):
    path, network = torchvision_weights
    layers = trunk(make(width=1.0, stages=2, weights=str(path)).cameras[0])
    assert torch.equal(layers[5][1].conv2.weight, network.layer2[1].conv2.weight)


def test_weights_without_a_place_are_refused(torchvision_weights, tmp_path):
    _, network = torchvision_weights
    for name in ("layer1.2.conv1.weight", "head.weight"):
        save_file(network.state_dict() | {name: torch.zeros(64, 64)}, tmp_path / "more.safetensors")
        with pytest.raises(InputError, match=rf"{name} is \[64, 64\] in the file, missing in the network"):
            make(width=1.0, weights=str(tmp_path / "more.safetensors"))


def test_a_file_that_is_not_safetensors_is_refused(tmp_path):
    for content in (None, b"", b"not weights"):
        path = tmp_path / "weights.safetensors"
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(InputError, match="not a readable safetensors file"):
            make(weights=str(path))


# Bad input


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"left": torch.zeros(2, 2, 40, 48, 3)}, r"camera 'left' is float32 .* expected uint8 \[B, 2, 40, 48, 3\]"),
        ({"left": torch.zeros(2, 2, 3, 40, 48, dtype=torch.uint8)}, r"uint8 \[2, 2, 3, 40, 48\], expected"),
        ({"left": torch.zeros(2, 2, 48, 40, 3, dtype=torch.uint8)}, r"\[2, 2, 48, 40, 3\], expected"),
        ({"left": torch.zeros(2, 1, 40, 48, 3, dtype=torch.uint8)}, r"\[2, 1, 40, 48, 3\], expected"),
        ({"left": torch.zeros(2, 2, 32, 36, 3, dtype=torch.uint8)}, r"\[2, 2, 32, 36, 3\], expected"),
        ({"pose": torch.zeros(2, 2, 4)}, r"state 'pose' is float32 \[2, 2, 4\], expected float32 \[B, 2, 3\]"),
        ({"pose": torch.zeros(2, 2, 3, dtype=torch.int64)}, r"state 'pose' is int64"),
        ({"pose": torch.zeros(3, 2, 3)}, r"different numbers of windows: pose 3, left 2, right 2"),
    ],
)
def test_wrong_observations_are_refused(changes, message):
    with pytest.raises(InputError, match=message):
        make(crop=(32, 36)).eval()(observe() | changes)


def test_a_missing_observation_is_refused():
    obs = observe()
    del obs["right"]
    with pytest.raises(InputError, match=r"'right' is missing; there are left, pose"):
        make()(obs)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"backbone": "resnet19"}, r"unknown encoder.backbone 'resnet19': did you mean resnet18"),
        ({"pooling": "max"}, r"unknown encoder.pooling 'max'"),
        ({"width": 0.3}, r"encoder.width=0.3 gives 19 channels"),
        ({"stages": 5}, r"encoder.stages=5: expected 1 to 4"),
        ({"feature_dim": 0}, r"encoder.feature_dim=0: expected at least 1"),
        ({"crop": (41, 40)}, r"encoder.crop=\[41, 40\] is larger than the frames of 'left', \[40, 48\]"),
        ({"crop": (32,)}, r"encoder.crop=\(32,\): expected \[height, width\]"),
        ({"resize": (0, 40)}, r"encoder.resize=\(0, 40\): expected \[height, width\]"),
        ({"color_jitter": {"hues": 0.1}}, r"unknown color_jitter 'hues': did you mean hue"),
        ({"color_jitter": {"hue": 0.6}}, r"color_jitter hue=0.6: expected a number from 0 to 0.5"),
        ({"color_jitter": -1}, r"color_jitter brightness=-1"),
        ({"image_shapes": {"left": (40, 48, 3)}}, r"camera 'right' has no shape; shapes are given for left"),
        (
            {"image_shapes": {"left": (3, 40, 48)}},
            r"camera 'left' has shape \[3, 40, 48\], expected \[height, width, 3\]",
        ),
        (
            {"share": True, "image_shapes": {"left": (40, 48, 3), "right": (48, 48, 3)}},
            r"encoder.share=true needs frames of one size, found left \[40, 48\], right \[48, 48\]",
        ),
    ],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(InputError, match=message) as caught:
        make(**options)
    assert "\n" not in str(caught.value)


def test_cameras_of_different_sizes_have_networks_of_their_own():
    shapes = {"left": (40, 48, 3), "right": (64, 64, 3)}
    obs = observe() | {"right": observe(size=(64, 64))["right"]}
    assert make(image_shapes=shapes)(obs).shape == (2, 38)
    assert make(image_shapes=shapes, crop=(32, 32), share=True)(obs).shape == (2, 38)
    assert isinstance(make(image_shapes=shapes).cameras[1], CameraEncoder)
