"""`RemotePolicy`: the local policy's chunks through a server, and a deployment that outlives it."""

from __future__ import annotations

import _thread
import dataclasses
import itertools
import os
import re
import signal
import socket
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from deployments import TO, add_guard, deploy, read_log, save_bundle
from servers import Server, serving
from tiny import TINY

from action_diffusion import cli
from action_diffusion.deploy.loop.clock import VirtualClock
from action_diffusion.deploy.loop.inference_worker import Unavailable
from action_diffusion.deploy.loop.prediction import Guidance, predict
from action_diffusion.deploy.run import run
from action_diffusion.deploy.serve.client import RemotePolicy
from action_diffusion.envs.rollout import generators
from action_diffusion.errors import InputError
from action_diffusion.options import configuration
from action_diffusion.policy import bundle as bundles
from action_diffusion.policy.action_queue import Request
from action_diffusion.policy.build import build_policy, fit_normalizer, with_statistics
from action_diffusion.policy.diffusion.sampler import Hook
from action_diffusion.policy.spec import ActionSpec, ObservationSpec, PolicySpec
from action_diffusion.rotations import RotationColumns

TOKEN = "a-token-of-more-than-16-characters"


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_bundle(tmp_path_factory.mktemp("remote") / "bundle")


@pytest.fixture(scope="module")
def server(bundle):
    with serving(bundle) as server:
        yield server


def noises(n: int, seed: int) -> dict[str, Any]:
    pairs = [generators(seed, row) for row in range(n)]
    return {"noise_generator": [pair[0] for pair in pairs], "generator": [pair[1] for pair in pairs]}


def histories(n: int) -> dict[str, np.ndarray]:
    return {"state": np.random.default_rng(0).uniform(200, 300, (n, TO, 5))}


@pytest.mark.slow
@pytest.mark.parametrize("guidance", [Guidance(), Guidance(mask="linear", beta=20.0, overlap=1), Guidance(rounds=2)])
def test_chunks_through_a_server_are_the_local_policys(server, bundle, guidance):
    """With and without a chunk to continue, batched or not."""
    local, remote = bundles.load(bundle, precision="fp32").requires_grad_(False), RemotePolicy(server.url)
    assert remote.spec == local.spec
    running = np.random.default_rng(1).uniform(200, 300, (5, 2))
    for requests in ([Request(0, None, 0)], [Request(4, running, 2)], [Request(4, running[:3], 1), None]):
        n = len(requests)
        chunks = [
            predict(policy, histories(n), requests, guidance=guidance, **noises(n, seed=3)).chunks
            for policy in (local, remote)
        ]
        assert chunks[0].dtype == chunks[1].dtype == np.float32
        assert chunks[0] == pytest.approx(chunks[1], abs=1e-3 if n > 1 else 0)
    free = predict(local, histories(1), [Request(0, None, 0)], guidance=guidance, **noises(1, seed=3)).chunks
    guided = predict(remote, histories(1), [Request(4, running, 2)], guidance=guidance, **noises(1, seed=3)).chunks
    assert not np.array_equal(free, guided)
    remote.close()


@pytest.mark.slow
def test_noise_has_the_shape_of_chunks_in_the_policy_s_frame(tmp_path: Path) -> None:
    """Of a pose, 9 numbers, where the data has 6."""
    turn = RotationColumns(3, "rotation_vector")
    spec = PolicySpec(
        observations={"pose": ObservationSpec(shape=(6,), source="pose", rotations=(turn,))},
        action=ActionSpec(shape=(6,), rotations=(turn,)),
        n_obs_steps=2,
        horizon=8,
        n_action_steps=4,
        control_rate=10.0,
        versions=bundles.versions(),
    )
    config = TINY | {"features": {}, "action_frame": {"name": "pose", "position": "pose"}}
    windows = np.random.default_rng(0).normal(size=(20, 8, 6)).astype(np.float32)
    statistics = fit_normalizer(
        config,
        spec,
        lambda _: windows.reshape(-1, 6),
        lambda _: (windows[:, 1], windows),
        read_history=lambda _: windows[:, :2],
    )
    bundles.save(tmp_path / "bundle", build_policy(config, with_statistics(spec, statistics)), {"policy": config})
    local, noise = bundles.load(tmp_path / "bundle", precision="fp32"), np.zeros((1, 8, 9), np.float32)
    with serving(tmp_path / "bundle") as server:
        remote = RemotePolicy(server.url)
        drawn = [policy.predict({"pose": windows[:1, :2]}, **noises(1, seed=0)) for policy in (local, remote)]
        given = [policy.predict({"pose": windows[:1, :2]}, noise=noise) for policy in (local, remote)]
        remote.close()
    for one, other in (drawn, given):
        assert one["action_pred"].shape == (1, 8, 6)
        np.testing.assert_allclose(one["action_pred"], other["action_pred"], atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("options", [["scheduling=sync"], ["scheduling=rtc", "delay=1", "rtc.beta=20"]])
def test_a_deployment_through_a_server_is_the_local_one(server, bundle, tmp_path, options):
    """Which needs no bundle: the server says what its policy takes."""
    logs = []
    for name, where in (("local", [f"bundle={bundle}"]), ("remote", [f"server={server.url}"])):
        config = deploy(bundle, tmp_path / name, "seed=3", "n_episodes=2", *options)
        given: dict[str, Any] = {"bundle": None, "server": None} | dict(word.split("=", 1) for word in where)
        config = dataclasses.replace(config, **given)
        assert run(config, clock=VirtualClock()) == 0
        logs.append(read_log(tmp_path / name))
    assert [row["action"] for row in logs[0]] == [row["action"] for row in logs[1]]
    assert len(logs[1]) == 24


@pytest.mark.slow
def test_what_extensions_note_travels(tmp_path):
    """So a guard on the server does what it does on the robot's computer."""
    bundle = save_bundle(tmp_path / "bundle")
    add_guard(bundle)
    logs = []
    with serving(bundle, "extensions=[guard]") as server:
        local, remote = bundles.load(bundle, extensions=["guard"], precision="fp32"), RemotePolicy(server.url)
        expected = local.predict(histories(3), **noises(3, seed=1))
        found = remote.predict(histories(3), **noises(3, seed=1))
        assert {name for name in found if name.startswith("guard.")} == {
            "guard.observation",
            "guard.chunk",
            "guard.level",
        }
        for name, values in expected.items():
            np.testing.assert_allclose(found[name], values, rtol=1e-3, atol=1e-3)
        alone = remote.predict({"state": histories(1)["state"][0]}, **noises(1, seed=1))
        assert np.shape(alone["guard.level"]) == ()
        remote.close()
        for name, words in (
            ("local", [f"bundle={bundle}", "extensions=[guard]"]),
            ("remote", [f"server={server.url}"]),
        ):
            words = [*words, f"output_dir={tmp_path / name}", "device=cpu", "guard.action=slow", "n_episodes=2"]
            assert run(configuration.settings("deploy", words), clock=VirtualClock()) == 0
            logs.append(read_log(tmp_path / name))
    assert [row["action"] for row in logs[0]] == [row["action"] for row in logs[1]]
    assert [row["guard_alarm"] for row in logs[0]] == [row["guard_alarm"] for row in logs[1]]
    assert any(row["held"] for row in logs[0])


@pytest.mark.slow
def test_to_act_on_alarms_needs_a_guard_on_the_server(server, tmp_path):
    words = [f"server={server.url}", f"output_dir={tmp_path}", "guard.action=hold"]
    with pytest.raises(InputError, match=r"give action-diffusion serve extensions=\[guard\]"):
        run(configuration.settings("deploy", words), clock=VirtualClock())


@pytest.mark.parametrize("notes", [5, [1.0], {"guard.level": "high"}, {1: 2.0}, {"guard.level": None}])
def test_notes_that_are_none_are_no_answer(notes):
    remote = RemotePolicy.__new__(RemotePolicy)
    remote._url = "ws://elsewhere:1"
    with pytest.raises(Unavailable, match="ws://elsewhere:1: notes are"):
        remote._notes([{"notes": {"guard.level": 1.0}}, {"notes": notes}])
    assert remote._notes([{}, {}]) == {}


@pytest.mark.slow
def test_the_noise_of_stochastic_steps_is_the_local_one(bundle):
    """Chunk after chunk from one generator, as an episode draws it."""
    ddpm = {"scheduler": "ddpm", "num_inference_steps": 5}
    with serving(bundle, "sampler.scheduler=ddpm", "sampler.num_inference_steps=5") as server:
        remote = RemotePolicy(server.url)
        answers = []
        for policy in (bundles.load(bundle, sampler=ddpm, precision="fp32"), remote):
            drawn = noises(1, seed=1)
            answers.append([policy.predict(histories(1), **drawn) for _ in range(3)])
        remote.close()
    for mine, theirs in zip(*answers, strict=True):
        assert np.array_equal(mine["action_pred"], theirs["action_pred"])
        assert np.array_equal(mine["action"], theirs["action"])
    assert not np.array_equal(answers[0][0]["action"], answers[0][1]["action"])


def test_it_takes_what_the_local_policy_takes(server, bundle):
    """A history without a batch axis, noise that is given, one generator for all rows, none at all."""
    local, remote = bundles.load(bundle, precision="fp32"), RemotePolicy(server.url)
    noise = np.random.default_rng(0).normal(size=(2, local.spec.horizon, 2))
    single = {"state": histories(1)["state"][0]}
    for obs, options in (
        (single, lambda: {"noise": noise[:1]}),
        (single, lambda: {"noise_generator": torch.Generator().manual_seed(3)}),
        (histories(2), lambda: {"noise": noise, "generator": torch.Generator().manual_seed(3)}),
    ):
        mine, theirs = local.predict(obs, **options()), remote.predict(obs, **options())
        for key in ("action", "action_pred"):
            assert theirs[key].shape == mine[key].shape
            assert theirs[key] == pytest.approx(mine[key], abs=1e-3)
    assert remote.predict(single)["action"].shape == (4, 2)
    with pytest.raises(InputError, match="2 generators for 1 rows"):
        remote.predict(single, generator=[torch.Generator(), torch.Generator()])
    with pytest.raises(InputError, match="noise has shape"):
        remote.predict(single, noise=noise)
    with pytest.raises(InputError, match="hooks and prefix steps do not travel"):
        remote.predict(single, hooks=[Hook()])
    remote.close()


def test_observations_that_do_not_fit_are_refused_as_the_local_policy_does(server):
    remote = RemotePolicy(server.url)
    with pytest.raises(InputError, match=r"has shape \[1, 2, 4\], the policy takes"):
        remote.predict({"state": np.zeros((1, TO, 4))}, **noises(1, 0))
    with pytest.raises(InputError, match="holds NaN"):
        remote.predict({"state": np.full((1, TO, 5), np.nan)}, **noises(1, 0))
    rest = [np.zeros((3, 2), np.float32)]
    with pytest.raises(InputError, match="refused: guidance rounds is 99, not a whole number from 0 to 20"):
        remote.predict(histories(1), running=rest, delay=[1], guidance={"rounds": 99}, **noises(1, 0))
    assert remote.predict(histories(1), **noises(1, 0))["action"].shape == (1, 4, 2)
    remote.close()


# A server that is gone.


def until(condition: Any, seconds: float = 20.0) -> None:
    """Wait until `condition()` holds."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def reachable(remote: RemotePolicy) -> bool:
    try:
        remote.predict(histories(1), **noises(1, 0))
    except Unavailable:
        return False
    return True


@pytest.mark.slow
@pytest.mark.alone
def test_a_killed_server_is_found_again(bundle):
    lines: list[str] = []
    with serving(bundle) as first:
        remote = RemotePolicy(first.url, timeout=1.0, say=lines.append)
        before = remote.predict(histories(1), **noises(1, 5))["action_pred"]
        first.process.kill()
        first.process.wait()
        with pytest.raises(Unavailable, match=f"(lost|no connection to) {first.url}: "):  # it may know it already
            remote.predict(histories(1), **noises(1, 5))
        began = time.monotonic()
        with pytest.raises(Unavailable, match=f"no connection to {first.url}: "):
            remote.predict(histories(1), **noises(1, 5))
        assert time.monotonic() - began < 0.1
        with serving(bundle, f"port={first.port}"):
            until(lambda: reachable(remote))
            assert np.array_equal(remote.predict(histories(1), **noises(1, 5))["action_pred"], before)
            remote.close()
    assert [line.split()[0] for line in lines] == ["lost", "connected"]


@pytest.mark.slow
@pytest.mark.alone
def test_a_hanging_server_is_given_up_and_found_again(server):
    remote = RemotePolicy(server.url, timeout=0.5, say=lambda line: None)
    assert reachable(remote)
    os.kill(server.process.pid, signal.SIGSTOP)
    try:
        began = time.monotonic()
        with pytest.raises(Unavailable, match=r"no answer in 0\.5 s"):
            remote.predict(histories(1), **noises(1, 0))
        assert 0.4 < time.monotonic() - began < 1.5
        assert not reachable(remote)
    finally:
        os.kill(server.process.pid, signal.SIGCONT)
    until(lambda: reachable(remote))
    remote.close()


@pytest.mark.slow
def test_sending_to_a_server_that_does_not_read_ends(tmp_path):
    """More than the buffers of both sides hold."""
    from deployments import save_image_bundle

    from action_diffusion.policy.model.normalizer import fit
    from action_diffusion.policy.spec import ObservationSpec

    image = {"image": ObservationSpec(shape=(1500, 2000, 3), dtype="uint8", kind="image", source="image")}
    save_image_bundle(tmp_path / "bundle", image, {"action": fit(np.array([[200.0, 200.0], [300.0, 300.0]]))})
    with serving(tmp_path / "bundle", "max_message_mb=40") as server:
        remote = RemotePolicy(server.url, timeout=1.0, say=lambda line: None)
        os.kill(server.process.pid, signal.SIGSTOP)
        began = time.monotonic()
        with pytest.raises(Unavailable, match="lost"):
            remote.predict({"image": np.zeros((1, TO, 1500, 2000, 3), np.uint8)}, **noises(1, 0))
        assert time.monotonic() - began < 4
        server.process.kill()
        remote.close()


@pytest.mark.slow
def test_another_policy_at_the_same_place_is_not_taken(bundle, tmp_path):
    other = save_bundle(tmp_path / "other", control_rate=20.0)
    with serving(bundle) as first:
        remote = RemotePolicy(first.url, say=lambda line: None)
        assert first.end() == 0
    assert not reachable(remote)
    with serving(other, f"port={first.port}"):
        until(lambda: "another policy" in remote._reason)
        with pytest.raises(Unavailable, match=r"it serves another policy now: control_rate is 20\.0, not 10\.0"):
            remote.predict(histories(1), **noises(1, 0))
    remote.close()


@pytest.mark.slow
@pytest.mark.alone
def test_a_deployment_holds_while_its_server_is_gone_and_then_goes_on(tmp_path):
    bundle = save_bundle(tmp_path / "bundle", env={"name": "pusht", "max_steps": 3000})
    servers: list[Server] = []
    log = tmp_path / "run" / "log.jsonl"

    def steps() -> int:
        return log.read_text().count("\n") if log.exists() else 0

    def interfere() -> None:
        try:
            until(lambda: steps() > 10, 60)
            servers[0].process.kill()
            time.sleep(2.0)  # longer than a chunk lasts
            servers.append(Server(bundle, f"port={servers[0].port}"))
            there = steps()
            until(lambda: steps() > there + 50, 60)
        finally:
            _thread.interrupt_main()

    with serving(bundle) as first:
        servers.append(first)
        config = deploy(bundle, tmp_path / "run", "scheduling=rtc", f"server={first.url}", "server_timeout=1")
        other = threading.Thread(target=interfere)
        other.start()
        try:
            assert run(dataclasses.replace(config, bundle=None)) == 130
        finally:
            other.join()
            servers[1].end()
    rows = read_log(tmp_path / "run")
    lost = [row["step"] for row in rows if re.search("lost ws|no connection", " ".join(row["interventions"]))]
    during, after = rows[lost[0] : lost[-1]], rows[lost[-1] + 5 :]
    assert sum(row["held"] for row in during) >= 5
    assert any(row["inference_ms"] is not None for row in after)
    assert sum(row["held"] for row in after) <= len(after) // 4
    assert all(row["action"] == before["action"] for before, row in itertools.pairwise(rows) if row["held"])
    assert max(row["missed_ticks"] for row in rows) <= 3


# What is wrong at the start.


@pytest.mark.slow
def test_what_is_wrong_with_a_server_is_said_in_one_line(server, bundle, tmp_path, monkeypatch):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        nobody = f"ws://127.0.0.1:{free.getsockname()[1]}"
    for url, message in (
        (nobody, f"no policy server at {nobody}: .*refused"),
        ("http://x", "server=http://x: write ws://HOST:PORT"),
        ("ws://", "server=ws://: write ws://HOST:PORT"),
    ):
        with pytest.raises(InputError, match=message):
            RemotePolicy(url, patience=0.3)
    other = save_bundle(tmp_path / "other", control_rate=20.0)
    with pytest.raises(InputError, match="serves another policy than bundle="):
        run(deploy(other, tmp_path / "run", f"server={server.url}"))
    with pytest.raises(InputError, match=r"sampler\.num_inference_steps is for whoever predicts"):
        run(deploy(bundle, tmp_path / "run", f"server={server.url}", "sampler.num_inference_steps=3"))
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_the_token_of_a_deployment(bundle, tmp_path, capsys, monkeypatch):
    (tmp_path / "token").write_text(f"{TOKEN}\n")
    monkeypatch.chdir(tmp_path)
    with serving(bundle, f"token_file={tmp_path / 'token'}") as server:
        words = ["deploy", f"server={server.url}", "output_dir=run"]
        assert cli.main(words) == 2
        assert "it asks for a token" in capsys.readouterr().err
        assert cli.main([*words, "token_file=token", "page=false"]) == 0
    out = capsys.readouterr()
    assert TOKEN not in out.out + out.err + "\n".join(server.lines)
