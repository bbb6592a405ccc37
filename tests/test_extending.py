"""docs/extending.md: its code is one file of parts, and a stranger's package; each part does what the page says."""

from __future__ import annotations

import json
import os
import re
import subprocess
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import processes
import pytest

from action_diffusion import registry
from action_diffusion.datasets.storage.replay_buffer import ReplayBuffer
from action_diffusion.errors import InputError
from action_diffusion.registry import ENCODERS, Registry, use_plugins

PAGE = Path(__file__).resolve().parents[1] / "docs" / "extending.md"
ENCODER, DENOISER = "policy.encoder={name: tiny}", "policy.denoiser={name: mlp, horizon: 8}"
OBJECTIVE = "policy.objective={name: far}"
SMALL = [
    *(
        "task=custom",
        "task.horizon=8",
        "task.n_action_steps=4",
        "device=cpu",
        "train.max_steps=3",
        "train.batch_size=8",
    ),
    *("train.tensorboard=false", "evaluation.n_episodes=2", "task.env={name: reach, max_steps: 8}"),
]


def parts() -> str:
    """All blocks of Python on the page, as one file."""
    return "\n\n".join(re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL))


def test_a_part_takes_twenty_lines():
    """Beside imports."""
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert len(blocks) == 12
    for block in blocks:
        lines = [line for line in block.splitlines() if line and not line.startswith(("import ", "from "))]
        assert len(lines) <= 20


def demos(path: Path) -> Path:
    random = np.random.default_rng(0)
    state = np.cumsum(random.normal(size=(80, 2)) / 20, axis=0).astype(np.float32)
    ReplayBuffer.from_arrays({"joints": state, "action": state + 0.01}, [40, 80], attrs={"control_rate": 10.0}).save(
        path
    )
    return path


def command(folder: Path, *words: str, path: str = "", **variables: str) -> subprocess.CompletedProcess[str]:
    """`action-diffusion …` in a process of its own, as a user runs it."""
    environment = {key: value for key, value in os.environ.items() if key != "ACTION_DIFFUSION_PLUGINS"}
    environment |= ({"PYTHONPATH": path} if path else {}) | variables
    return processes.run("-m", "action_diffusion", *words, cwd=folder, env=environment)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with my_parts.py, demonstrations, and a run that was trained with the parts."""
    folder = tmp_path_factory.mktemp("extending")
    (folder / "my_parts.py").write_text(parts())
    demos(folder / "demos.zarr")
    options = ["data=demos.zarr", "output_dir=run", ENCODER, DENOISER, OBJECTIVE]
    options.append("policy.features.joints={name: norm}")
    result = command(folder, "train", "plugins=my_parts.py", *SMALL, *options)
    assert result.returncode == 0, result.stderr
    return folder


@pytest.mark.slow
def test_parts_of_a_file_are_trained_and_evaluated(world):
    spec = json.loads((world / "run/bundle/spec.json").read_text())
    kinds = ("encoder tiny", "denoiser mlp", "objective far", "feature norm", "environment reach")
    assert spec["requires"] == dict.fromkeys(kinds, "my_parts.py")
    assert 0 < json.loads((world / "run/evaluation/results.json").read_text())["mean_score"] < 1
    again = command(world, "evaluate", "bundle=run/bundle", "plugins=my_parts.py", "n_episodes=2", "device=cpu")
    assert again.returncode == 0, again.stderr


@pytest.mark.slow
def test_an_extension_of_a_file_is_fitted_and_acts(world):
    fitted = command(world, "fit", "calm", "bundle=run/bundle", "share=0.5", "plugins=my_parts.py", "device=cpu")
    assert fitted.returncode == 0, fitted.stderr
    assert "share: 0.5" in fitted.stdout
    words = ["bundle=run/bundle", "n_episodes=1", "device=cpu", "extensions=[calm]"]
    result = command(world, "evaluate", *words, "plugins=my_parts.py", "output_dir=calm")
    assert result.returncode == 0, result.stderr
    assert json.loads((world / "calm/results.json").read_text())["settings"]["extensions"] == ["calm"]
    unknown = command(world, "fit", "calmer", "bundle=run/bundle", "plugins=my_parts.py")
    assert (unknown.returncode, unknown.stderr) == (2, "error: unknown extension 'calmer': did you mean calm?\n")


@pytest.mark.slow
@pytest.mark.parametrize("words", [("evaluate", "n_episodes=1"), ("deploy", "robot=sim_pusht"), ("serve",)])
def test_a_bundle_says_what_it_needs(world, words):
    result = command(world, *words, "bundle=run/bundle", "device=cpu")
    assert result.returncode == 2
    needs = "needs the 'environment reach' of my_parts.py, which is not here: give plugins=my_parts.py"
    assert result.stderr.strip().endswith(f"run/bundle/spec.json: {needs}")


@pytest.mark.slow
def test_an_arm_of_a_file_is_deployed(world):
    (world / "cell.yaml").write_text("arm: {start: [0.0, 0.0]}\nseconds: 1.0\n")
    words = ["bundle=run/bundle", "robot=two_joints", "hardware=cell.yaml", "plugins=my_parts.py", "device=cpu"]
    result = command(world, "deploy", *words, "safety.margin=5", "page=false", "output_dir=out", "n_episodes=1")
    assert result.returncode == 0, result.stderr
    steps = [json.loads(line) for line in (world / "out/log.jsonl").read_text().splitlines()]
    assert len(steps) > 3


@pytest.mark.slow
def test_parts_of_a_package_need_no_option(world, tmp_path):
    """As pip leaves it: a folder with the module, and its metadata with entry points."""
    site = tmp_path / "site"
    info = site / "strangers-1.2.dist-info"
    info.mkdir(parents=True)
    (site / "strangers.py").write_text(parts())
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: strangers\nVersion: 1.2\n")
    code = parts().replace(".register(", ".own.get(")  # a package names its parts in its metadata only
    code = re.sub(r"^@\w+\.own\.get\(.*\n", "", code, flags=re.MULTILINE)
    (site / "strangers.py").write_text(re.sub(r"FORMATS\.own\.get\(.npz.\)", "", code))
    (info / "entry_points.txt").write_text(
        textwrap.dedent(
            """
            [action_diffusion.encoders]
            tiny = strangers:TinyEncoder
            [action_diffusion.envs]
            reach = strangers:Reach
            [action_diffusion.arms]
            two_joints = strangers:TwoJoints
            """
        )
    )
    words = ["train", "data=demos.zarr", f"output_dir={tmp_path / 'run'}", *SMALL, ENCODER]
    assert command(world, *words, path=str(site)).returncode == 0
    spec = json.loads((tmp_path / "run/bundle/spec.json").read_text())
    assert spec["requires"] == {"encoder tiny": "strangers 1.2", "environment reach": "strangers 1.2"}
    without = command(world, "evaluate", f"bundle={tmp_path / 'run/bundle'}")
    assert without.returncode == 2
    assert "needs the 'environment reach' of strangers 1.2, which is not here: install it: pip install strangers" in (
        without.stderr
    )
    (world / "cell.yaml").write_text("arm: {start: [0.0, 0.0]}\nseconds: 1.0\n")
    words = [f"bundle={tmp_path / 'run/bundle'}", "robot=two_joints", "hardware=cell.yaml", "device=cpu"]
    deployed = command(world, "deploy", *words, "safety.margin=5", "page=false", "output_dir=out2", path=str(site))
    assert deployed.returncode == 0, deployed.stderr


@pytest.mark.slow
def test_an_option_that_a_part_does_not_have(world):
    result = command(
        world, "train", "plugins=my_parts.py", *SMALL, "data=demos.zarr", "policy.encoder={name: tiny, width: 3}"
    )
    assert result.returncode == 2
    assert "width" in result.stderr
    assert "Traceback" not in result.stderr


def test_the_other_parts(world, monkeypatch):
    monkeypatch.setenv("ACTION_DIFFUSION_PLUGINS", "")
    for one in vars(registry).values():
        if isinstance(one, Registry):
            monkeypatch.setattr(one, "_given", {})
    use_plugins(str(world / "my_parts.py"))
    import torch

    from action_diffusion.datasets.formats.registry import detected, named
    from action_diffusion.deploy.hardware.protocols import check_arm, make_arm, make_camera
    from action_diffusion.deploy.teleop.devices.registry import make_device
    from action_diffusion.policy.model.encoders.encoder import ObservationEncoder

    np.savez(world / "demos.npz", state=np.zeros((4, 2)), action=np.ones((4, 2)), episode_ends=np.array([4]))
    assert detected(world / "demos.npz") == "npz"
    assert named("npz").open(world / "demos.npz").buffer.n_steps == 4
    check_arm(make_arm("two_joints"))
    assert make_camera("grey", rate=1000.0).read().image.shape == (96, 96, 3)
    device = make_device("drift", {"device": {"speed": 0.5}})
    assert device is not None
    twist = device.poll().twist
    assert twist is not None
    assert twist[0] == 0.5
    encoder = ObservationEncoder(
        image_keys=["top"], image_shapes={"top": (32, 32, 3)}, state_dims={}, n_obs_steps=1, width=0.25, stages=1,
        augment=[{"name": "flip_colours", "p": 1.0}, {"name": "noise", "sigma": 0.0}],
    )  # fmt: skip
    frames = torch.randint(256, (2, 1, 32, 32, 3), dtype=torch.uint8)
    plain = encoder.eval()({"top": frames})
    assert torch.allclose(encoder.train()({"top": frames.flip(-1)}), plain, atol=1e-5)


@pytest.mark.slow
def test_a_format_of_a_file_is_converted(world):
    columns: dict[str, Any] = {"state": np.arange(8.0).reshape(4, 2), "action": np.ones((4, 2))}
    np.savez(world / "rows.npz", **columns, episode_ends=np.array([4]))
    words = ["data", "convert", "in=rows.npz", "out=rows.zarr", "plugins=my_parts.py"]
    done = command(world, *words)
    assert done.returncode == 0, done.stderr
    np.testing.assert_array_equal(ReplayBuffer.open(world / "rows.zarr")["state"][:], columns["state"])
    cache = {"XDG_CACHE_HOME": str(world / "cache")}
    seen = command(world, "data", "inspect", "rows.npz", "plugins=my_parts.py", **cache)
    assert seen.returncode == 0, seen.stderr
    assert "rows.npz is npz, 1 episodes" in seen.stderr
    without = command(world, *words[:-1])
    assert without.returncode == 2
    assert "Traceback" not in without.stderr


@pytest.mark.parametrize("name", ["observation", "taken"])
def test_a_name_is_taken_once(monkeypatch, name):
    monkeypatch.setattr(ENCODERS, "_given", {})
    names = Registry("encoder", "none", {"observation": "a:b"})
    names.register("free")(int)
    if name == "taken":
        names.register("taken")(int)
    with pytest.raises(InputError, match=f"the name '{name}' .encoder. is taken"):
        names.register(name)(Path if name == "taken" else int)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("gone.py", None, "no such Python file"),
        ("broken.py", "1 / 0", "ZeroDivisionError: division by zero"),
        ("words.txt", "", "no such Python file"),
    ],
)
def test_a_file_that_cannot_be(tmp_path, file, text, message):
    if text is not None:
        (tmp_path / file).write_text(text)
    result = command(tmp_path, "train", f"plugins={file}")
    assert result.returncode == 2
    assert message in result.stderr
    assert "Traceback" not in result.stderr
