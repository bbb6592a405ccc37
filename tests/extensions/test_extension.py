"""Extensions in general: how they lie in a bundle, and what they may do to a chunk."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from tiny import TINY, demonstrations, tiny_policy

from action_diffusion.errors import InputError
from action_diffusion.policy import bundle as bundles
from action_diffusion.policy.extensions.extension import Extension, Fitted, attach, read, write
from action_diffusion.policy.reading import extension_file
from action_diffusion.registry import EXTENSIONS


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    policy = tiny_policy(demonstrations())
    path = tmp_path_factory.mktemp("extensions") / "bundle"
    bundles.save(path, policy, {"policy": TINY | {"encoder": {"name": "observation"}}})
    return path


class Still(Extension):
    """Every action becomes the demonstrated middle (0, normalised), and each row is numbered."""

    def finish(self, seen, normalized):
        return torch.zeros_like(normalized), {"still.row": torch.arange(len(normalized))}


@pytest.fixture(autouse=True)
def _still(monkeypatch):
    monkeypatch.setitem(EXTENSIONS._given, "still", (Still, ("a test", "")))


def observations(rows: int) -> dict[str, np.ndarray]:
    return {"state": np.random.default_rng(0).normal(100, 5, (rows, 2, 5)).astype(np.float32)}


def test_what_is_written_is_read(bundle):
    write(bundle, "still", Fitted({"alpha": 0.1, "names": ["a"]}, {"x": np.arange(3, dtype=np.float32)}))
    found = read(bundle, "still")
    assert found.options == {"alpha": 0.1, "names": ["a"]}
    np.testing.assert_array_equal(found.arrays["x"], np.arange(3, dtype=np.float32))


def test_an_extension_acts_in_every_chunk_and_says_what_it_saw(bundle):
    write(bundle, "still", Fitted({}))
    policy = bundles.load(bundle, extensions=["still"])
    found = policy.predict(observations(3), noise_generator=torch.Generator().manual_seed(0))
    middle = policy.unnormalize_action(torch.zeros(1, 8, 2), {"state": torch.zeros(1, 2, 5)}).numpy()
    np.testing.assert_allclose(found["action_pred"], np.broadcast_to(middle, (3, 8, 2)), rtol=1e-6)
    np.testing.assert_array_equal(found["still.row"], [0, 1, 2])


def test_without_extensions_nothing_changes(bundle):
    noise = np.random.default_rng(1).normal(size=(2, 8, 2)).astype(np.float32)
    plain = bundles.load(bundle).predict(observations(2), noise=noise, generator=torch.Generator().manual_seed(0))
    policy = tiny_policy(demonstrations()).eval()
    expected = policy.predict(observations(2), noise=noise, generator=torch.Generator().manual_seed(0))
    assert plain.keys() == {"action", "action_pred"}
    np.testing.assert_array_equal(plain["action_pred"], expected["action_pred"])


def test_what_cannot_be_is_named(bundle, tmp_path):
    write(bundle, "still", Fitted({}))
    policy = bundles.load(bundle)
    with pytest.raises(InputError, match="still"):
        attach(policy, bundle, ["stil"])
    with pytest.raises(InputError, match="one twice"):
        attach(policy, bundle, ["still", "still"])
    extension_file(bundle, "still").unlink()
    with pytest.raises(InputError, match=r"not fitted.*action-diffusion fit still"):
        attach(policy, bundle, ["still"])


@pytest.mark.parametrize(
    "damage", ["bytes", "no header", "options no mapping", "NaN", "NaN among options", "other weights"]
)
def test_a_file_that_is_damaged_or_not_for_these_weights_is_refused(bundle, damage):
    path = extension_file(bundle, "still")
    write(bundle, "still", Fitted({}, {"x": np.zeros(2, np.float32)}))
    header = {"options": "{}", "weights": read(bundle, "still").weights}
    value = np.zeros(2, np.float32)
    if damage == "bytes":
        path.write_bytes(b"\x00" * 100)
    elif damage == "no header":
        save_file({"x": value}, path)
    elif damage == "options no mapping":
        save_file({"x": value}, path, metadata=header | {"options": json.dumps([1])})
    elif damage == "NaN among options":
        save_file({"x": value}, path, metadata=header | {"options": '{"until": NaN}'})
    elif damage == "NaN":
        save_file({"x": value * np.nan}, path, metadata=header)
    else:
        save_file({"x": value}, path, metadata=header | {"weights": "0" * 64})
    with pytest.raises(InputError, match=str(Path(path).name)):
        read(bundle, "still")
