"""Bundles: what is saved is what runs, and a file that is wrong is refused with both sides named."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.numpy import load_file, save_file

from action_diffusion import policy as policy_package
from action_diffusion.errors import InputError
from action_diffusion.policy import bundle as bundles

STATE = np.arange(10, dtype=np.float32).reshape(2, 5) + 100


@pytest.fixture
def path(tmp_path, policy, tiny_config) -> Path:
    bundles.save(tmp_path / "bundle", policy, {"policy": tiny_config}, golden_obs={"state": STATE})
    return tmp_path / "bundle"


def edit_spec(path: Path, change) -> None:
    data = json.loads((path / "spec.json").read_text())
    change(data)
    (path / "spec.json").write_text(json.dumps(data))


def edit_config(path: Path, change) -> None:
    data = yaml.safe_load((path / "config.yaml").read_text())
    change(data)
    (path / "config.yaml").write_text(yaml.safe_dump(data))


def test_a_loaded_policy_gives_the_same_actions(path, policy):
    loaded = policy_package.load(path, verify=True)
    noise = np.random.default_rng(0).normal(size=(1, 8, 2)).astype(np.float32)
    a, b = (p.predict({"state": STATE}, noise=noise)["action"] for p in (policy, loaded))
    np.testing.assert_array_equal(a, b)
    assert sorted(os.listdir(path)) == ["config.yaml", "golden.safetensors", "model.safetensors", "spec.json"]


def test_the_spec_says_what_a_caller_must_know(path):
    spec = json.loads((path / "spec.json").read_text())
    assert spec["observations"]["state"]["shape"] == [5]
    assert spec["observations"]["state"]["dtype"] == "float32"
    assert spec["action"]["shape"] == [2]
    assert spec["control_rate"] == 10.0
    assert set(spec["normalizer"]) == {"state", "action"}
    assert "torch" in spec["versions"]


def test_other_weights_can_be_written_than_the_policy_s_own(tmp_path, policy, tiny_config):
    weights = {name: torch.zeros_like(value) for name, value in policy.state_dict().items()}
    bundles.save(tmp_path / "b", policy, {"policy": tiny_config}, weights=weights, golden_obs={"state": STATE})
    assert all((v == 0).all() for v in bundles.load(tmp_path / "b", verify=True).state_dict().values())
    assert any((v != 0).any() for v in policy.state_dict().values())


def test_saving_again_replaces_the_folder(path, policy, tiny_config):
    bundles.save(path, policy, {"policy": tiny_config})
    assert not (path / "golden.safetensors").exists()
    assert os.listdir(path.parent) == ["bundle"]


def test_a_full_disk_keeps_the_earlier_bundle(path, policy, tiny_config, monkeypatch):
    before = (path / "model.safetensors").read_bytes()

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(bundles, "save_file", full)
    with pytest.raises(InputError, match=r"No space left on device.*what was there before is kept"):
        bundles.save(path, policy, {"policy": tiny_config})
    assert (path / "model.safetensors").read_bytes() == before
    assert os.listdir(path.parent) == ["bundle"]


def test_nothing_in_a_bundle_is_executed(path, tmp_path):
    marker = tmp_path / "executed"
    edit_config(path, lambda c: c["policy"].update(denoiser={"_target_": "os.system", "command": f"touch {marker}"}))
    with pytest.raises(InputError, match=r"_target_ \(os.system\) is not allowed"):
        bundles.load(path)
    (path / "config.yaml").write_text(f"policy: !!python/object/apply:os.system ['touch {marker}']\n")
    with pytest.raises(InputError, match="not valid YAML"):
        bundles.load(path)
    assert not marker.exists()


@pytest.mark.parametrize("name", ["model.safetensors", "config.yaml", "spec.json"])
def test_a_missing_file_is_named(path, name):
    (path / name).unlink()
    with pytest.raises(InputError, match=f"lacks {name}"):
        bundles.load(path)


def test_a_folder_without_a_bundle_points_to_the_one_inside(path):
    with pytest.raises(InputError, match=r"did you mean .*bundle"):
        bundles.load(path.parent)
    with pytest.raises(InputError, match="no bundle at"):
        bundles.load(path.parent / "nothing")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.update(format=99), "format 99, this version reads format 1"),
        (lambda s: s.pop("horizon"), "not a complete policy specification.*horizon"),
        (lambda s: s["normalizer"].pop("state"), "no normaliser statistics for 'state'"),
        (lambda s: s["normalizer"].pop("action"), "no normaliser statistics for 'action'"),
        (lambda s: s.update(camera_order=["wrist"]), r"camera_order is \['wrist'\].*as \[\]"),
        (lambda s: s["action"].update(shape=[3]), r"has shape \[.*\], the configured policy has"),
        (lambda s: s["observations"]["state"].update(shape=[7]), "has shape.*the configured policy has"),
        (
            lambda s: s["observations"].update(extra={"shape": [1], "colour": 1}),
            "unknown option 'colour' in observations.extra",
        ),
    ],
)
def test_a_spec_that_does_not_fit_is_refused(path, change, message):
    edit_spec(path, change)
    with pytest.raises(InputError, match=message):
        bundles.load(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.pop("policy"), "no 'policy' section"),
        (lambda c: c["policy"].pop("denoiser"), "no 'denoiser' section"),
        (lambda c: c["policy"]["denoiser"].update(name="unet2d"), "did you mean unet1d"),
        (lambda c: c["policy"]["denoiser"].update(chanels=[8]), "did you mean channels"),
        (lambda c: c["policy"]["denoiser"].update(channels=[8, 24]), "has shape"),
        (lambda c: c["policy"].update(extra={}), "unknown section.*extra"),
    ],
)
def test_a_configuration_that_does_not_fit_is_refused(path, change, message):
    edit_config(path, change)
    with pytest.raises(InputError, match=message):
        bundles.load(path)


def test_damaged_files_are_named(path):
    (path / "model.safetensors").write_bytes((path / "model.safetensors").read_bytes()[:100])
    with pytest.raises(InputError, match=r"model.safetensors: not a readable safetensors file"):
        bundles.load(path)


def test_json_that_is_not_json_is_named(path):
    (path / "spec.json").write_text("{")
    with pytest.raises(InputError, match=r"spec.json: not valid JSON"):
        bundles.load(path)


def test_verification_notices_changed_weights(path):
    weights = load_file(path / "model.safetensors")
    weights["denoiser.out.1.bias"] += 0.5
    save_file(weights, path / "model.safetensors")
    bundles.load(path)
    with pytest.raises(InputError, match="golden input gives a chunk that differs"):
        bundles.load(path, verify=True)


def test_sampling_can_be_changed_within_the_family(path):
    policy = bundles.load(path, sampler={"scheduler": "dpm_solver++", "num_inference_steps": 4, "eta": None})
    assert len(policy.sampler.steps) == 4
    with pytest.raises(InputError, match="flow family, but the policy was trained as diffusion"):
        bundles.load(path, sampler={"scheduler": "flow"})


def test_a_device_that_is_not_there_is_refused(path):
    with pytest.raises(InputError, match=r"device=cuda:7 is not there.*choose from cpu"):
        bundles.load(path, "cuda:7")
    with pytest.raises(InputError, match="device=gpu is not there"):
        bundles.load(path, "gpu")
