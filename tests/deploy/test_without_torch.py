"""An ONNX file, wherever a bundle can be given, in processes that cannot import torch."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from deployments import read_log, save_bundle
from servers import ask, serving, states

from action_diffusion import cli
from action_diffusion.deploy.serve.client import RemotePolicy
from action_diffusion.deploy.serve.wire import EXTRA
from action_diffusion.envs.rollout import generators
from action_diffusion.policy import bundle as bundles
from action_diffusion.policy.interchange.onnx import write
from action_diffusion.policy.policy import DiffusionPolicy
from action_diffusion.policy.reading import read_config

SCRIPT = str(Path(__file__).parents[1] / "support" / "without_torch.py")
CLIENT = """\
import sys
sys.path.insert(0, sys.argv[2])
import without_torch
import numpy as np
from action_diffusion.deploy.serve.client import RemotePolicy
from action_diffusion.envs.rollout import generators
from action_diffusion.policy.agent import Agent

remote = RemotePolicy(sys.argv[1])
agent = Agent(n_obs_steps=remote.spec.n_obs_steps, n_action_steps=remote.spec.n_action_steps)
agent.observe({"state": np.load(sys.argv[3])})
noise, steps = generators(5)
for _ in range(2):
    agent.accept(remote.predict(agent.history(), noise_generator=[noise], generator=[steps])["action_pred"])
    executed = [agent.act() for _ in range(remote.spec.n_action_steps)]
    agent.observe({"state": np.load(sys.argv[3])})
remote.close()
np.save(sys.argv[4], executed)
assert "torch" not in sys.modules
"""


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle whose steps draw noise, with policy.onnx beside it."""
    path = save_bundle(tmp_path_factory.mktemp("without") / "bundle")
    bundles.derive(path, path, sampler={"eta": 1.0})
    write(bundles.load(path), read_config(path), path.parent / "policy.onnx", {"in": str(path)})
    return path


@pytest.fixture
def policy(bundle: Path) -> DiffusionPolicy:
    return bundles.load(bundle)


@pytest.mark.slow
def test_a_served_file_says_what_torchs_policy_says(bundle: Path, policy: DiffusionPolicy, tmp_path: Path) -> None:
    """To a client with torch and to one without; the noise of the steps goes on from chunk to chunk."""
    seen = states(1)[0]
    np.save(tmp_path / "seen.npy", seen)
    history = {"state": np.stack([seen, seen])}
    noise, steps = generators(5)
    chunks = [policy.predict(history, noise_generator=[noise], generator=[steps])["action_pred"] for _ in range(2)]
    with serving(bundle.parent / "policy.onnx", program=(SCRIPT,)) as server:
        remote = RemotePolicy(server.url)
        noise, steps = generators(5)
        for chunk in chunks:
            answer = remote.predict(history, noise_generator=[noise], generator=[steps])
            np.testing.assert_allclose(answer["action_pred"], chunk, atol=1e-2)  # px, of 100
        remote.close()
        words = [sys.executable, "-c", CLIENT, server.url, str(Path(SCRIPT).parent)]
        words += [str(tmp_path / "seen.npy"), str(tmp_path / "executed.npy")]
        done = subprocess.run(words, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        with server.connect() as connection:
            connection.recv()
            running = {"state": seen, EXTRA: {"running": np.zeros((4, 2), np.float32)}}
            assert "cannot continue a running chunk" in ask(connection, running)
    now = policy.spec.n_obs_steps - 1
    np.testing.assert_allclose(np.load(tmp_path / "executed.npy"), chunks[1][now : now + 4], atol=1e-2)


def without_torch(*words: str) -> Any:
    return subprocess.run([sys.executable, SCRIPT, *words], capture_output=True, text=True, timeout=120)


@pytest.mark.slow
def test_an_evaluated_file_scores_as_the_bundle(bundle: Path, tmp_path: Path) -> None:
    """Starts, noise and actions are the same; contact may make much of a rounding, but not in twelve steps."""
    words = ["n_episodes=3", "n_videos=0", "policy_batch=2", "device=cpu"]
    done = without_torch(
        "evaluate", f"bundle={bundle.parent / 'policy.onnx'}", f"output_dir={tmp_path / 'onnx'}", *words
    )
    assert done.returncode == 0, done.stderr
    assert cli.main(["evaluate", f"bundle={bundle}", f"output_dir={tmp_path / 'torch'}", *words]) == 0
    found, expected = (json.loads((tmp_path / name / "results.json").read_text()) for name in ("onnx", "torch"))
    np.testing.assert_allclose(found["scores"], expected["scores"], atol=1e-3)
    assert found["settings"]["runtime"].startswith("ONNX Runtime")


@pytest.mark.slow
def test_a_deployed_file_commands_the_simulated_robot(bundle: Path, tmp_path: Path, capsys) -> None:
    output = tmp_path / "deployed"
    done = without_torch("deploy", f"bundle={bundle.parent / 'policy.onnx'}", f"output_dir={output}", "page=false")
    assert done.returncode == 0, done.stderr
    assert any(step["action"] is not None for step in read_log(output))
    assert cli.main(["deploy", f"replay={output}", f"bundle={bundle.parent / 'policy.onnx'}"]) == 0
    assert "bit for bit" in capsys.readouterr().out  # though torch is loaded here


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["serve", "sampler.num_inference_steps=2"], "sampler.num_inference_steps"),
        (["serve", "extensions=[guard]"], "extensions=[guard]"),
        (["deploy", "scheduling=rtc", "execution_horizon=2"], "scheduling=rtc"),
        (["deploy", "precision=fp16"], "precision"),
        (["evaluate", "compile=true"], "compile"),
        (["finetune", "method=dppo"], "expected a folder with"),
    ],
)
def test_what_a_file_cannot_do_is_one_line(words, message, bundle: Path, monkeypatch, tmp_path, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main([words[0], f"bundle={bundle.parent / 'policy.onnx'}", *words[1:]]) == 2
    error = capsys.readouterr().err.strip()
    assert message in error.splitlines()[-1]
    assert error.startswith("error: ")


def test_noise_is_torchs_where_torch_is_loaded() -> None:
    noise, _ = generators(3)
    assert isinstance(noise, torch.Generator)
