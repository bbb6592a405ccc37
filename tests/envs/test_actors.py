"""Simulators as Ray actors: the scores of one process, whatever dies; and one line where there is no cluster."""

from __future__ import annotations

import functools
import importlib
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rollouts import NoisyPolicy, assert_same, run
from trouble import ChaoticEnv, Trouble

from action_diffusion.cli import main
from action_diffusion.datasets.storage.replay_buffer import ReplayBuffer
from action_diffusion.envs import actors
from action_diffusion.envs.collect import collect
from action_diffusion.envs.workers import count
from action_diffusion.errors import InputError

SUPPORT = Path(__file__).parents[1] / "support"
needs_ray = pytest.mark.skipif(find_spec("ray") is None, reason="needs Ray: pip install 'action-diffusion[ray]'")


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """One on this machine, as `workers=ray` starts it, and ended with this module."""
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory(prefix="r") as folder:
        patch.setenv("RAY_TMPDIR", folder)
        patch.setenv("PYTHONPATH", str(SUPPORT))
        for name in ("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", *actors.QUIET):
            patch.setenv(name, "")  # to be as it was afterwards
            patch.delenv(name)
        patch.delenv("RAY_ADDRESS", raising=False)
        ray = actors.connect("ray")
        try:
            yield ray
        finally:
            ray.shutdown()


@needs_ray
@pytest.mark.slow
def test_scores_are_those_of_one_process(cluster: Any) -> None:
    found = run(NoisyPolicy(), ChaoticEnv, range(100, 112), n_envs=5, workers="ray")
    assert_same(found, run(NoisyPolicy(), ChaoticEnv, range(100, 112)))
    assert count("ray") >= 1
    assert cluster.get_runtime_context().gcs_address.startswith("127.0.0.1:"), "reachable from other machines"


@needs_ray
@pytest.mark.slow
def test_an_actor_that_dies_is_replaced_and_its_episodes_run_again(cluster: Any, tmp_path: Path) -> None:
    lost: list[tuple[int, str]] = []
    make_env = functools.partial(Trouble, what="crash", seed=105, times=1, folder=tmp_path)
    found = run(
        NoisyPolicy(),
        make_env,
        range(104, 110),
        n_envs=4,
        workers="ray",
        on_lost=lambda seed, reason: lost.append((seed, reason)),
    )
    assert_same(found, run(NoisyPolicy(), ChaoticEnv, range(104, 110)))
    assert 105 in [seed for seed, _ in lost]
    assert all("Ray actor died" in reason for _, reason in lost)


@needs_ray
@pytest.mark.slow
def test_bad_input_in_an_actor_is_one_line(cluster: Any, tmp_path: Path) -> None:
    make_env = functools.partial(Trouble, what="refuse", seed=105, times=1, folder=tmp_path)
    with pytest.raises(InputError, match="an action of Chaos is two numbers"):
        run(NoisyPolicy(), make_env, [105], n_envs=1, workers="ray")


@needs_ray
@pytest.mark.slow
def test_other_versions_on_a_node_are_one_line(cluster: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(actors, "versions", lambda own=actors.versions: own() | {"pymunk": "5.0"})
    message = rf"{socket.gethostname()} has pymunk 6\.\S+, this machine 5\.0: all need the same"
    with pytest.raises(InputError, match=message):
        run(NoisyPolicy(), ChaoticEnv, [105], n_envs=1, workers="ray")


@needs_ray
@pytest.mark.slow
def test_a_node_without_this_package_is_one_line(cluster: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "only_here.py").write_text("class Worker:\n    def __init__(self, *_): ...\n    def about(self): ...\n")
    monkeypatch.syspath_prepend(tmp_path)  # after Ray was told where modules are
    monkeypatch.setattr(actors, "Worker", importlib.import_module("only_here").Worker)
    with pytest.raises(InputError, match="on a node, ModuleNotFoundError: No module named 'only_here': install"):
        run(NoisyPolicy(), ChaoticEnv, [105], n_envs=1, workers="ray")


@needs_ray
@pytest.mark.slow
def test_what_is_collected_is_the_same(cluster: Any, tmp_path: Path) -> None:
    for name, workers in (("one", None), ("ray", "ray")):
        collect(env_name="pusht", episodes=2, output=tmp_path / f"{name}.zarr", workers=workers)
    one, other = (ReplayBuffer.open(tmp_path / f"{name}.zarr") for name in ("one", "ray"))
    assert dict(one.attrs) == dict(other.attrs)
    for key in one.keys:
        np.testing.assert_array_equal(one[key][:], other[key][:])


def closed_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


@needs_ray
def test_a_head_node_that_is_not_there_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    address, began = f"ray://127.0.0.1:{closed_port()}", time.monotonic()
    assert main(["evaluate", "bundle=x", f"workers={address}"]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith(f"error: workers={address}: no Ray head node answers at {address[6:]}")
    assert time.monotonic() - began < 5


SILENT = """
import socket
from action_diffusion.envs.actors import connect
with socket.create_server(("127.0.0.1", 0)) as server:
    try:
        connect(f"ray://127.0.0.1:{server.getsockname()[1]}")
    except ValueError as error:
        print(error)
"""


@needs_ray
@pytest.mark.slow
def test_what_listens_and_is_no_ray_is_one_line() -> None:
    seconds = {name: "1" for name in actors.QUIET if name.endswith("TIMEOUT_S")}
    ended = subprocess.run(
        [sys.executable, "-c", SILENT], env=os.environ | seconds, capture_output=True, text=True, timeout=60
    )
    (line,) = (ended.stdout + ended.stderr).strip().splitlines()
    assert "Ray does not answer at ray://127.0.0.1" in line


def test_without_ray_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(actors, "find_spec", lambda _: None)
    with pytest.raises(InputError, match=r"workers=ray needs Ray: pip install 'action-diffusion\[ray\]'"):
        actors.connect("ray")


@pytest.mark.parametrize("workers", ["0", "2000", "rai", "ray://host", "ray://:10001", "1.5"])
@pytest.mark.parametrize("command", ["train", "evaluate bundle=x", "collect output=x", "finetune bundle=x"])
def test_other_words_are_refused(command: str, workers: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*command.split(), f"workers={workers}"]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert f"workers={workers}" in line
