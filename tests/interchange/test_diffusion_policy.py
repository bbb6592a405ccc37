"""Checkpoints of diffusion_policy: the same observations and noise give the same chunk, and what differs is named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusion_policy_files as files
import numpy as np
import pytest
import torch

from action_diffusion import cli
from action_diffusion.errors import InputError
from action_diffusion.policy import bundle as bundles
from action_diffusion.policy.interchange.contract import policy_of, saved
from action_diffusion.policy.interchange.diffusion_policy.form import holds, read
from action_diffusion.policy.interchange.diffusion_policy.simulators import simulator_of
from action_diffusion.policy.spec import ObservationSpec

CASES = {
    "unet_lowdim": files.unet_lowdim,
    "unet_that_only_shifts": lambda: files.unet_lowdim(scales=False),
    "unet_by_ddim": lambda: files.unet_lowdim(scheduler=files.DDIM, steps=8),
    "transformer": files.transformer_lowdim,
    "transformer_that_sees_all": lambda: files.transformer_lowdim(causal=False),
    "unet_hybrid": files.unet_hybrid,
    "unet_hybrid_of_batch_norm": lambda: files.unet_hybrid(grouped=False),
    "transformer_hybrid": files.transformer_hybrid,
    "unet_image": files.unet_image,
}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "latest.ckpt"


@pytest.mark.parametrize("name", CASES)
def test_an_imported_policy_predicts_what_theirs_does(name: str, path: Path) -> None:
    checkpoint = CASES[name]()
    policy = policy_of(read(checkpoint.save(path)))
    observations = checkpoint.observations()
    generator = torch.Generator().manual_seed(3)
    found = policy.predict(observations, noise_generator=generator, generator=generator)
    expected = checkpoint.predict(observations, seed=3)
    assert np.ptp(expected) > 1  # of chunks that say something
    np.testing.assert_allclose(found["action_pred"], expected, atol=1e-4)
    np.testing.assert_array_equal(found["action"], found["action_pred"][:, 1:5])


def test_the_bundle_is_one_like_ours(path: Path, tmp_path: Path) -> None:
    saved(read(files.unet_lowdim().save(path)), tmp_path / "bundle")
    policy = bundles.load(tmp_path / "bundle", verify=True)
    assert (policy.spec.control_rate, policy.spec.task) == (10.0, "pusht_lowdim")
    assert policy.spec.demonstrations == "data/demos.zarr"


def test_an_action_that_never_changed_is_what_the_network_says(path: Path) -> None:
    checkpoint = files.unet_lowdim()
    chunk = policy_of(read(checkpoint.save(path))).predict(checkpoint.observations())["action_pred"]
    assert np.ptp(chunk[..., 2]) > 0.1


@pytest.mark.parametrize(("states", "word"), [(["model", "ema_model"], "ema_model"), (["model"], "no EMA")])
def test_the_averaged_weights_are_taken_where_there_are_some(states: list[str], word: str, path: Path) -> None:
    checkpoint = files.unet_lowdim()
    given = {
        name: {key: value * (1 if name == states[-1] else 2) for key, value in checkpoint.state.items()}
        for name in states
    }
    foreign = read(checkpoint.save(path, **given))
    assert word in foreign.said[0]
    torch.testing.assert_close(foreign.weights["denoiser.out.1.bias"], checkpoint.state["model.final_conv.1.bias"])


def test_a_configuration_that_was_not_resolved_is_read(path: Path) -> None:
    checkpoint = files.unet_lowdim()
    checkpoint.cfg |= {"horizon": 8, "n_action_steps": 3, "n_latency_steps": 1, "task_name": "${task.name}"}
    checkpoint.cfg["policy"] |= {
        "horizon": "${horizon}",
        "n_action_steps": "${eval:'${n_action_steps}+${n_latency_steps}'}",
    }
    checkpoint.cfg["policy"]["model"]["input_dim"] = "${eval:'__import__(\"os\").abort()'}"
    assert read(checkpoint.save(path)).spec.n_action_steps == 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"_target_": "a.DiffusionUnetVideoPolicy"}, "unknown policy 'DiffusionUnetVideoPolicy'"),
        ({"_target_": None}, "cfg.policy names no class"),
        ({"obs_as_local_cond": True}, "obs_as_local_cond=true"),
        ({"obs_as_global_cond": False}, "obs_as_global_cond=false"),
        ({"pred_action_steps_only": True}, "pred_action_steps_only=true"),
        ({"oa_step_convention": False}, "oa_step_convention=false"),
        ({"horizon": "sixteen"}, "cfg.policy.horizon=sixteen: expected a whole number"),
        ({"horizon": 7}, "horizon=7 must be divisible by 2"),
        ({"n_action_steps": 8}, "n_action_steps=8 does not fit"),
        ({"guidance": 2}, "unknown option 'guidance' in cfg.policy"),
        ({"obs_dim": 6}, "is 5 numbers, expected 6"),
        (
            {"noise_scheduler": files.DDPM | {"_target_": "diffusers.PNDMScheduler"}},
            "expected one of DDPMScheduler, DDIMScheduler",
        ),
        ({"noise_scheduler": files.DDPM | {"thresholding": True}}, "unknown option 'thresholding'"),
        ({"noise_scheduler": files.DDPM | {"beta_schedule": "sigmoid"}}, "policy.process.beta_schedule=sigmoid"),
    ],
)
def test_what_has_no_counterpart_is_named(change: dict[str, Any], message: str, path: Path) -> None:
    checkpoint = files.unet_lowdim()
    checkpoint.cfg["policy"] |= change
    with pytest.raises(InputError, match=r".") as refused:
        policy_of(read(checkpoint.save(path)))
    assert message in str(refused.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n_cond_layers": 2}, "n_cond_layers=2"),
        ({"time_as_cond": False}, "time_as_cond=false"),
        ({"_target_": "mine.Transformer"}, "unknown class 'Transformer'"),
        ({"n_layer": 3}, "the weights lack 'denoiser.decoder.2."),
    ],
)
def test_another_transformer_is_refused(change: dict[str, Any], message: str, path: Path) -> None:
    checkpoint = files.transformer_lowdim()
    checkpoint.cfg["policy"]["model"] |= change
    with pytest.raises(InputError) as refused:
        policy_of(read(checkpoint.save(path)))
    assert message in str(refused.value)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("model.local_cond_encoder.0.weight", torch.zeros(3), "is no weight of ConditionalUnet1D"),
        ("model.final_conv.1.bias", None, "the weights lack 'denoiser.out.1.bias'"),
        ("model.final_conv.1.bias", torch.zeros(4), "has shape [4] there, [3] here"),
        ("model.final_conv.1.bias", torch.tensor([0.0, float("nan"), 0.0]), "holds NaN"),
        ("model.final_conv.1.bias", "a word", "is no tensor"),
        ("normalizer.params_dict.action.scale", None, "normalizer.params_dict.action.scale is missing"),
        ("normalizer.params_dict.action.scale", torch.zeros(3), "scale has a 0"),
    ],
)
def test_other_weights_are_refused(name: str, value: Any, message: str, path: Path) -> None:
    checkpoint = files.unet_lowdim()
    state = {key: inside for key, inside in checkpoint.state.items() if key != name}
    if value is not None:
        state[name] = value
    with pytest.raises(InputError) as refused:
        policy_of(read(checkpoint.save(path, ema_model=state)))
    assert message in str(refused.value)


@pytest.mark.parametrize(
    "content", [{}, [1, 2], {"cfg": {"policy": {}}, "state_dicts": {}}, {"cfg": 3, "state_dicts": {}}]
)
def test_another_file_of_torch_is_refused(content: Any, path: Path) -> None:
    torch.save(content, path)
    assert holds(path)
    with pytest.raises(InputError, match=r"cfg|checkpoint"):
        read(path)


def test_features_of_another_size_are_refused(path: Path) -> None:
    checkpoint = files.unet_hybrid()
    checkpoint.cfg["policy"]["shape_meta"]["obs"]["z_pos"]["shape"] = [3]
    files.field_of_normalizer(checkpoint.state, "z_pos", [0.0] * 3, [1.0] * 3)
    with pytest.raises(
        InputError, match=r"cond_encoder takes \[54\] numbers of time and observations, cfg makes them 56"
    ):
        read(checkpoint.save(path))


def _nested(depth: int) -> Any:
    inner: Any = 1
    for _ in range(depth):
        inner = [inner]
    return inner


def _doubled(depth: int) -> Any:
    inner: Any = {"a": 1}
    for _ in range(depth):
        inner = {"a": inner, "b": inner}
    return inner


LAUGHS = {f"x{i}": f"${{x{i + 1}}} ${{x{i + 1}}}" for i in range(30)} | {"x30": "ha"}


@pytest.mark.parametrize(
    "cfg", [_nested(200), _doubled(30), {"a": "${b}", "b": "${a}"}, {"a": "${a}"}, {"a": "${nowhere}"}, LAUGHS]
)
def test_a_configuration_that_would_not_end_is_refused(cfg: Any, path: Path) -> None:
    torch.save({"cfg": cfg, "state_dicts": {}}, path)
    with pytest.raises(InputError, match="cfg"):
        read(path)


def test_the_command_makes_a_bundle_and_says_what_is_left_behind(path: Path, tmp_path: Path, capsys: Any) -> None:
    files.unet_lowdim().save(path)
    assert cli.main(["bundle", "import", f"in={path}", f"out={tmp_path / 'bundle'}"]) == 0
    out = capsys.readouterr().out
    assert "format: diffusion_policy" in out
    assert "the optimizer" in out
    assert cli.main(["bundle", "import", f"in={path}", f"out={tmp_path / 'bundle'}"]) == 2


def test_the_command_refuses_in_one_line(path: Path, tmp_path: Path, capsys: Any) -> None:
    files.unet_lowdim().save(path)
    path.write_bytes(path.read_bytes()[:-1000])
    assert cli.main(["bundle", "import", f"in={path}", f"out={tmp_path / 'bundle'}"]) == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1
    assert str(path) in error
    assert not (tmp_path / "bundle").exists()


ROBOMIMIC = {"task_name": "lift", "abs_action": True}


@pytest.mark.parametrize(
    ("task", "env", "rate", "note"),
    [
        ({"runner": "a.PushTKeypointsRunner", "max_steps": 300, "fps": 10}, None, 10.0, "is none of the simulators"),
        (
            {"runner": "a.RobomimicLowdimRunner", "obs_keys": ["object", "robot0_eef_pos"], "fps": 10, **ROBOMIMIC},
            {"name": "lift", "absolute": True, "joined": {"obs": ["object", "robot0_eef_pos"]}},
            20.0,
            "",
        ),
        ({"runner": "a.KitchenLowdimRunner", "fps": 12.5}, None, 12.5, "KitchenLowdimRunner"),
        ({"runner": "a.RealRunner"}, None, 10.0, "unless rate=HZ says another"),
        ({"runner": None}, None, 10.0, "a task without cfg.task.env_runner"),
    ],
)
def test_the_simulator_and_the_rate_are_the_task_s(task: dict[str, Any], env: Any, rate: float, note: str, path: Path):
    checkpoint, given = files.unet_lowdim(), dict(task)
    runner = {"_target_": given.pop("runner"), **{k: v for k, v in given.items() if k not in ROBOMIMIC}}
    checkpoint.cfg["task"] = {
        "name": "a_task",
        "env_runner": runner,
        **{k: v for k, v in given.items() if k in ROBOMIMIC},
    }
    foreign = read(checkpoint.save(path))
    assert (foreign.spec.env, foreign.spec.control_rate) == (env, rate)
    assert note in " ".join(foreign.said)


def test_a_simulator_that_cannot_be_is_refused(path: Path) -> None:
    checkpoint = files.unet_lowdim()
    checkpoint.cfg["task"]["env_runner"] |= {"fps": 1000}
    checkpoint.cfg["policy"]["obs_dim"] = 20
    checkpoint.cfg["task"]["env_runner"]["max_steps"] = 300
    checkpoint.cfg["policy"]["model"]["global_cond_dim"] = 40
    files.field_of_normalizer(checkpoint.state, "obs", [0.0] * 20, [1.0] * 20)
    checkpoint.state |= {
        name: torch.zeros(len(value), 16 + 40)
        for name, value in checkpoint.state.items()
        if name.endswith("cond_encoder.1.weight")
    }
    with pytest.raises(InputError, match=r"control_rate=1000\.0 must be at most 100"):
        read(checkpoint.save(path))


def test_pusht_s_keypoints_are_what_the_simulator_observes() -> None:
    """Twenty numbers: nine points and the finger."""
    observed = {"obs": ObservationSpec(shape=(20,))}
    runner = {
        "_target_": "diffusion_policy.env_runner.pusht_keypoints_runner.PushTKeypointsRunner",
        "max_steps": 300,
        "fps": 10,
    }
    found = simulator_of({"task": {"name": "pusht_lowdim", "env_runner": runner}}, observed)
    assert found.env == {
        "name": "pusht",
        "max_steps": 300,
        "joined": {"obs": ["keypoint", "agent_pos"]},
        "control_rate": 10.0,
    }
    assert not found.said
