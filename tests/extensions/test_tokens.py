"""Two heads: chunks as whole numbers, a head that says them, and where they lead a denoiser."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.fft import dct
from tiny import TINY, demonstrations, tiny_policy

from action_diffusion.datasets.batches.loader import BatchSource, ObsKey
from action_diffusion.datasets.batches.windows import make_windows
from action_diffusion.errors import InputError
from action_diffusion.options.extensions import TokensOptions
from action_diffusion.policy import bundle as bundles
from action_diffusion.policy.extensions.extension import Fitted, write
from action_diffusion.policy.extensions.token_head import ChunkTokens, TokenHead
from action_diffusion.policy.extensions.tokens import Tokens
from action_diffusion.policy.value.noise import cosine_basis


def source() -> BatchSource:
    buffer = demonstrations()
    return BatchSource(
        buffer=buffer,
        windows=make_windows(buffer.episode_ends, horizon=8, n_obs_steps=2, n_action_steps=4),
        observations={"state": ObsKey("state", None, "state")},
        action_key="action",
        n_obs_steps=2,
        device=torch.device("cpu"),
    )


def options(**changes):
    return vars(TokensOptions(bundle="", steps=20, hidden=16)) | changes


def test_the_basis_is_scipys() -> None:
    x = np.random.default_rng(0).normal(size=(12, 3))
    np.testing.assert_allclose(cosine_basis(12).numpy() @ x, dct(x, axis=0, norm="ortho"), atol=1e-6)


def test_tokens_say_a_chunk_to_half_a_level() -> None:
    tokens = ChunkTokens(horizon=8, frequencies=8, levels=200, size=0.02)
    chunk = torch.randn(5, 8, 2, generator=torch.Generator().manual_seed(0)).clamp(-1, 1)
    said = tokens.encode(chunk)
    assert said.shape == (5, 16)
    away = torch.einsum("fh,bha->bfa", tokens.basis, tokens.decode(said) - chunk)
    assert away.abs().max() <= 0.01 + 1e-5


def test_low_frequencies_come_first_and_the_others_are_left_out() -> None:
    tokens = ChunkTokens(horizon=8, frequencies=2, levels=10, size=0.5)
    still = torch.full((1, 8, 2), 1.0)
    still[..., 1] = -1.0
    said = tokens.encode(still) - 10
    assert said.tolist() == [[round(8**0.5 / 0.5), -round(8**0.5 / 0.5), 0, 0]]
    wave = cosine_basis(8)[5].view(1, 8, 1).expand(1, 8, 2)
    assert (tokens.encode(wave) == 10).all()


def test_a_head_learns_what_depends_on_what_was_said_before() -> None:
    """Two ways, half each: the second token is the first, which no observation tells."""
    torch.manual_seed(0)
    head = TokenHead(condition_dim=1, n_tokens=2, vocabulary=3, hidden=16)
    optimizer = torch.optim.Adam(head.parameters(), lr=0.02)
    condition = torch.zeros(64, 1)
    tokens = torch.tensor([[0, 0], [2, 2]]).repeat(32, 1)
    for _ in range(150):
        optimizer.zero_grad()
        loss = head.loss(condition, tokens)
        loss.backward()
        optimizer.step()
    assert loss.item() == pytest.approx(np.log(2) / 2, abs=0.02)
    said, sure = head.most_likely(condition[:1])
    assert said[0, 0] == said[0, 1] != 1
    assert sure[0].tolist() == pytest.approx([0.5, 1.0], abs=0.05)


def test_sure_tokens_begin_the_chunk_and_unsure_ones_do_not() -> None:
    policy = tiny_policy(demonstrations())
    fitted = Tokens.fit(policy, source(), source(), options())
    obs = {"state": np.random.default_rng(0).normal(100, 5, (3, 2, 5)).astype(np.float32)}
    noise = np.random.default_rng(1).normal(size=(3, 8, 2)).astype(np.float32)

    def chunks(**changes) -> dict[str, np.ndarray]:
        policy.extensions = [Tokens(policy, Fitted({**fitted.options, **changes}, fitted.arrays))]
        return policy.predict(obs, noise=noise, generator=torch.Generator().manual_seed(0))

    never = chunks(confidence=1.0)
    policy.extensions = ()
    plain = policy.predict(obs, noise=noise, generator=torch.Generator().manual_seed(0))
    np.testing.assert_array_equal(never["action_pred"], plain["action_pred"])
    assert ((never["tokens.confidence"] > 0) & (never["tokens.confidence"] < 1)).all()
    always = chunks(confidence=0.0, until=1.0)
    head = Tokens(policy, fitted)
    said, _ = head.head.most_likely(policy.encode({"state": torch.from_numpy(obs["state"])}))
    expected = policy.unnormalize_action(policy.sampler._clip(head.tokens.decode(said), "x0"), {})
    np.testing.assert_allclose(always["action_pred"], expected.numpy(), rtol=1e-4, atol=1e-3)


def test_it_lies_in_a_bundle_and_acts_from_there(tmp_path) -> None:
    policy = tiny_policy(demonstrations())
    bundles.save(tmp_path / "bundle", policy, {"policy": TINY})
    write(tmp_path / "bundle", "tokens", Tokens.fit(policy, source(), source(), options()))
    loaded = bundles.load(tmp_path / "bundle", extensions=["tokens"])
    assert "tokens.confidence" in loaded.predict({"state": np.full((2, 5), 100, np.float32)})


def test_what_cannot_be_is_named() -> None:
    policy = tiny_policy(demonstrations())
    with pytest.raises(InputError, match="frequencies=9 must be at most 8"):
        Tokens.fit(policy, source(), source(), options(frequencies=9))
    fitted = Tokens.fit(policy, source(), source(), options(steps=1))
    for changes in ({"hidden": 32}, {"hidden": 4096}, {"levels": "many"}, {"until": None}, {"size": -1.0}):
        with pytest.raises(InputError, match="does not belong to this policy"):
            Tokens(policy, Fitted({**fitted.options, **changes}, fitted.arrays))
