"""The transformer and DiT: torch's own decoder and plain formulas as references, causality, conditions, bundles."""

from __future__ import annotations

import shutil
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from action_diffusion.errors import InputError
from action_diffusion.policy import bundle as bundles
from action_diffusion.policy.kernels import accelerate
from action_diffusion.policy.model.denoisers.denoiser import Denoiser
from action_diffusion.policy.model.denoisers.dit import DiffusionTransformer, modulated
from action_diffusion.policy.model.denoisers.transformer import TransformerDenoiser
from action_diffusion.policy.sample import Prefix

SMALL: dict[str, Any] = {"width": 16, "layers": 2, "heads": 2}
NAMES = ("transformer", "dit")
STATE = np.arange(10, dtype=np.float32).reshape(2, 5) + 100
TIMES = torch.tensor([90.0, 40.0, 0.0])


def lively(net: Any) -> Any:
    """All weights drawn anew, so that none is 0 and everything has an effect."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return net.eval()


def network(name: str, **options: Any) -> Any:
    """A = 3; conditions of 10 values, for the transformer of two observations."""
    if name == "dit":
        return lively(DiffusionTransformer(action_dim=3, condition_dim=10, **SMALL | options))
    sizes = {"action_dim": 3, "condition_dim": 10, "n_obs_steps": 2, "horizon": 8}
    return lively(TransformerDenoiser(**sizes | SMALL | options))


def given(seed: int = 0, channels: int = 3) -> tuple[Tensor, Tensor]:
    """x [4, 8, A] and a condition [4, 10]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(4, 8, channels, generator=generator), torch.randn(4, 10, generator=generator)


def observations(n: int) -> dict[str, Tensor]:
    return {"state": torch.from_numpy(np.stack([STATE + i for i in range(n)]))}


def chunks(policy: Any, n: int = 3, **options: Any) -> Tensor:
    noise = torch.randn(n, 8, 2, generator=torch.Generator().manual_seed(1))
    return policy.sample(observations(n), noise=noise, **options).normalized


def test_the_transformer_is_torch_s_decoder_with_the_paper_s_memory():
    """Its weights under the paper's names, as the docstring says that they are called there."""
    net = network("transformer")
    layer = nn.TransformerDecoderLayer(16, 2, 64, 0.0, "gelu", batch_first=True, norm_first=True)
    decoder = nn.TransformerDecoder(layer, 2).eval()
    theirs = {}
    for name, value in net.decoder.state_dict().items():
        if "multihead_attn.query" in name:
            value = torch.cat([value, net.decoder.state_dict()[name.replace("query", "key_value")]])
            name = name.replace("query.", "in_proj_")
        if "key_value" not in name:
            theirs["layers." + name.replace("in_proj.", "in_proj_")] = value
    decoder.load_state_dict(theirs)
    x, condition = given()
    for index, time in enumerate(TIMES):
        half = torch.exp(-torch.arange(8) * np.log(10000.0) / 7)
        embedded = torch.cat([(time * half).sin(), (time * half).cos()]).expand(4, 1, 16)
        tokens = torch.cat([embedded, net.cond_obs_emb(condition.view(4, 2, 5))], dim=1) + net.cond_pos_emb.weight
        steps, places = torch.meshgrid(torch.arange(8), torch.arange(3), indexing="ij")
        h = decoder(
            net.input_emb(x) + net.pos_emb.weight,
            net.encoder(tokens),
            tgt_mask=nn.Transformer.generate_square_subsequent_mask(8),
            memory_mask=~(steps >= places - 1),
        )
        found = net(x, net.prepare(condition, TIMES).at(index))
        torch.testing.assert_close(found, net.head(net.ln_f(h)), atol=1e-4, rtol=1e-4)


def test_a_block_of_the_dit_is_the_paper_s():
    net = network("dit")
    block = net.blocks[0]
    x = torch.randn(4, 8, 16)
    film = torch.randn(4, 96)
    shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = (part[:, None] for part in film.split(16, dim=1))
    attention = nn.MultiheadAttention(16, 2, batch_first=True)
    names = {"in_proj_weight": "in_proj.weight", "in_proj_bias": "in_proj.bias"}
    own = block.attention.state_dict()
    attention.load_state_dict({name: own[names.get(name, name)] for name in attention.state_dict()})
    norm = nn.LayerNorm(16, eps=1e-6, elementwise_affine=False)
    inner = norm(x) * (1 + scale_1) + shift_1
    torch.testing.assert_close(modulated(x, shift_1, scale_1), inner)
    h = x + gate_1 * attention(inner, inner, inner)[0]
    first, last = block.mlp[0], block.mlp[2]
    h = h + gate_2 * last(F.gelu(first(norm(h) * (1 + scale_2) + shift_2), approximate="tanh"))
    torch.testing.assert_close(block(x, film), h, atol=1e-4, rtol=1e-4)


def test_an_untrained_dit_says_zero_and_its_blocks_change_nothing():
    net = DiffusionTransformer(action_dim=3, condition_dim=10, **SMALL)
    x, condition = given()
    assert (net(x, net.prepare(condition, TIMES).at(0)) == 0).all()
    h = torch.randn(4, 8, 16)
    assert torch.equal(net.blocks[0](h, net.prepare(condition, TIMES).at(0)[:, :96]), h)


@pytest.mark.parametrize("name", NAMES)
def test_what_is_prepared_once_gives_what_is_computed_each_time(name):
    net = network(name)
    x, condition = given()
    film = net.prepare(condition, TIMES)
    for index, time in enumerate(TIMES):
        alone = net.prepare(condition, time.expand(4))
        found = net(x, film.at(index))
        assert found.shape == x.shape
        torch.testing.assert_close(found, net(x, alone.steps + alone.condition))
    rows = torch.tensor([1, 3])
    torch.testing.assert_close(net(x[rows], film.at(1, rows)), net(x, film.at(1))[rows], atol=1e-5, rtol=1e-4)


def changed(net: Denoiser, x: Tensor, condition: Tensor, other_x: Tensor, other: Tensor) -> list[bool]:
    """Of each step, whether any value differs."""
    results = [net(a, net.prepare(b, TIMES).at(1)) for a, b in ((x, condition), (other_x, other))]
    return ((results[0] - results[1]).abs().amax(dim=(0, 2)) > 1e-6).tolist()


@pytest.mark.parametrize(("name", "options"), [("transformer", {}), ("transformer", {"causal": False}), ("dit", {})])
def test_only_a_causal_transformer_does_not_see_what_comes_later(name, options):
    net = network(name, **options)
    causal = name == "transformer" and not options
    x, condition = given()
    later = x.clone()
    later[:, 5] += 1.0
    assert changed(net, x, condition, later, condition) == [not causal] * 5 + [True] + [True] * 2
    now = condition.clone()
    now[:, 5:] += 1.0  # the second of two observations, of the time of the second action
    assert changed(net, x, condition, x, now) == [not causal] + [True] * 7
    past = condition.clone()
    past[:, :5] += 1.0
    assert changed(net, x, condition, x, past) == [True] * 8


@pytest.mark.parametrize("name", NAMES)
def test_each_step_has_a_place_and_depends_on_the_time(name):
    net = network(name)
    x, condition = given()
    film = net.prepare(condition, TIMES)
    same = net(x[:, :1].expand(-1, 8, -1), film.at(0))
    assert (same.diff(dim=1).abs().amax(dim=(0, 2)) > 1e-6).all()
    assert ((net(x, film.at(0)) - net(x, film.at(1))).abs().amax(dim=(0, 2)) > 1e-6).all()


@pytest.mark.parametrize("name", NAMES)
def test_two_times_are_where_a_step_begins_and_where_it_ends(name):
    net = network(name, two_times=True)
    x, condition = given()
    film = net.prepare(condition, torch.tensor([[90.0, 90.0], [90.0, 40.0], [60.0, 10.0]]))
    outputs = [net(x, film.at(index)) for index in range(3)]
    for first, second in ((0, 1), (1, 2)):
        assert (outputs[first] - outputs[second]).abs().amax() > 1e-6


@pytest.mark.parametrize("name", NAMES)
def test_marks_of_prefix_steps_are_seen(name):
    net = network(name, marked=True)
    x, condition = given(channels=4)
    marked = x.clone()
    marked[:, 0, 3] += 1.0
    assert net(x, net.prepare(condition, TIMES).at(0)).shape == (4, 8, 3)
    assert changed(net, x, condition, marked, condition) == [True] * 8


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"width": 18, "heads": 4}, "width=18 must be divisible by denoiser.heads=4"),
        ({"width": 5, "heads": 1}, "width=5 must be even"),
    ],
)
def test_impossible_sizes_are_refused(name, options, message):
    with pytest.raises(InputError, match=message):
        network(name, **options)


def test_a_chunk_longer_than_there_are_positions_is_refused():
    network("transformer").check_horizon(8)
    with pytest.raises(InputError, match="horizon=9: this transformer has positions for 8 steps"):
        network("transformer").check_horizon(9)
    with pytest.raises(InputError, match="10 values has no 3 equal parts"):
        network("transformer", n_obs_steps=3)
    network("dit").check_horizon(1000)


@pytest.mark.parametrize("name", NAMES)
def test_autocast_stays_close(name):
    net = network(name)
    x, condition = given()
    film = net.prepare(condition, TIMES).at(0)
    with torch.autocast("cpu", torch.bfloat16):
        low = net(x, film)
    expected = net(x, film)
    assert (low.float() - expected).abs().max() < 0.05 * expected.abs().max()


def test_dropout_is_of_training_only():
    net, x, condition = network("transformer", dropout=0.5), *given()
    film = net.prepare(condition, TIMES).at(0)
    assert torch.equal(net(x, film), network("transformer")(x, film))
    net.train()
    assert not torch.equal(net(x, film), net(x, film))


# In a policy.


@pytest.fixture(params=NAMES)
def parts(request) -> dict[str, Any]:
    return {"denoiser": {"name": request.param, **SMALL}, "process": {"name": "diffusion", "prediction": "sample"}}


def made(make_policy: Any, parts: dict[str, Any], **changes: Any) -> Any:
    policy = make_policy(**parts | changes)
    lively(policy.denoiser)
    return policy.eval()


@pytest.mark.slow
@pytest.mark.parametrize("objective", [{"loss": "mse"}, {"loss": "mse", "max_delay": 3}])
def test_a_bundle_gives_the_same_chunks(make_policy, parts, tmp_path, tiny_config, objective):
    policy = made(make_policy, parts, objective=objective)
    config = {"policy": tiny_config | parts | {"objective": objective}}
    bundles.save(tmp_path / "bundle", policy, config, golden_obs={"state": STATE})
    loaded = bundles.load(tmp_path / "bundle", verify=True, precision="fp32")
    with torch.inference_mode():
        torch.testing.assert_close(chunks(loaded), chunks(policy), atol=1e-5, rtol=0)
    with pytest.raises(InputError, match="precision=fp16 on a CPU is for the denoiser unet1d, this is a"):
        bundles.load(tmp_path / "bundle", precision="fp16")


@pytest.mark.slow
def test_a_chunk_goes_on_from_prefix_steps_and_rows_are_independent(make_policy, parts):
    policy = made(make_policy, parts, objective={"loss": "mse", "max_delay": 3})
    action = torch.rand(3, 8, 2, generator=torch.Generator().manual_seed(0)) - 0.5
    step = torch.arange(8) - 1
    known = Prefix(action, (step >= 0) & (step < torch.tensor([2, 0, 3])[:, None]))
    found = chunks(policy, prefix=known)
    assert torch.equal(found[known.steps], action[known.steps])
    other = chunks(policy, prefix=Prefix(torch.cat([action[:2], -action[2:]]), known.steps))
    torch.testing.assert_close(other[:2], found[:2], atol=1e-5, rtol=0)
    assert (other[2, 4:] - found[2, 4:]).abs().max() > 1e-4


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")
def test_compiled_it_gives_the_same(make_policy, parts):
    policy = made(make_policy, parts)
    with torch.inference_mode():
        expected = chunks(policy)
        accelerate(policy, precision="fp32", compile=True)
        torch.testing.assert_close(chunks(policy), expected, atol=1e-4, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("scheduler", ["flow", "ddim"])
def test_training_lowers_the_loss(make_policy, parts, scheduler):
    """Of flow maps, which tell two times, and of denoising."""
    changes: dict[str, Any] = {"objective": {"loss": "mse"}}
    if scheduler == "flow":
        changes = {"objective": {"name": "shortcut"}, "process": {"name": "flow"}}
        changes["sampler"] = {"scheduler": "flow", "num_inference_steps": 1}
    policy = make_policy(**parts | changes).train()
    optimizer = torch.optim.AdamW(policy.parameters(), lr=3e-3)
    action = 100 + torch.randn(16, 8, 2, generator=torch.Generator().manual_seed(0)).cumsum(dim=1)
    losses, random = [], torch.Generator().manual_seed(0)
    for _ in range(150):
        loss = policy(observations(16), action, generator=random)
        optimizer.zero_grad()
        loss.backward()
        assert all(parameter.grad is not None for parameter in policy.denoiser.parameters())
        optimizer.step()
        losses.append(loss.item())
    assert np.mean(losses[-20:]) < 0.6 * np.mean(losses[:20])


def test_the_memory_has_a_token_for_each_observation(make_policy, parts):
    policy = make_policy(**parts)
    if parts["denoiser"]["name"] == "transformer":
        assert (policy.denoiser.n_obs_steps, policy.denoiser.horizon) == (2, 8)
