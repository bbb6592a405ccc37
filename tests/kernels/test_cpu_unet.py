"""A denoising step as one call of C is what the layers of the U-Net give, whatever its shape."""

from __future__ import annotations

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from networks import inputs, unet

from action_diffusion.policy.kernels import cpu_unet
from action_diffusion.policy.kernels.cpu_unet import LEAST_HALF, CpuUnet
from action_diffusion.policy.kernels.layers import Beginning
from action_diffusion.policy.model.activations import ACTIVATIONS
from action_diffusion.policy.model.conv import Product
from action_diffusion.policy.model.denoisers.unet import ConditionalUnet1d

needs_code = pytest.mark.skipif(
    cpu_unet.library() is None, reason="policy/kernels/unet.c is not compiled: install again where there is gcc"
)
MIDDLE = "middle.0.first.conv.weight"


def in_one_call(net: ConditionalUnet1d, *, half: bool = False) -> ConditionalUnet1d:
    """`net`, whose forward is the code in C and nothing else."""
    kernel = CpuUnet(net, half=half)
    net.forward, net.prepare = kernel, Beginning(net)
    kernel.plain = None  # what it leaves to the layers fails
    kernel.fastest = lambda operation, size, ways, sample: ways["one_call"]
    return net


def kernel_of(net: ConditionalUnet1d) -> Any:
    """What stands for the method `forward` of `net`."""
    return net.forward


@pytest.mark.slow
@needs_code
@settings(deadline=None, max_examples=60)
@given(
    channels=st.lists(st.sampled_from([8, 16, 40, 48, 64, 96, 104]), min_size=1, max_size=4),
    steps=st.integers(1, 4),
    batch=st.sampled_from([1, 2, 3, 5, 40]),
    kernel_size=st.sampled_from([1, 3, 5, 7]),
    n_groups=st.sampled_from([1, 4, 8]),
    action_dim=st.integers(1, 40),
    marked=st.booleans(),
    activation=st.sampled_from(["silu", "mish", "relu"]),
    threads=st.sampled_from([1, 2, 3]),
)
def test_a_step_is_what_the_layers_give(channels, steps, batch, threads, **options):
    # Of two numbers a norm makes ±1 however near they are: rounding then counts up to 300 times, in the layers as here.
    assume(steps * min(channels) // options["n_groups"] >= 4)
    net = unet(channels=channels, **options)
    steps *= 2 ** (len(channels) - 1)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with torch.no_grad():
            x, film = inputs(net, steps, batch)
            exact = copy.deepcopy(net).double()(x.double(), film.double())
            plain = net(x, film)
            in_one_call(net)
            ours = [net(x, film), net(x, film)]
    finally:
        torch.set_num_threads(before)
    size = exact.abs().max().clamp_min(1.0)
    assert torch.equal(*ours)
    assert (ours[0] - exact).abs().max() < max(2e-5 * size, 4 * (plain - exact).abs().max())


@needs_code
@pytest.mark.parametrize("activation", ["silu", "mish", "relu"])
def test_activations_are_torchs_over_their_whole_range(activation):
    """A network whose last block passes the values of its norm, from -100 to 100 and beyond, on to the output."""
    net = unet(channels=(32,), activation=activation, action_dim=32, n_groups=1)
    with torch.no_grad():
        block: Any = net.get_submodule("out.0")
        linear: Any = net.get_submodule("out.1")
        block.norm.weight.copy_(torch.logspace(-3, 2, 32))
        linear.weight.copy_(torch.eye(32))
        x, film = inputs(net, 16, 1)
        seen = []
        block.norm.register_forward_hook(lambda *given: seen.append(given[2]))
        plain = net(x, film)
        values = seen[0].transpose(0, 1)
        assert values.abs().max() > 80
        in_one_call(net)
        ours = net(x, film)
    assert (ours - plain).abs().max() < 2e-5 * plain.abs().max()
    exact = ACTIVATIONS[activation](values.double()) + linear.bias.double()
    assert (ours - exact).abs().max() < 4e-5 * exact.abs().max()


@needs_code
def test_what_is_not_finite_stays_so():
    net = unet()
    with torch.no_grad():
        x, film = inputs(net, 8, 1)
        in_one_call(net)
        assert net(x * torch.nan, film).isnan().all()
        assert net(x, film).isfinite().all()  # and leaves nothing behind


@needs_code
def test_inference_mode_and_its_absence_may_take_turns():
    net = unet()
    with torch.no_grad():
        x, film = inputs(net, 8, 1)
        in_one_call(net)
    out = []
    for mode in (torch.inference_mode, torch.no_grad, torch.inference_mode):
        with mode():
            out.append(net(x, film).clone())
    assert torch.equal(out[0], out[1])
    assert torch.equal(out[0], out[2])


@needs_code
@pytest.mark.parametrize(("batch", "steps"), [(1, 8), (2, 8), (1, 1)])
def test_an_output_is_not_overwritten_by_the_next_step(batch, steps):
    net = unet(channels=(32,), action_dim=32)
    with torch.no_grad():
        (x, film), (other, _) = inputs(net, steps, batch), inputs(net, steps, batch)
        in_one_call(net)
        first = net(x, film)
        kept = first.clone()
        assert not torch.equal(net(other, film), kept)
    assert torch.equal(first, kept)


@needs_code
def test_one_modulation_serves_all_rows_and_what_does_not_fit_is_refused_as_by_the_layers():
    net = unet()
    with torch.no_grad():
        x, film = inputs(net, 8, 3)
        in_one_call(net)
        torch.testing.assert_close(net(x, film[:1]), net(x, film[:1].repeat(3, 1)), rtol=0, atol=0)
        net.forward = CpuUnet(net)
        for wrong in (x[:, :5], x[:, :, :1], x[0]):
            with pytest.raises((RuntimeError, IndexError)):
                net(wrong, film)


@needs_code
def test_the_types_and_devices_that_torch_makes_by_default_are_not_taken():
    net = unet()
    with torch.no_grad():
        x, film = inputs(net, 8, 1)
        plain = net(x, film)
        in_one_call(net)
        torch.set_default_dtype(torch.float64)
        try:
            ours = net(x, film)
        finally:
            torch.set_default_dtype(torch.float32)
    torch.testing.assert_close(ours, plain, rtol=0, atol=2e-5)


@needs_code
def test_memory_of_many_sizes_is_not_kept():
    net = unet(channels=(16,))
    in_one_call(net)
    with torch.no_grad():
        for batch in range(1, 2 * cpu_unet.MOST_PROGRAMS):
            net(*inputs(net, 4, batch))
    assert len(kernel_of(net).made("programs", dict)) == cpu_unet.MOST_PROGRAMS


@needs_code
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_weights_that_are_not_finite_show_in_half_precision(value):
    net = unet(channels=(256,))
    with torch.no_grad():
        net.get_parameter(MIDDLE)[0, 0, 0] = value
        x, film = inputs(net, 8, 1)
        in_one_call(net, half=True)
        assert not net(x, film).isfinite().all()


@needs_code
def test_rows_do_not_depend_on_each_other():
    net = unet()
    with torch.no_grad():
        x, film = inputs(net, 8, 5)
        in_one_call(net)
        whole = net(x, film)
        for one in range(5):
            assert torch.equal(net(x[one : one + 1], film[one : one + 1]), whole[one : one + 1])


@needs_code
@pytest.mark.parametrize(("steps", "batch"), [(12, 25), (16, 17), (16, 100), (8, 33)])
@pytest.mark.parametrize("half", [False, True])
def test_many_rows_are_what_the_layers_give(steps, batch, half):
    """More than take a weight together."""
    net = unet(channels=(48, 96, 192))
    with torch.no_grad():
        x, film = inputs(net, steps, batch)
        plain = net(x, film)
        ours = in_one_call(net, half=half)(x, film)
    torch.testing.assert_close(ours, plain, rtol=0, atol=5e-3 if half else 2e-5)


@needs_code
def test_half_precision_is_that_of_the_weights():
    """Of every size that float16 has, those below the smallest normal one included."""
    net = unet(channels=(256, 256))
    with torch.no_grad():
        for weight in net.parameters():
            scale = torch.exp2(torch.randint(-24, 1, weight.shape).float()) if weight.ndim == 3 else 1.0
            weight.mul_(scale)
        x, film = inputs(net, 16, 3)
        rounded = copy.deepcopy(net)
        for layer in rounded.modules():
            if isinstance(layer, Product) and layer.weight.numel() >= LEAST_HALF:
                layer.weight.copy_(layer.weight.half())
        assert not torch.equal(rounded.get_parameter(MIDDLE), net.get_parameter(MIDDLE))
        expected, full = rounded(x, film), net(x, film)
        in_one_call(net, half=True)
        ours = net(x, film)
    torch.testing.assert_close(ours, expected, rtol=0, atol=2e-5)
    assert (expected - full).abs().max() > 1e-4


@needs_code
@pytest.mark.parametrize("change", ["load", "one layer", "optimiser", "assign"])
def test_a_chunk_that_begins_with_other_weights_takes_them(change):
    net = unet()
    condition, times = torch.randn(1, 5), torch.tensor([3.0])
    with torch.no_grad():
        x, film = inputs(net, 8, 1)
        before = net(x, film)
        in_one_call(net)
        torch.testing.assert_close(net(x, net.prepare(condition, times).at(0)), before, rtol=9, atol=9)  # lays it out
        other = {name: 1.5 * value for name, value in net.state_dict().items()}
        if change == "one layer":
            part = net.get_submodule("middle.0.first")
            part.load_state_dict({name: 3 * value for name, value in part.state_dict().items()})
        elif change == "optimiser":
            for parameter in net.parameters():
                parameter.grad = torch.full_like(parameter, 0.1)
            torch.optim.AdamW(net.parameters(), lr=0.1, fused=True).step()
        else:
            net.load_state_dict(other, assign=change == "assign")
        film = net.prepare(condition, times).at(0)
        expected = ConditionalUnet1d.forward(net, x, film)
        torch.testing.assert_close(net(x, film), expected, rtol=0, atol=1e-4)
        assert (expected - before).abs().max() > 1e-3


@pytest.mark.slow
@needs_code
def test_a_copy_has_a_kernel_and_weights_of_its_own():
    net = in_one_call(unet())
    with torch.no_grad():
        x, film = inputs(net, 8, 1)
        before = net(x, film)
        for other in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
            assert kernel_of(other).layer is other
            for parameter in other.parameters():
                parameter.mul_(2)
            other.prepare(torch.randn(1, 5), torch.tensor([3.0]))
            torch.testing.assert_close(other(x, film), ConditionalUnet1d.forward(other, x, film), rtol=1e-4, atol=1e-4)
        assert torch.equal(net(x, film), before)


@needs_code
def test_several_threads_may_call_it():
    net = unet()
    with torch.no_grad():
        given = [inputs(net, 8, 1) for _ in range(50)]
        in_one_call(net)
        expected = [net(*one) for one in given]

    def call(one):
        with torch.no_grad():
            return net(*one)

    with ThreadPoolExecutor(4) as pool:
        for ours, theirs in zip(pool.map(call, given), expected, strict=True):
            assert torch.equal(ours, theirs)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("activation", ["silu", "mish", "relu"])
def test_on_other_processors_it_is_the_same(activation, precision, other_processor, monkeypatch):
    library = other_processor(Path(cpu_unet.__file__).parent / "unet.c")
    monkeypatch.setattr(cpu_unet, "library", lambda: library)
    net = unet(channels=(48, 256), activation=activation)
    with torch.no_grad():
        x, film = inputs(net, 16, 3)
        plain = net(x, film)
        in_one_call(net, half=precision == "fp16")
        ours = net(x, film)
    torch.testing.assert_close(ours, plain, rtol=0, atol=2e-5 if precision == "fp32" else 5e-3)


def test_what_it_is_not_for_goes_through_the_layers(monkeypatch):
    """A gradient, a network in training, many rows, another type or activation, and a machine without the code."""
    net = unet()
    net.forward = CpuUnet(net)
    monkeypatch.setattr(CpuUnet, "run", None)
    few = inputs(net, 8, 1)
    with torch.no_grad():
        assert net(*inputs(net, 16, 1 + cpu_unet.MOST_ROWS // 16)).shape[1:] == (16, 2)
    few[0].requires_grad_()
    assert net(*few).requires_grad
    with torch.no_grad():
        assert net.train()(*few).shape == (1, 8, 2)
        assert net.eval().double()(*(value.double() for value in few)).dtype == torch.float64
        other = unet(activation="gelu")
        other.forward = CpuUnet(other)
        assert other(*few).shape == (1, 8, 2)
        monkeypatch.setattr(cpu_unet, "library", lambda: None)
        without = unet()
        without.forward = CpuUnet(without)
        assert without(*few).shape == (1, 8, 2)
