"""lerobot's policies in and out: the same chunks from the same observations and noise, and one line for what is not."""

from __future__ import annotations

import json
from pathlib import Path

import lerobot_policy as lerobot
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from action_diffusion import cli
from action_diffusion.datasets.storage.replay_buffer import ReplayBuffer
from action_diffusion.policy import bundle as bundles
from action_diffusion.policy.build import build_policy
from action_diffusion.policy.interchange.contract import made_up
from action_diffusion.policy.interchange.lerobot.export import crop_ratio
from action_diffusion.policy.model import normalizer
from action_diffusion.policy.policy import DiffusionPolicy
from action_diffusion.policy.spec import ActionSpec, ObservationSpec, PolicySpec
from benchmarks.peer import interchange
from benchmarks.peer.peer_environment import is_there

FEATURES = lerobot.features
CASES = {
    "states": {**FEATURES(state=3, environment=4)},
    "ddpm": {**FEATURES(environment=4), "noise_scheduler_type": "DDPM", "num_inference_steps": None},
    "fewer_ddpm": {**FEATURES(environment=4), "noise_scheduler_type": "DDPM", "num_inference_steps": 25},
    "sample": {**FEATURES(environment=4), "prediction_type": "sample", "clip_sample_range": 1.5},
    "unclipped": {**FEATURES(environment=4), "clip_sample": False},
    "shifted": {**FEATURES(environment=4), "use_film_scale_modulation": False, "down_dims": [32, 48, 64]},
    "gaussian": {
        **FEATURES(environment=4),
        "normalization_mapping": {"STATE": "MEAN_STD", "ENV": "IDENTITY", "ACTION": "MEAN_STD"},
    },
    "quantiles": {
        **FEATURES(environment=4),
        "normalization_mapping": {"STATE": "QUANTILES", "ENV": "MIN_MAX", "ACTION": "QUANTILES"},
    },
    "image": {**FEATURES(cameras=1), "crop_shape": [35, 39]},
    "batch_norm": {**FEATURES(cameras=1), "use_group_norm": False, "resize_shape": [33, 36], "crop_ratio": 0.95},
    "resized": {**FEATURES(cameras=1), "resize_shape": [64, 64]},
    "shared": {**FEATURES(cameras=2), "normalization_mapping": {"VISUAL": "MIN_MAX", "STATE": "MIN_MAX"}},
    "separate": {
        **FEATURES(cameras=2, environment=3),
        "use_separate_rgb_encoder_per_camera": True,
        "normalization_mapping": {"VISUAL": "IDENTITY", "ACTION": "MIN_MAX"},
    },
}
SLOW = ("image", "batch_norm", "resized", "shared", "separate")
PARAMETERS = [pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in CASES]


def written(folder: Path, *, before_04: bool = False, **changes) -> tuple[lerobot.LeRobotPolicy, dict]:
    config = {**lerobot.CONFIG, **changes}
    policy, stats = lerobot.made(config), lerobot.statistics(config)
    lerobot.write(folder, policy, stats, before_04=before_04)
    return policy, stats


def bundled(folder: Path, out: Path) -> DiffusionPolicy:
    assert cli.main(["bundle", "import", f"in={folder}", f"out={out}", "rate=12.5"]) == 0
    return bundles.load(out, verify=True)


def inputs(policy: DiffusionPolicy, bundle: Path) -> tuple[dict, dict, np.ndarray]:
    """Observations by our names and by lerobot's, and noise."""
    seen = made_up(policy.spec)
    names = bundles.read_config(bundle)["imported"]["names"]
    shape = (1, policy.spec.horizon, *policy.spec.action.shape)
    noise = np.random.default_rng(3).standard_normal(shape, np.float32)
    return seen, {names[key]: torch.from_numpy(value) for key, value in seen.items()}, noise


def ours(policy: DiffusionPolicy, seen: dict, noise: np.ndarray) -> np.ndarray:
    return policy.predict(seen, noise=noise, generator=torch.Generator().manual_seed(0))["action"]


@pytest.mark.parametrize("before_04", [False, True])
@pytest.mark.parametrize("case", PARAMETERS)
def test_chunks_are_lerobots_after_import_and_after_export(case, before_04, tmp_path: Path) -> None:
    theirs, stats = written(tmp_path / "theirs", before_04=before_04, **CASES[case])
    policy = bundled(tmp_path / "theirs", tmp_path / "bundle")
    assert policy.spec.control_rate == 12.5
    seen, named, noise = inputs(policy, tmp_path / "bundle")
    config = theirs.diffusion.config
    known = {**config["input_features"], **config["output_features"]}
    norm = lerobot.normalisation(config["normalization_mapping"], known, stats)
    expected = theirs.chunk(named, torch.from_numpy(noise), norm).numpy()
    np.testing.assert_allclose(ours(policy, seen, noise), expected, atol=1e-5)

    assert (
        cli.main(["bundle", "export", f"in={tmp_path / 'bundle'}", f"out={tmp_path / 'back'}", "format=lerobot"]) == 0
    )
    back, norm = lerobot.load(tmp_path / "back")
    np.testing.assert_allclose(back.chunk(named, torch.from_numpy(noise), norm).numpy(), expected, atol=1e-5)


def test_a_dimension_that_never_changed_keeps_its_value(tmp_path: Path) -> None:
    config = {**lerobot.CONFIG, **FEATURES(environment=4)}
    stats = lerobot.statistics(config)
    for key in (lerobot.STATE, lerobot.ACTION):
        stats[key]["max"][1] = stats[key]["min"][1]
    lerobot.write(tmp_path / "theirs", lerobot.made(config), stats)
    policy = bundled(tmp_path / "theirs", tmp_path / "bundle")
    seen, _, noise = inputs(policy, tmp_path / "bundle")
    value = stats[lerobot.ACTION]["min"][1].item()
    assert seen["state"][0, 1] == pytest.approx(stats[lerobot.STATE]["min"][1].item())
    np.testing.assert_allclose(ours(policy, seen, noise)[:, 1], value, atol=1e-6)
    assert (
        cli.main(["bundle", "export", f"in={tmp_path / 'bundle'}", f"out={tmp_path / 'back'}", "format=lerobot"]) == 0
    )
    step = load_file(tmp_path / "back" / "policy_postprocessor_step_0_unnormalizer_processor.safetensors")
    assert step["action.min"][1] == step["action.max"][1] == pytest.approx(value)


def test_policies_of_ours_that_lerobot_can_express_go_out(make_policy, tiny_config, tmp_path: Path, capsys) -> None:
    """`state` alone is refused, since lerobot wants a picture or the environment's state; so is each part in turn."""
    changes = {
        "features": {},
        "denoiser": {"name": "unet1d", "channels": [8, 16], "time_dim": 16, "activation": "mish"},
    }
    bundles.save(tmp_path / "a", make_policy(**changes), {"policy": tiny_config | changes})
    sampler = ["sampler.timestep_spacing=leading", "sampler.use_clipped_model_output=false"]
    words = ["bundle", "export", f"in={tmp_path / 'a'}", f"out={tmp_path / 'out'}", "format=lerobot"]
    for given, message in (
        ([], "sampler.timestep_spacing=trailing: lerobot's steps are others"),
        (sampler[:1], "sampler.use_clipped_model_output=true: lerobot keeps the noise"),
        (sampler, "the policy sees state alone: lerobot's needs a picture"),
    ):
        assert cli.main([*words, *given]) == 2
        error = capsys.readouterr().err
        assert message in error
        assert len(error.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def own(*, camera: bool, kind: str, constant: bool) -> tuple[DiffusionPolicy, dict]:
    """A policy of ours with random weights that lerobot can express, and its configuration."""
    torch.manual_seed(5)
    sizes = {"agent_pos": 2, "keypoint": 5, "action": 3}
    random = np.random.default_rng(0)
    values = {key: random.normal(3.0, 2.0, (50, n)) for key, n in sizes.items()}
    if constant:
        values["action"][:, 1] = 0.25
    observations = {"agent_pos": ObservationSpec(shape=(2,)), "keypoint": ObservationSpec(shape=(5,))}
    if camera:
        observations["front"] = ObservationSpec(shape=(40, 40, 3), dtype="uint8", kind="image")
    spec = PolicySpec(
        observations=observations,
        action=ActionSpec(shape=(3,)),
        n_obs_steps=2,
        horizon=16,
        n_action_steps=8,
        control_rate=10.0,
        normalizer={key: normalizer.fit(value, kind) for key, value in values.items()},
    )
    config = {
        "normalizer": {"default": kind},
        "encoder": {"name": "observation", "keypoints": 3, "feature_dim": 6} if camera else {"name": "observation"},
        "denoiser": {"name": "unet1d", "channels": [32, 64], "activation": "mish", "time_dim": 16},
        "process": {"name": "diffusion", "prediction": "sample", "num_train_timesteps": 20},
        "sampler": {"scheduler": "ddpm", "num_inference_steps": 20, "clip": "x0", "clip_to": "unit", "clip_range": 2.0},
        "objective": {"loss": "mse"},
    }
    return build_policy(config, spec).eval(), config


@pytest.mark.parametrize("constant", [False, True])
@pytest.mark.parametrize("kind", ["minmax", "gaussian", "identity"])
@pytest.mark.parametrize("camera", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_chunks_of_our_own_policies_are_the_same_there(camera, kind, constant, tmp_path: Path) -> None:
    policy, config = own(camera=camera, kind=kind, constant=constant)
    bundles.save(tmp_path / "a", policy, {"policy": config})
    assert cli.main(["bundle", "export", f"in={tmp_path / 'a'}", f"out={tmp_path / 'out'}", "format=lerobot"]) == 0
    theirs, norm = lerobot.load(tmp_path / "out")
    seen = made_up(policy.spec)
    states = [torch.from_numpy(seen[key]) for key in ("agent_pos", "keypoint")]
    named = {"observation.state": torch.cat(states, dim=1)}
    if not camera:
        named = {"observation.state": states[0], "observation.environment_state": states[1]}
    if camera:
        named["observation.images.front"] = torch.from_numpy(seen["front"])
    noise = np.random.default_rng(3).standard_normal((1, 16, 3), np.float32)
    chunk = theirs.chunk(named, torch.from_numpy(noise), norm).numpy()
    np.testing.assert_allclose(chunk, ours(policy, seen, noise), atol=1e-4)  # of a range of 10


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {},
            "policy.features has no counterpart in lerobot's diffusion policy, which has no features of states: docs/",
        ),
        ({"features": {}}, "policy.denoiser.activation=silu: lerobot's U-Net has mish"),
        (
            {"features": {}, "process": {"name": "flow"}, "sampler": {"scheduler": "flow", "num_inference_steps": 2}},
            "policy.process has no counterpart",
        ),
        ({"features": {}, "denoiser": {"name": "dit", "width": 16, "layers": 1}}, "policy.denoiser has no counterpart"),
        ({"features": {}, "process": {"name": "diffusion", "prediction": "v_prediction"}}, "policy.process.prediction"),
    ],
)
def test_what_lerobot_lacks_is_named(changes, message, make_policy, tiny_config, tmp_path: Path, capsys) -> None:
    bundles.save(tmp_path / "a", make_policy(**changes), {"policy": tiny_config | changes})
    assert cli.main(["bundle", "export", f"in={tmp_path / 'a'}", f"out={tmp_path / 'out'}", "format=lerobot"]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def changed(folder: Path, name: str, **changes) -> None:
    data = json.loads((folder / name).read_text())
    for key, value in changes.items():
        if value is ...:
            del data[key]
        else:
            data[key] = value
    (folder / name).write_text(json.dumps(data))


def step(folder: Path, **changes) -> None:
    """Change the normalising step of the preprocessor."""
    data = json.loads((folder / "policy_preprocessor.json").read_text())
    data["steps"][-1].update(changes)
    (folder / "policy_preprocessor.json").write_text(json.dumps(data))


def weight(folder: Path, name: str, value: torch.Tensor) -> None:
    weights = load_file(folder / "model.safetensors")
    save_file({**weights, name: value}, folder / "model.safetensors")


SEEN = {lerobot.STATE: {"type": "STATE", "shape": [2]}}
CHANNELS_LAST = {"type": "VISUAL", "shape": [40, 48, 3]}
STATISTICS = "policy_preprocessor.safetensors"
FAULTS = {
    "another type": (lambda f: changed(f, "config.json", type="act"), "is of type act"),
    "before 0.2": (lambda f: changed(f, "config.json", input_shapes={}), "lerobot before 0.2"),
    "an unknown option": (lambda f: changed(f, "config.json", use_mamba=True), "unknown option 'use_mamba'"),
    "a missing option": (lambda f: changed(f, "config.json", use_group_norm=...), "lacks 'use_group_norm'"),
    "a word for a number": (lambda f: changed(f, "config.json", horizon="16"), "horizon=16: expected a whole number"),
    "a backbone": (lambda f: changed(f, "config.json", vision_backbone="vit"), None),
    "groups": (lambda f: changed(f, "config.json", n_groups=4), "n_groups=4"),
    "channels last": (
        lambda f: changed(f, "config.json", input_features=SEEN | {"observation.image": CHANNELS_LAST}),
        "has shape [40, 48, 3]: [3, height, width] is expected",
    ),
    "no state": (
        lambda f: changed(f, "config.json", input_features={lerobot.ENVIRONMENT: {"type": "ENV", "shape": [4]}}),
        "no 'observation.state' among input_features",
    ),
    "another width": (lambda f: changed(f, "config.json", down_dims=[32, 48]), "has shape"),
    "fewer observations": (lambda f: changed(f, "config.json", n_obs_steps=1), "numbers of the observations"),
    "no JSON": (lambda f: (f / "policy_preprocessor.json").write_text("{"), "not valid JSON"),
    "half of the processors": (lambda f: (f / "policy_postprocessor.json").unlink(), "without its counterpart"),
    "no statistics": (
        lambda f: [(f / f"policy_{side}processor.json").unlink() for side in ("pre", "post")],
        "no statistics of",
    ),
    "a step of its own": (lambda f: step(f, registry_name="tokenizer_processor"), "a step tokenizer_processor"),
    "a file elsewhere": (lambda f: step(f, state_file="../secret.safetensors"), "state_file=../secret.safetensors"),
    "an absolute file": (lambda f: step(f, state_file="/etc/passwd"), "state_file=/etc/passwd"),
    "another mode": (lambda f: step(f, config={"norm_map": {"STATE": "LOG"}, "features": {lerobot.STATE: {}}}), "LOG"),
    "a cut file": (
        lambda f: (f / STATISTICS).write_bytes((f / STATISTICS).read_bytes()[:50]),
        "not a readable safetensors",
    ),
    "statistics of another size": (
        lambda f: save_file(
            {"observation.state.min": torch.zeros(3), "observation.state.max": torch.ones(3)}, f / STATISTICS
        ),
        "expected 2 finite numbers",
    ),
    "an infinite statistic": (
        lambda f: save_file(
            {"observation.state.min": torch.zeros(2), "observation.state.max": torch.full((2,), torch.inf)},
            f / STATISTICS,
        ),
        "expected 2 finite numbers",
    ),
    "a missing statistic": (
        lambda f: save_file({"observation.state.mean": torch.zeros(2)}, f / STATISTICS),
        "needs the statistic 'min'",
    ),
    "cut weights": (lambda f: (f / "model.safetensors").write_bytes(b"{}"), "not a readable safetensors"),
    "weights of something else": (
        lambda f: save_file({"model.decoder": torch.zeros(2)}, f / "model.safetensors"),
        "model.decoder is no weight",
    ),
    "weights that are no numbers": (
        lambda f: weight(f, "diffusion.unet.final_conv.1.bias", torch.tensor([torch.nan, 0])),
        "NaN or infinite",
    ),
    "an adapter": (lambda f: changed(f, "config.json", use_peft=True), "use_peft=true"),
    "too few steps": (lambda f: changed(f, "config.json", num_inference_steps=2), "of its input is noise"),
    "no weights": (lambda f: save_file({}, f / "model.safetensors"), "cond_encoder"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_bad_folders_get_one_line(fault, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spoil, message = FAULTS[fault]
    written(tmp_path / "theirs", **FEATURES(environment=4))
    spoil(tmp_path / "theirs")
    code = cli.main(["bundle", "import", f"in={tmp_path / 'theirs'}", f"out={tmp_path / 'out'}", "rate=10"])
    error = capsys.readouterr().err
    assert code == (0 if message is None else 2)  # without a camera, nobody asks for the backbone
    if message is not None:
        assert message in error
        assert len(error.splitlines()) == 1
        assert not (tmp_path / "out").exists()


def test_steps_that_cannot_be_are_replaced_on_the_way(tmp_path: Path) -> None:
    written(tmp_path / "theirs", **FEATURES(environment=4), num_inference_steps=2)
    words = ["rate=10", "sampler.timestep_spacing=trailing", "sampler.num_inference_steps=5"]
    assert cli.main(["bundle", "import", f"in={tmp_path / 'theirs'}", f"out={tmp_path / 'out'}", *words]) == 0
    assert [step.time for step in bundles.load(tmp_path / "out", verify=True).sampler.steps] == [49, 39, 29, 19, 9]


def test_the_rate_is_asked_for_or_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    written(tmp_path / "a" / "pretrained_model", **FEATURES(environment=4))
    words = ["bundle", "import", f"in={tmp_path / 'a'}"]
    assert cli.main([*words, f"out={tmp_path / 'out'}"]) == 2
    assert "does not say at what rate its actions are meant to be executed: rate=HZ" in capsys.readouterr().err
    assert cli.main(["bundle", "inspect", str(tmp_path / "a")]) == 0
    assert "control_rate: not said" in capsys.readouterr().out
    (tmp_path / "a" / "pretrained_model" / "train_config.json").write_text('{"env": {"type": "pusht", "fps": 10}}')
    assert cli.main([*words, f"out={tmp_path / 'out'}"]) == 0
    assert "control_rate: 10 Hz" in capsys.readouterr().out


def test_renamed_observations_keep_the_names_of_the_data(tmp_path: Path) -> None:
    written(tmp_path / "theirs", **FEATURES(environment=4))
    data = json.loads((tmp_path / "theirs" / "policy_preprocessor.json").read_text())
    data["steps"][0]["config"] = {"rename_map": {"observation.joints": "observation.state"}}
    (tmp_path / "theirs" / "policy_preprocessor.json").write_text(json.dumps(data))
    policy = bundled(tmp_path / "theirs", tmp_path / "bundle")
    assert list(policy.spec.observations) == ["joints", "environment_state"]


@pytest.mark.parametrize(
    ("size", "crop", "expected"),
    [((224, 224), (201, 201), True), ((240, 320), (216, 288), True), ((100, 100), (90, 50), False)],
)
def test_a_crop_is_a_share_of_both_sides(size, crop, expected) -> None:
    ratio = crop_ratio(size, crop)
    assert (ratio is not None) == expected
    if ratio is not None:
        assert [int(side * ratio) for side in size] == list(crop)


@pytest.mark.slow
@pytest.mark.parametrize("version", ["0.4.4", "0.6.1"])
def test_lerobot_itself_says_the_same(version: str, tmp_path: Path) -> None:
    if not is_there(f"lerobot=={version}"):
        pytest.skip(f"lerobot {version} is not installed: python -m benchmarks.peer.interchange --only {version}")
    cases = [case for case in interchange.CASES if case.startswith(("states", "two cameras, an encoder each"))]
    rows = interchange.measure(version, tmp_path, cases=cases)
    assert len(rows) == 2 * len(cases)
    assert [row for row in rows if not row["ok"]] == []


def test_what_came_in_is_evaluated_and_fitted_on_data_that_is_named(tmp_path: Path, capsys) -> None:
    written(tmp_path / "theirs", **FEATURES(environment=4))
    bundled(tmp_path / "theirs", tmp_path / "bundle")
    random = np.random.default_rng(0)
    columns = {key: random.random((240, n)).astype(np.float32) for key, n in SIZES.items()}
    ReplayBuffer.from_arrays(columns, np.arange(40, 241, 40)).save(tmp_path / "demos.zarr")
    words = [f"bundle={tmp_path / 'bundle'}", "device=cpu"]
    capsys.readouterr()
    assert cli.main(["evaluate", *words, f"output_dir={tmp_path / 'out'}"]) == 2
    assert "does not say which data it was trained on: data=PATH" in capsys.readouterr().err
    words.append(f"data={tmp_path / 'demos.zarr'}")
    assert cli.main(["evaluate", *words, f"output_dir={tmp_path / 'out'}"]) == 0
    assert json.loads((tmp_path / "out" / "results.json").read_text())["n_episodes"] == 6
    assert cli.main(["fit", "guard", *words]) == 0


@pytest.mark.slow
def test_what_came_in_acts_in_a_simulator_by_its_names(tmp_path: Path, capsys) -> None:
    written(tmp_path / "theirs", **FEATURES(cameras=1, size=(96, 96)), num_inference_steps=5)
    words = ["bundle", "import", f"in={tmp_path / 'theirs'}", "rate=10", "env={name: pusht, max_steps: 20}"]
    for keys, message in (
        ("{states: agent_pos}", "unknown observation in keys 'states': did you mean state?"),
        ("{state: image}", "two observations would have one name"),
    ):
        assert cli.main([*words, f"out={tmp_path / 'a'}", f"keys={keys}"]) == 2
        assert message in capsys.readouterr().err
    assert cli.main([*words, f"out={tmp_path / 'a'}", "keys={state: agent_pos}"]) == 0
    assert "state is called agent_pos" in capsys.readouterr().out
    assert bundles.read_config(tmp_path / "a")["imported"]["names"]["agent_pos"] == "observation.state"
    few = ["n_episodes=2", "n_videos=0", "device=cpu", f"output_dir={tmp_path / 'out'}"]
    assert cli.main(["evaluate", f"bundle={tmp_path / 'a'}", *few]) == 0
    assert json.loads((tmp_path / "out" / "results.json").read_text())["n_episodes"] == 2


SIZES = {"state": 2, "environment_state": 4, "action": 2}
