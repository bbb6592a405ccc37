"""Faster ways to run a policy give what the plain way gives: within rounding in fp32, within stated errors below it."""

from __future__ import annotations

import functools
import shutil
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from action_diffusion.errors import InputError
from action_diffusion.policy import bundle as bundles
from action_diffusion.policy.diffusion.sampler import Hook
from action_diffusion.policy.inference import choose_threads
from action_diffusion.policy.kernels import accelerate, check_precision, cpu_unet, for_training, layers
from action_diffusion.policy.kernels.cuda_graph import CudaGraph
from action_diffusion.policy.model.encoders.encoder import ObservationEncoder

STATE = np.arange(10, dtype=np.float32).reshape(2, 5) + 100
SAMPLE = {"process": {"name": "diffusion", "prediction": "sample"}}
SCHEDULERS: list[dict[str, Any]] = [
    {"sampler": {"scheduler": "ddpm", "num_inference_steps": 100}},
    {"sampler": {"scheduler": "ddim", "num_inference_steps": 10, "eta": 1.0}},
    {"sampler": {"scheduler": "dpm_solver++", "num_inference_steps": 8}},
    {
        "process": {"name": "flow", "prediction": "sample"},
        "sampler": {"scheduler": "flow", "num_inference_steps": 4, "clip": None},
    },
]
IDS = [case["sampler"]["scheduler"] for case in SCHEDULERS]
needs_code = pytest.mark.skipif(
    cpu_unet.library() is None, reason="policy/kernels/unet.c is not compiled: install again where there is gcc"
)


def calm(policy):
    """Its answers depend little on the sample, as a trained network's do; an untrained one's amplify rounding."""
    with torch.no_grad():
        policy.denoiser.out[1].weight.mul_(0.2)
    return policy


@pytest.fixture
def policy(make_policy):
    """Predicts samples: the noise that an untrained network predicts leads to chunks of nothing but the bounds."""
    return calm(make_policy(**SAMPLE))


@pytest.fixture
def pack_everything(monkeypatch):
    """Also what would be left as it is because it is small; and by code in C, wherever it can be."""
    monkeypatch.setattr(layers, "LEAST_PACKED", 0)
    monkeypatch.setattr(cpu_unet, "LEAST_HALF", 0)
    monkeypatch.setenv("ACTION_DIFFUSION_KERNELS", "on")


def observations(n: int) -> dict[str, torch.Tensor]:
    return {"state": torch.from_numpy(np.stack([STATE + i for i in range(n)]))}


def chunk(policy, n: int = 1) -> torch.Tensor:
    """Normalised chunks [n, H, A] for fixed noise."""
    noise = torch.randn(n, 8, 2, generator=torch.Generator().manual_seed(0)).to(policy.device)
    obs = {key: value.to(policy.device) for key, value in observations(n).items()}
    return policy.sample(obs, noise=noise, generator=torch.Generator().manual_seed(1)).normalized


@pytest.mark.slow
@pytest.mark.usefixtures("pack_everything")
@pytest.mark.parametrize("case", SCHEDULERS, ids=IDS)
@pytest.mark.parametrize("batch", [1, 4])
def test_a_chunk_is_the_same_within_rounding_and_close_below(make_policy, case, batch):
    policy = calm(make_policy(**(SAMPLE | case)))
    expected = chunk(policy, batch)
    assert expected.abs().max() < 1
    for precision, error in {"fp32": 1e-5, "fp16": 3e-2}.items():
        if precision == "fp16" and cpu_unet.library() is None:
            continue
        accelerate(policy, precision=precision)
        torch.testing.assert_close(chunk(policy, batch), expected, atol=error, rtol=0)
    accelerate(policy)
    assert torch.equal(chunk(policy, batch), expected)


@needs_code
@pytest.mark.usefixtures("pack_everything")
def test_gradients_are_of_the_weights_themselves(policy):
    noise = torch.randn(1, 8, 2, generator=torch.Generator().manual_seed(0))
    results = []
    for precision in (None, "fp16"):
        accelerate(policy, precision=precision)
        policy.zero_grad()
        policy.sample(observations(1), noise=noise, grad=True).normalized.square().sum().backward()
        results.append([parameter.grad.clone() for parameter in policy.denoiser.parameters()])
    largest = max(gradient.abs().max().item() for gradient in results[0])
    for ours, plain in zip(*results, strict=True):
        if plain.abs().max() < 1e-6 * largest:  # a bias before a norm, whose gradient is nothing but rounding
            assert ours.abs().max() < 1e-6 * largest
        else:
            torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-4 * plain.abs().max().item())


@pytest.mark.usefixtures("pack_everything")
def test_guidance_of_a_frozen_policy_is_the_same(policy):
    class Guide(Hook):
        needs_gradient = True

        def __init__(self):
            self.gradients = []

        def edit_x0(self, state):
            self.gradients += torch.autograd.grad(state.x0_raw, state.x, state.x0_raw.detach())
            return state.x0_hat

    def guided() -> tuple[torch.Tensor, torch.Tensor]:
        guide = Guide()
        noise = torch.randn(1, 8, 2, generator=torch.Generator().manual_seed(0))
        result = policy.sample(observations(1), noise=noise, hooks=[guide]).normalized
        return result, torch.stack(guide.gradients)

    policy.requires_grad_(False)
    expected = guided()
    accelerate(policy, precision="fp32")
    for found, plain in zip(guided(), expected, strict=True):
        assert (found - plain).abs().max() <= 1e-4 * plain.abs().max()


@pytest.mark.usefixtures("pack_everything")
@pytest.mark.parametrize("channels_last", [True, False])
def test_an_encoder_with_kernels_equals_itself(channels_last):
    torch.manual_seed(0)
    encoder = ObservationEncoder(
        image_keys=["image"],
        image_shapes={"image": (24, 24, 3)},
        state_dims={},
        n_obs_steps=2,
        width=0.25,
        channels_last=channels_last,
    ).eval()
    frames = {n: {"image": torch.randint(0, 256, (n, 2, 24, 24, 3), dtype=torch.uint8)} for n in (1, 4, 8)}
    with torch.no_grad():
        expected = {n: encoder(obs) for n, obs in frames.items()}
    layers.install(encoder, keep=True)
    with torch.no_grad():
        for n in (4, 1, 8):  # laid out for 8 frames, then fewer; 16 are more than it is for
            assert (encoder(frames[n]) - expected[n]).abs().max() <= 1e-5 * expected[n].abs().max()
    encoder(frames[1]).sum().backward()  # with gradients the weights run themselves
    assert all(layer.weight.grad is not None for layer in encoder.modules() if isinstance(layer, nn.Conv2d))


@needs_code
@pytest.mark.usefixtures("pack_everything")
def test_chunks_follow_weights_that_change(policy, make_policy):
    accelerate(policy, precision="fp16")
    before = chunk(policy)
    other = {name: value + 0.05 * torch.randn(value.shape) for name, value in policy.state_dict().items()}
    policy.load_state_dict(other)
    plain = calm(make_policy(**SAMPLE))
    plain.load_state_dict(other)
    assert (chunk(policy) - before).abs().max() > 1e-3
    torch.testing.assert_close(chunk(policy), chunk(plain), atol=3e-2, rtol=0)


@pytest.mark.usefixtures("pack_everything")
def test_a_policy_in_training_learns_and_predicts_the_same(policy, make_policy):
    plain = calm(make_policy(**SAMPLE))
    for_training(policy)
    obs, action = observations(3), torch.randn(3, 8, 2) + 100
    losses = [p(obs, action, generator=torch.Generator().manual_seed(0)) for p in (policy, plain)]
    torch.testing.assert_close(*losses, atol=1e-5, rtol=1e-5)
    for loss in losses:
        loss.backward()
    for ours, theirs in zip(policy.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-3, atol=1e-4 * theirs.grad.abs().max().item() + 1e-7)
    torch.testing.assert_close(chunk(policy), chunk(plain), atol=1e-5, rtol=0)


@needs_code
@pytest.mark.usefixtures("pack_everything")
def test_a_bundle_is_loaded_at_a_precision_and_saved_as_it_was(tmp_path, policy, tiny_config):
    config = {"policy": tiny_config | SAMPLE}
    bundles.save(tmp_path / "a", policy, config, golden_obs={"state": STATE})
    loaded = bundles.load(tmp_path / "a", verify=True, precision="fp16")
    error = (chunk(loaded) - chunk(policy)).abs().max()
    assert 0 < error < 1e-2
    bundles.save(tmp_path / "b", loaded, config)
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in "ab"]
    assert files[0] == files[1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"precision": "fp8"}, "unknown precision 'fp8'.*choose from.*fp16"),
        ({"precision": 16}, "unknown precision '16'"),
        ({"cuda_graph": True}, "cuda_graph=true needs a CUDA device, the policy is on cpu"),
    ],
)
def test_what_cannot_be_done_is_refused(policy, options, message):
    with pytest.raises(InputError, match=message):
        accelerate(policy, **options)


def test_precisions_belong_to_devices(monkeypatch):
    with pytest.raises(InputError, match=r"precision=bf16 is for GPUs.*choose fp32 or fp16"):
        check_precision("bf16", torch.device("cpu"))
    check_precision("bf16", torch.device("cuda"))
    monkeypatch.setattr(cpu_unet, "library", lambda: None)
    with pytest.raises(InputError, match="needs this package's code in C, which was not compiled"):
        check_precision("fp16", torch.device("cpu"))
    check_precision("fp32", torch.device("cpu"))


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")
def test_a_compiled_denoiser_equals_itself(make_policy):
    """Compiled by C++, two levels of the network: each kernel takes the compiler two seconds."""
    policy = calm(make_policy(**SAMPLE, denoiser={"name": "unet1d", "channels": [8, 16], "time_dim": 16}))
    expected = chunk(policy)
    accelerate(policy, precision="fp32", compile=True)
    torch.testing.assert_close(chunk(policy), expected, atol=1e-5, rtol=0)
    chunk(policy).sum()
    policy.sample(observations(1), grad=True).normalized.sum().backward()  # by the layers
    assert policy.denoiser.out[1].weight.grad is not None


@pytest.mark.slow
def test_many_compiled_policies_fit_in_one_process(make_policy, monkeypatch):
    """torch gives a function up that it has compiled too often. With all levels of the network, which equals itself."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    with torch._dynamo.config.patch(recompile_limit=2):
        for _ in range(3):
            policy = calm(make_policy(**SAMPLE)).eval()
            expected = chunk(policy)
            accelerate(policy, precision="fp32", compile=True)
        torch.testing.assert_close(chunk(policy), expected, atol=1e-5, rtol=0)


def test_a_compiler_that_fails_is_reported(policy, monkeypatch):
    def broken(*args, **kwargs):
        def run(*inputs):
            raise RuntimeError("InvalidCxxCompiler: no working C++ compiler\nmore")

        return run

    monkeypatch.setattr(torch, "compile", broken)
    with pytest.raises(
        InputError, match=r"compile=true .* does not work on this machine: .*no working C\+\+ compiler$"
    ):
        accelerate(policy, compile=True)


@pytest.mark.gpu
@pytest.mark.parametrize("case", SCHEDULERS, ids=IDS)
@pytest.mark.parametrize("options", [{"cuda_graph": True}, {"compile": True}, {"compile": True, "cuda_graph": True}])
def test_on_a_gpu_captured_and_compiled_chunks_are_the_same(make_policy, case, options):
    policy = calm(make_policy(**(SAMPLE | case))).cuda().eval()
    for batch in (1, 4):
        accelerate(policy)
        expected = chunk(policy, batch)
        accelerate(policy, **options)
        for _ in range(2):
            torch.testing.assert_close(chunk(policy, batch), expected, atol=1e-5, rtol=0)
        with torch.inference_mode():
            torch.testing.assert_close(chunk(policy, batch), expected, atol=1e-5, rtol=0)


@pytest.mark.gpu
@pytest.mark.parametrize(("precision", "error"), [("fp32", 1e-5), ("bf16", 5e-2), ("fp16", 1e-2)])
def test_on_a_gpu_chunks_are_close_at_half_precision(policy, precision, error):
    policy = policy.cuda().eval()
    expected = chunk(policy)
    accelerate(policy, precision=precision)
    torch.testing.assert_close(chunk(policy), expected, atol=error, rtol=0)
    accelerate(policy, precision=precision, cuda_graph=True)
    torch.testing.assert_close(chunk(policy), expected, atol=error, rtol=0)


@pytest.mark.gpu
def test_a_captured_function_takes_new_inputs_and_shapes():
    layer = nn.Linear(4, 3).cuda()
    captured = CudaGraph(layer)
    with torch.no_grad():
        for rows in (1, 2, 1, *range(3, 12)):
            x = torch.randn(rows, 4, device="cuda")
            first = captured(x)
            torch.testing.assert_close(first, layer(x))
            captured(x + 1)
            torch.testing.assert_close(first, layer(x))  # not overwritten by the next call


@pytest.mark.parametrize(("alone", "together", "chosen"), [(1.0, 0.5, 4), (1.0, 0.95, 1), (1.0, 3.0, 1)])
def test_a_second_thread_is_used_where_it_helps(policy, monkeypatch, alone, together, chosen):
    seconds = {1: alone, 4: together}
    now = 0.0

    def predict(obs):
        nonlocal now
        assert obs["state"].shape == (2, 5)
        now += seconds[torch.get_num_threads()]

    monkeypatch.setattr(policy, "predict", predict)
    monkeypatch.setattr("action_diffusion.policy.inference.time.perf_counter", lambda: now)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(4)
        assert choose_threads(policy) == chosen
        assert torch.get_num_threads() == chosen
    finally:
        torch.set_num_threads(before)


@pytest.mark.slow
@pytest.mark.parametrize("case", SCHEDULERS, ids=IDS)
def test_a_chunk_is_a_function_of_tensors_where_nothing_looks_into_it(make_policy, case):
    """What a CUDA graph captures, and what is drawn outside of it."""
    policy = calm(make_policy(**(SAMPLE | case))).eval()
    expected, calls = chunk(policy, 3), []
    plain = policy.chunk
    policy.chunk = lambda *tensors: calls.append([*tensors]) or plain(*tensors)
    with torch.no_grad():
        torch.testing.assert_close(chunk(policy, 3), expected, atol=0, rtol=0)
        assert len(calls) == 1
        policy.sample(observations(1), hooks=[Hook()])
        policy.sample(observations(1), n_samples=2)
        policy.sample(observations(1), return_chain=True)
    policy.sample(observations(1), grad=True)
    assert len(calls) == 1


@pytest.mark.gpu
@pytest.mark.parametrize("precision", [None, "bf16"])
def test_on_a_gpu_a_replayed_image_chunk_is_the_plain_one(precision):
    from importlib import import_module

    gpu = import_module("benchmarks.speed.gpu")
    policy = gpu.policy_of("small", torch.device("cuda")).eval()
    arrays, _ = gpu.demonstrations()
    noise = np.random.default_rng(0).standard_normal((1, 16, 2), np.float32)
    plain, replayed = list[np.ndarray](), list[np.ndarray]()
    for chunks, options in ((plain, {}), (replayed, {"cuda_graph": True})):
        accelerate(policy, precision=precision, **options)
        for row in (0, 50, 0):
            obs = {key: arrays[key][row : row + 2] for key in policy.spec.observations}
            chunks.append(policy.predict(obs, noise=noise)["action_pred"] / 256)
    np.testing.assert_allclose(replayed, plain, atol=1e-4)
    assert np.abs(replayed[0] - replayed[1]).max() > 1e-3
    np.testing.assert_array_equal(replayed[0], replayed[2])
