"""The policy server: with openpi's own client, with bad clients, and with several at once."""

from __future__ import annotations

import json
import os
import subprocess
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from servers import Server, serving, states
from test_deploy import HORIZON, TA, TO, save_bundle
from websockets.exceptions import InvalidStatus

from action_diffusion.datasets.files import cache_folder
from action_diffusion.envs.rollout import generators
from action_diffusion.policy import bundle as bundles
from action_diffusion.policy.agent import Agent
from action_diffusion.policy.normalizer import fit
from action_diffusion.policy.policy import DiffusionPolicy
from action_diffusion.policy.spec import ActionSpec, ObservationSpec

TOKEN = "a-token-of-more-than-16-characters"
PEER = cache_folder() / "peers" / "openpi-client" / "bin" / "python"
needs_openpi = pytest.mark.skipif(
    not PEER.exists(),
    reason=f"no openpi-client: python3 -m venv {PEER.parents[1]} && {PEER} -m pip install -r tests/openpi.txt",
)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_bundle(tmp_path_factory.mktemp("server") / "bundle")


@pytest.fixture(scope="module")
def server(bundle: Path) -> Iterator[Server]:
    with serving(bundle) as server:
        yield server


@pytest.fixture(scope="module")
def policy(bundle: Path) -> DiffusionPolicy:
    return bundles.load(bundle)


def expected(policy: DiffusionPolicy, observations: np.ndarray, seed: int = 7) -> np.ndarray:
    """What a local policy answers to observations [n, 5] of one episode, [n, Ta, A]."""
    agent = Agent(n_obs_steps=TO, n_action_steps=TA)
    noise_generator, generator = generators(seed)
    answers = []
    for observation in observations:
        agent.observe({"state": observation})
        obs = {key: value[None] for key, value in agent.history().items()}
        answers.append(policy.predict(obs, noise_generator=[noise_generator], generator=[generator])["action"][0])
    return np.stack(answers)


def openpi(server: Server, tmp_path: Path, how: str = "plain", token: str | None = None, **given: np.ndarray) -> Any:
    """What openpi's client gets for observations by key, [n, …] each."""
    np.savez(tmp_path / "given.npz", **given)
    script = Path(__file__).with_name("openpi_peer.py")
    command = [str(PEER), str(script), server.url, str(tmp_path / "given.npz"), str(tmp_path / "out.npz"), how]
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    env |= {"OPENPI_API_KEY": token} if token else {}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    with np.load(tmp_path / "out.npz") as file:
        return dict(file)


@needs_openpi
def test_openpis_client_gets_the_actions_of_the_local_policy(server, policy, tmp_path):
    """Float64 observations as simulators give them, and the prompt that openpi's robots send, change nothing."""
    given = states(5)
    got = openpi(server, tmp_path, state=given.astype(np.float64))
    assert got["actions"].dtype == np.float32
    assert got["actions"].shape == (5, TA, 2)
    assert np.array_equal(got["actions"], expected(policy, given))
    metadata = json.loads(str(got["metadata"]))
    assert metadata["observations"]["state"] | {"shape": [5], "dtype": "float32"} == metadata["observations"]["state"]
    assert [metadata[name] for name in ("n_obs_steps", "horizon", "n_action_steps")] == [TO, HORIZON, TA]
    assert (metadata["control_rate"], metadata["action"]["unit"]) == (10.0, "px")
    timing = json.loads(str(got["timing"]))
    assert all(row["infer_ms"] > 0 and row["wait_ms"] >= 0 for row in timing)
    assert "prev_total_ms" not in timing[0]
    assert all(row["prev_total_ms"] >= row["infer_ms"] * 0 for row in timing[1:])


@needs_openpi
def test_openpis_broker_executes_chunk_after_chunk(server, policy, tmp_path):
    given = states(2 * TA)
    got = openpi(server, tmp_path, "broker", state=given)
    assert np.array_equal(got["actions"], expected(policy, given[::TA]).reshape(-1, 2))


@needs_openpi
def test_images_go_through_openpis_client_as_they_are(tmp_path):
    path = tmp_path / "bundle"
    image = ObservationSpec(shape=(24, 24, 3), dtype="uint8", kind="image", source="image")
    place = ObservationSpec(shape=(2,), source="agent_pos")
    corners = np.array([[200.0, 200.0], [300.0, 300.0]])
    save_image_bundle(path, {"image": image, "agent_pos": place}, {"agent_pos": fit(corners), "action": fit(corners)})
    random = np.random.default_rng(1)
    images = random.integers(0, 256, (3, 24, 24, 3)).astype(np.uint8)
    places = random.uniform(200, 300, (3, 2)).astype(np.float32)
    policy = bundles.load(path)
    noise_generator, generator = generators(7)
    first = policy.predict(
        {"image": images[None, [0, 0]], "agent_pos": places[None, [0, 0]]},
        noise_generator=[noise_generator],
        generator=[generator],
    )
    second = policy.predict(
        {"image": images[None, :2], "agent_pos": places[None, :2]},
        noise_generator=[noise_generator],
        generator=[generator],
    )
    with serving(path) as server:
        got = openpi(server, tmp_path, image=images, agent_pos=places)
    assert np.array_equal(got["actions"][:2], np.concatenate([first["action"], second["action"]]))


def save_image_bundle(path: Path, observations: dict[str, ObservationSpec], normalizer: dict[str, Any]) -> None:
    save_bundle(
        path, observations=observations, normalizer=normalizer, task="", env=None, action=ActionSpec(shape=(2,))
    )


@needs_openpi
def test_openpis_api_key_is_the_token(bundle, tmp_path):
    with serving(bundle, host="0.0.0.0", env={"ACTION_DIFFUSION_TOKEN": TOKEN}) as server:
        assert openpi(server, tmp_path, token=TOKEN, state=states(1))["actions"].shape == (1, TA, 2)
        for header in (None, "Api-Key ", f"Api-Key {TOKEN}x", f"Api-Key {TOKEN[:-1]}", TOKEN, f"Bearer {TOKEN}", "é"):
            with pytest.raises(InvalidStatus, match="401"):
                server.connect(additional_headers=None if header is None else {"Authorization": header})
        with pytest.raises(InvalidStatus, match="401"):
            server.connect(additional_headers=[("Authorization", f"Api-Key {TOKEN}")] * 2)
        assert health(server) == "OK\n"
    assert TOKEN not in "\n".join(server.lines)


def health(server: Server) -> str:
    with urllib.request.urlopen(f"http://127.0.0.1:{server.port}/healthz", timeout=10) as answer:
        assert answer.status == 200
        return answer.read().decode()
