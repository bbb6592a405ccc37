"""A denoising step as one call of C is what the layers of the U-Net give, whatever its shape."""

from __future__ import annotations

import copy
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from action_diffusion.policy import fused
from action_diffusion.policy.activations import ACTIVATIONS
from action_diffusion.policy.denoiser import ConditionalUnet1d
from action_diffusion.policy.packing import LEAST

needs_code = pytest.mark.skipif(
    fused.library() is None, reason="policy/unet.c is not compiled: install again where there is gcc"
)


def unet(*, channels=(48, 96), seed=0, **options) -> ConditionalUnet1d:
    torch.manual_seed(seed)
    net = ConditionalUnet1d(**{"action_dim": 2, "condition_dim": 5, "channels": channels, "time_dim": 8} | options)
    for module in net.modules():  # norms that do something
        if type(module).__name__ == "GroupNorm":
            torch.nn.init.normal_(module.weight, 1.0, 0.3)
            torch.nn.init.normal_(module.bias, 0.0, 0.3)
    return net.eval()


def inputs(net: ConditionalUnet1d, steps: int, batch: int) -> tuple[torch.Tensor, torch.Tensor]:
    film = net.prepare(torch.randn(batch, 5), torch.tensor([3.0])).at(0)
    return torch.randn(batch, steps, net.input_dim), film


@needs_code
@settings(deadline=None, max_examples=60)
@given(
    channels=st.lists(st.sampled_from([8, 16, 40, 48, 64, 96, 104]), min_size=1, max_size=4),
    steps=st.integers(1, 4),
    batch=st.integers(1, 5),
    kernel_size=st.sampled_from([1, 3, 5, 7]),
    n_groups=st.sampled_from([1, 4, 8]),
    action_dim=st.integers(1, 40),
    marked=st.booleans(),
    activation=st.sampled_from(["silu", "mish", "relu"]),
    threads=st.sampled_from([1, 2, 3]),
)
def test_a_step_is_what_the_layers_give(channels, steps, batch, threads, **options):
    net = unet(channels=channels, **options)
    steps *= 2 ** (len(channels) - 1)
    batch = min(batch, fused.MOST_ROWS // steps)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with torch.no_grad():
            x, film = inputs(net, steps, batch)
            exact = copy.deepcopy(net).double().run(x.double(), film.double())
            plain = net(x, film)
            net.pack("fp32")
            ours = [net(x, film), net(x, film)]
            assert net._fused._programs
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
        block, linear = net.out
        block.norm.weight.copy_(torch.logspace(-3, 2, 32))
        linear.weight.copy_(torch.eye(32))
        x, film = inputs(net, 16, 1)
        seen = []
        block.norm.register_forward_hook(lambda *given: seen.append(given[2]))
        plain = net(x, film)
        values = seen[0].transpose(0, 1)
        assert values.abs().max() > 80
        net.pack("fp32")
        ours = net(x, film)
    assert (ours - plain).abs().max() < 2e-5 * plain.abs().max()
    exact = ACTIVATIONS[activation](values.double()) + linear.bias.double()
    assert (ours - exact).abs().max() < 4e-5 * exact.abs().max()


@needs_code
def test_what_is_not_finite_stays_so():
    net = unet()
    with torch.no_grad():
        x, film = inputs(net, 8, 1)
        net.pack("fp32")
        assert net(x * torch.nan, film).isnan().all()
        assert net(x, film).isfinite().all()  # and leaves nothing behind


@needs_code
def test_inference_mode_and_its_absence_may_take_turns():
    net = unet()
    with torch.no_grad():
        x, film = inputs(net, 8, 1)
        net.pack("fp32")
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
        net.pack("fp32")
        first = net(x, film)
        kept = first.clone()
        assert not torch.equal(net(other, film), kept)
    assert torch.equal(first, kept)


@needs_code
def test_one_modulation_serves_all_rows_and_what_does_not_fit_is_refused_as_by_the_layers():
    net = unet()
    with torch.no_grad():
        x, film = inputs(net, 8, 3)
        net.pack("fp32")
        torch.testing.assert_close(net(x, film[:1]), net(x, film[:1].repeat(3, 1)), rtol=0, atol=0)
        for wrong in (x[:, :5], x[:, :, :1], x[0]):
            with pytest.raises(RuntimeError):
                net(wrong, film)


@needs_code
def test_the_types_and_devices_that_torch_makes_by_default_are_not_taken():
    net = unet()
    with torch.no_grad():
        x, film = inputs(net, 8, 1)
        plain = net(x, film)
        net.pack("fp32")
        torch.set_default_dtype(torch.float64)
        try:
            ours = net(x, film)
        finally:
            torch.set_default_dtype(torch.float32)
    torch.testing.assert_close(ours, plain, rtol=0, atol=2e-5)


@needs_code
def test_memory_of_many_sizes_is_not_kept():
    net = unet(channels=(16,))
    net.pack("fp32")
    with torch.no_grad():
        for batch in range(1, 2 * fused.MOST_PROGRAMS):
            net(*inputs(net, 4, batch))
    assert len(net._fused._programs) == fused.MOST_PROGRAMS


@needs_code
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_weights_that_are_not_finite_show_in_half_precision(value):
    net = unet(channels=(256,))
    with torch.no_grad():
        net.middle[0].first.conv.weight[0, 0, 0] = value
        x, film = inputs(net, 8, 1)
        net.pack("fp16")
        assert not net(x, film).isfinite().all()


@needs_code
def test_rows_do_not_depend_on_each_other():
    net = unet()
    with torch.no_grad():
        x, film = inputs(net, 8, 5)
        net.pack("fp32")
        whole = net(x, film)
        for one in range(5):
            assert torch.equal(net(x[one : one + 1], film[one : one + 1]), whole[one : one + 1])


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
        for layer in rounded._layers():
            if layer.weight.numel() >= LEAST["fp16"]:
                layer.weight.copy_(layer.weight.half())
        assert not torch.equal(rounded.middle[0].first.conv.weight, net.middle[0].first.conv.weight)
        expected, full = rounded(x, film), net(x, film)
        net.pack("fp16")
        ours = net(x, film)
        assert net._fused._programs
    torch.testing.assert_close(ours, expected, rtol=0, atol=2e-5)
    assert (expected - full).abs().max() > 1e-4


@needs_code
def test_it_is_forgotten_with_the_weights_and_by_copies():
    net = unet()
    with torch.no_grad():
        x, film = inputs(net, 8, 1)
        net.pack("fp32")
        before = net(x, film)
        assert copy.deepcopy(net)._fused is None
        net.load_state_dict({name: 2 * value for name, value in net.state_dict().items()})
        assert net._fused is None
        plain = net(x, film)
        assert (plain - before).abs().max() > 0.1
        net.pack("fp32")
        torch.testing.assert_close(net(x, film), plain, rtol=0, atol=2e-5)
        part = net.middle[0].first
        part.load_state_dict({name: 3 * value for name, value in part.state_dict().items()})
        now = net(x, film)
        torch.testing.assert_close(now, copy.deepcopy(net)(x, film), rtol=0, atol=2e-5)
        assert (now - plain).abs().max() > 1e-3
    net.train()
    assert net._fused is None


@needs_code
def test_several_threads_may_call_it():
    net = unet()
    with torch.no_grad():
        given = [inputs(net, 8, 1) for _ in range(50)]
        net.pack("fp32")
        expected = [net(*one) for one in given]

    def call(one):
        with torch.no_grad():
            return net(*one)

    with ThreadPoolExecutor(4) as pool:
        for ours, theirs in zip(pool.map(call, given), expected, strict=True):
            assert torch.equal(ours, theirs)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("activation", ["silu", "mish", "relu"])
def test_on_other_processors_it_is_the_same(activation, precision, other_processor, monkeypatch):
    library = other_processor(Path(fused.__file__).parent / "unet.c")
    monkeypatch.setattr(fused, "library", lambda: library)
    net = unet(channels=(48, 256), activation=activation)
    with torch.no_grad():
        x, film = inputs(net, 16, 3)
        plain = net(x, film)
        net.pack(precision)
        ours = net(x, film)
        assert net._fused._programs
    torch.testing.assert_close(ours, plain, rtol=0, atol=2e-5 if precision == "fp32" else 5e-3)


def test_what_it_is_not_for_goes_through_the_layers(monkeypatch):
    """A gradient, many rows, another type, activation or precision, and a machine without the code."""
    net = unet()
    monkeypatch.setattr(fused.Fused, "__call__", None)
    net.pack("fp32")
    with torch.no_grad():
        many = inputs(net, 16, 17)
        few = inputs(net, 8, 1)
        assert net(*many).shape == (17, 16, 2)
    few[0].requires_grad_()
    assert net(*few).requires_grad
    with torch.no_grad():
        assert net.double()(*(value.double() for value in few)).dtype == torch.float64
        other = unet(activation="gelu")
        other.pack("fp32")
        assert other(*few).shape == (1, 8, 2)
        half = unet()
        half.pack("int8")
        assert half(*few).shape == (1, 8, 2)
        monkeypatch.setattr(fused, "library", lambda: None)
        without = unet()
        without.pack("fp32")
        assert without(*few).shape == (1, 8, 2)
