"""Many robots on policy servers: answered together, by name, counted, through a replacement and a server that dies."""

from __future__ import annotations

import asyncio
import dataclasses
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from deployments import HORIZON, TA, TO, add_guard, save_bundle, until
from servers import Server, ask, connection_to, serving, serving_here, states
from websockets.exceptions import InvalidStatus
from websockets.sync.client import connect

from action_diffusion import cli
from action_diffusion.deploy.loop.prediction import Guidance
from action_diffusion.deploy.serve import wire
from action_diffusion.deploy.serve.answering import answers, kind
from action_diffusion.deploy.serve.client import RemotePolicy
from action_diffusion.deploy.serve.server import check_replacement
from action_diffusion.deploy.serve.session import ClientSession, Question
from action_diffusion.envs.rollout import generators
from action_diffusion.errors import InputError
from action_diffusion.files import cache_folder
from action_diffusion.options.configuration import load, settings
from action_diffusion.policy import bundle as bundles
from action_diffusion.policy.agent import Agent
from action_diffusion.policy.policy import DiffusionPolicy
from action_diffusion.policy.reading import read_config
from action_diffusion.policy.spec import ActionSpec, ObservationSpec
from benchmarks.robustness import fleet

TOKEN = "a-token-of-more-than-16-characters"
NEARLY = 1e-2
"""px: 1e-4 of what the actions reach. A row's neighbours change less of it: sums are rounded in another order."""
PEER = cache_folder() / "peers" / "openpi-client" / "bin" / "python"
needs_openpi = pytest.mark.skipif(not PEER.exists(), reason="no openpi-client: see test_server.py")
needs_haproxy = pytest.mark.skipif(
    not (shutil.which("haproxy") or shutil.which("haproxy", path="/usr/sbin")),
    reason="no haproxy: apt-get install haproxy",
)


def save_verified(path: Path, seed: int, **changes: Any) -> Path:
    """A bundle with a golden pair, whose weights depend on `seed`."""
    folder = save_bundle(path.parent / f".{path.name}-{seed}", **changes)
    policy = bundles.load(folder)
    torch.manual_seed(seed)
    with torch.no_grad():
        for weight in policy.denoiser.parameters():
            weight.add_(0.05 * torch.randn_like(weight))
    bundles.save(path, policy, read_config(folder), golden_obs={"state": states(TO)})
    return path


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> DiffusionPolicy:
    return bundles.load(save_bundle(tmp_path_factory.mktemp("fleet") / "bundle"), precision="fp32").requires_grad_(
        False
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_verified(tmp_path / "bundle", 1)


def expected(policies: list[DiffusionPolicy], observations: np.ndarray, seed: int = 7) -> np.ndarray:
    """What local policies, each for the observation [5] of its place, answer in one episode: [n, Ta, A]."""
    agent = Agent(n_obs_steps=TO, n_action_steps=TA)
    drawing, steps = generators(seed)
    said = []
    for policy, observation in zip(policies, observations, strict=True):
        agent.observe({"state": observation})
        obs = {key: value[None] for key, value in agent.history().items()}
        said.append(policy.predict(obs, noise_generator=[drawing], generator=[steps])["action"][0])
    return np.stack(said)


def noises() -> dict[str, Any]:
    drawing, steps = generators(3)
    return {"noise_generator": [drawing], "generator": [steps]}


def actions(answer: dict[str, Any] | Exception) -> np.ndarray:
    """[Ta, A]."""
    assert isinstance(answer, dict)
    return np.asarray(answer["actions"])


def question(policy: DiffusionPolicy, seed: int, **extra: Any) -> Question:
    """Of a client that has just come."""
    message: dict[str, Any] = {"state": states(1, seed=seed)[0]}
    if extra:
        message[wire.EXTRA] = extra
    return ClientSession(spec=policy.spec, seed=seed).take(wire.unpack(wire.pack(message)))


# Answered together.

GIVEN = {"noise": np.full((HORIZON, 2), 0.1, np.float32)}
RUNNING = {"running": np.full((6, 2), 250.0, np.float32), "guidance": {"beta": 5.0}}


@pytest.mark.slow
@pytest.mark.parametrize("extra", [{}, GIVEN, RUNNING | {"delay": 2}], ids=["plain", "noise", "running"])
@pytest.mark.parametrize("scheduler", ["ddim", "ddpm"])
def test_an_answer_is_the_same_whatever_it_is_computed_with(tmp_path, scheduler, extra):
    """Of noise that each draws from its own generators, in whichever row, among however many."""
    sampler = {"scheduler": scheduler, "num_inference_steps": 4}
    policy = bundles.load(save_bundle(tmp_path / "bundle"), precision="fp32", sampler=sampler).requires_grad_(False)
    alone = [answers(policy, [question(policy, seed, **extra)])[0] for seed in range(5)]
    for order in ([0, 1, 2, 3, 4], [3, 1], [4, 0, 2]):
        together = answers(policy, [question(policy, seed, **extra) for seed in order])
        for seed, answer in zip(order, together, strict=True):
            assert actions(answer).shape == (TA, 2)
            np.testing.assert_allclose(actions(answer), actions(alone[seed]), rtol=0, atol=NEARLY)
    assert not np.array_equal(actions(alone[0]), actions(alone[1]))


def test_what_is_asked_in_another_way_is_not_answered_together(policy):
    """A chunk that is continued never takes its neighbour's method, and others never its hooks."""
    free, given = question(policy, 0), question(policy, 1, noise=np.zeros((HORIZON, 2)))
    running, strong = (
        question(policy, 2, **RUNNING),
        question(policy, 3, running=RUNNING["running"], guidance={"beta": 9.0}),
    )
    assert len({kind(policy, one) for one in (free, given, running, strong)}) == 4
    assert kind(policy, free) == kind(policy, question(policy, 4))
    trained: Any = dataclasses.make_dataclass("Trained", ["max_delay"])(3)
    by_delay = [kind(trained, question(policy, 5, running=RUNNING["running"], delay=delay)) for delay in (0, 1, 3, 4)]
    assert by_delay[0] == by_delay[3] != by_delay[1] == by_delay[2]
    assert by_delay[1] == (True, False, Guidance(method="trained"))


class Failing:
    """Fails for a batch with a state above 1000, after its noise was drawn."""

    def __init__(self, policy: DiffusionPolicy) -> None:
        self.spec, self._policy = policy.spec, policy

    def predict(self, obs: dict[str, np.ndarray], **options: Any) -> dict[str, np.ndarray]:
        made = self._policy.predict(obs, **options)
        if obs["state"].max() > 1000:
            raise RuntimeError("no such place")
        return made


def test_what_fails_for_one_is_nothing_to_those_beside_it(policy):
    """Who are answered as if it had not been there, with their noise."""
    bad = ClientSession(spec=policy.spec, seed=9).take(wire.unpack(wire.pack({"state": np.full(5, 2000.0)})))
    failing: Any = Failing(policy)
    said = answers(failing, [question(policy, 0), bad, question(policy, 1)])
    assert isinstance(said[1], RuntimeError)
    for row, seed in ((0, 0), (2, 1)):
        alone = answers(policy, [question(policy, seed)])[0]
        assert np.array_equal(actions(said[row]), actions(alone))


class Watched:
    """Says how many rows each call had, and begins none before it is `free`."""

    def __init__(self, policy: DiffusionPolicy) -> None:
        self.spec, self._policy = policy.spec, policy
        self.rows: list[int] = []
        self.free = threading.Event()
        self.free.set()
        self._alone = threading.Lock()

    def predict(self, obs: dict[str, np.ndarray], **options: Any) -> dict[str, np.ndarray]:
        self.rows.append(len(obs["state"]))
        assert self._alone.acquire(blocking=False), "two calls at once"
        try:
            assert self.free.wait(20)
            return self._policy.predict(obs, **options)
        finally:
            self._alone.release()


def waiting(server: Any, n: int) -> bool:
    return metric(server, "queue") == n


def test_what_comes_while_the_policy_is_busy_is_answered_by_one_call(policy):
    """In the order in which it came, as many as are allowed, each as a connection of its own."""
    watched = Watched(policy)
    with serving_here(watched, batch_wait=0.0, max_batch=3, seed=7) as (server, port, _):
        clients = [connection_to(port) for _ in range(6)]
        given = states(6)
        watched.free.clear()
        for place, (client, state) in enumerate(zip(clients, given, strict=True)):
            client.send(wire.pack({"state": state}))
            until(lambda: watched.rows)
            until(partial(waiting, server, place))
        watched.free.set()
        said = [wire.unpack(client.recv(timeout=20)) for client in clients]
        for client in clients:
            client.close()
    assert watched.rows == [1, 3, 2]
    for answer, state in zip(said, given, strict=True):
        chunk = wire.decode_array(answer["actions"], "")
        np.testing.assert_allclose(chunk, expected([policy], state[None])[0], rtol=0, atol=NEARLY)


def test_copies_share_what_waits_and_compute_side_by_side(policy):
    """No copy has two calls at once, and each answers as the policy does."""
    copies = [Watched(policy), Watched(policy)]
    with serving_here(copies, batch_wait=0.0, max_batch=8, seed=7) as (server, port, _):
        clients = [connection_to(port) for _ in range(8)]
        for copy in copies:
            copy.free.clear()
        given = states(8)
        for place, (client, state) in enumerate(zip(clients, given, strict=True)):
            client.send(wire.pack({"state": state}))
            if place < 2:
                until(partial(len, copies[place].rows))
            else:
                until(partial(waiting, server, place - 1))
        assert [copy.rows for copy in copies] == [[1], [1]]
        for copy in copies:
            copy.free.set()
        said = [wire.unpack(client.recv(timeout=20)) for client in clients]
        for client in clients:
            client.close()
    assert sum(sum(copy.rows) for copy in copies) == 8
    for answer, state in zip(said, given, strict=True):
        chunk = wire.decode_array(answer["actions"], "")
        np.testing.assert_allclose(chunk, expected([policy], state[None])[0], rtol=0, atol=NEARLY)


def test_nobody_waits_for_those_who_cannot_ask(policy):
    """A client that is alone is answered at once, and so are all once each has asked."""
    watched = Watched(policy)
    with serving_here(watched, batch_wait=60.0) as (_, port, _):
        first = connection_to(port)
        assert ask(first, {"state": states(1)[0]})["actions"].shape == (TA, 2)
        second = connection_to(port)
        for client in (first, second):
            client.send(wire.pack({"state": states(1)[0]}))
        for client in (first, second):
            client.recv(timeout=20)
        first.close()
        until(lambda: ask(second, {"state": states(1)[0]}) is not None)
        second.close()
    assert watched.rows == [1, 2, 1]


def test_the_first_waits_for_others_as_long_as_it_was_told(policy):
    with serving_here(policy, batch_wait=0.3) as (_, port, _):
        idle, asking = connection_to(port), connection_to(port)
        answer = ask(asking, {"state": states(1)[0]})
        assert answer["server_timing"]["wait_ms"] >= 290
        idle.close(), asking.close()


# By name.


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> DiffusionPolicy:
    """For another robot."""
    path = tmp_path_factory.mktemp("fleet") / "other"
    return bundles.load(save_bundle(path, control_rate=20.0, task="another"), precision="fp32").requires_grad_(False)


def test_a_client_gets_the_policy_that_its_url_names(policy, other):
    with serving_here({"a": policy, "b": other}) as (_, port, _):
        for name, one in (("a", policy), ("b", other), ("b/", other), ("b?x=1", other)):
            remote = RemotePolicy(f"ws://127.0.0.1:{port}/{name}")
            assert remote.spec == one.spec
            obs = {"state": states(TO)[None]}
            theirs, ours = (each.predict(obs, **noises())["action_pred"] for each in (remote, one))
            assert np.array_equal(theirs, ours)
            remote.close()
        for name in ("c", "", "a/b", "A"):
            line = rf"no policy server at .*: no policy /{name}; this server has a, b: connect to ws://HOST:PORT/NAME"
            with pytest.raises(InputError, match=line):
                RemotePolicy(f"ws://127.0.0.1:{port}/{name}")


def test_the_only_policy_needs_no_name(policy):
    for policies, paths in ((policy, ("", "a", "x/y")), ({"a": policy}, ("", "a"))):
        with serving_here(policies) as (_, port, _):
            for path in paths:
                connection_to(port, path).close()
    with serving_here({"a": policy}) as (_, port, _), pytest.raises(InvalidStatus, match="404"):
        connection_to(port, "b")


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["bundles={a: X, a: Y}"], "bundles: a is named twice"),
        (["bundles={a: X, b: {c: 1, c: 2}}"], "bundles: c is named twice"),
        (["bundles={metrics: X}"], "bundles={'metrics': 'X'} must be 1 to 64 policies by name, {a: DIR, b: DIR}"),
        (["bundles={a/b: X}"], "must be 1 to 64 policies by name"),
        (["bundles={}"], "must be 1 to 64 policies by name"),
        (["bundles=[X]"], "expected 1 to 64 policies by name"),
        (["bundles={a: X}", "bundle=X"], "bundle= and bundles= are both given: give one bundle, or several by name"),
        ([], "bundle is required: action-diffusion serve bundle=…, or bundles={a: DIR, b: DIR}"),
        (["bundles={a: X}"], "no bundle at X"),
        (["bundle=X", "max_batch=0"], "max_batch=0 must be at least 1"),
        (["bundle=X", "batch_wait_ms=1e9"], "batch_wait_ms=1000000000.0 must be at most 1,000"),
    ],
)
def test_what_is_wrong_with_the_bundles_is_said_in_one_line(capsys, words, line):
    assert cli.main(["serve", *words]) == 2
    said = capsys.readouterr().err
    assert line in said
    assert len(said.splitlines()) == 1


def test_a_section_names_nothing_twice():
    with pytest.raises(InputError, match=r"task\.observations: a is named twice"):
        load("train", ["task=custom", "data=X", "task.observations={a: {source: x}, a: {source: y}}"])


def test_each_number_of_questions_is_compiled_on_its_own():
    assert settings("serve", ["bundle=X"]).batch_of == 8
    assert settings("serve", ["bundle=X", "compile=true"]).batch_of == 1
    assert settings("serve", ["bundle=X", "compile=true", "max_batch=4"]).batch_of == 4


def test_what_to_install_is_said_where_the_metrics_library_is_missing(folder, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    assert cli.main(["serve", f"bundle={folder}", "device=cpu", "port=0"]) == 2
    said = capsys.readouterr().err
    assert said == "error: prometheus_client is not installed: pip install 'action-diffusion[serve]'\n"


# Metrics and readiness.


def get(port: int, path: str, token: str | None = None) -> str:
    request = urllib.request.Request(f"http://127.0.0.1:{port}/{path}")
    if token:
        request.add_header("Authorization", f"Api-Key {token}")
    with urllib.request.urlopen(request, timeout=10) as answer:
        assert answer.headers["Content-Type"].startswith("text/plain")
        return str(answer.read().decode())


def metric(server: Any, name: str, **labels: str) -> float:
    """Of what GET /metrics answers."""
    written = ",".join(f'{key}="{value}"' for key, value in {"bundle": "default", **labels}.items())
    found = re.search(rf"^action_diffusion_{name}{{{re.escape(written)}}} (\S+)$", server.metrics.text().decode(), re.M)
    assert found is not None, name
    return float(found[1])


def test_metrics_are_of_each_bundle(policy, other):
    failing: Any = Failing(policy)
    with serving_here({"a": failing, "b": other}, token=TOKEN, say=lambda line: None) as (server, port, _):
        headers = {"Authorization": f"Api-Key {TOKEN}"}
        options: dict[str, Any] = {"compression": None, "proxy": None, "additional_headers": headers}
        with (
            connect(f"ws://127.0.0.1:{port}/a", **options) as one,
            connect(f"ws://127.0.0.1:{port}/b", **options) as two,
        ):
            one.recv(), two.recv()
            for state in (np.zeros(5), np.zeros(5), np.full(5, 2000.0), np.zeros(4)):
                ask(one, {"state": state.astype(np.float32)})
            ask(two, {"state": states(1)[0]})
            assert [metric(server, "connections", bundle=name) for name in "ab"] == [1, 1]
            with pytest.raises(urllib.error.HTTPError, match="401"):
                get(port, "metrics")
            text = get(port, "metrics", TOKEN)
        assert "# TYPE action_diffusion_latency_seconds histogram" in text
        counts = {"requests_total": 4, "latency_seconds_count": 2, "batch_size_sum": 3, "queue": 0}
        for name, count in counts.items():
            assert f'action_diffusion_{name}{{bundle="a"}} {float(count)}' in text
        assert metric(server, "errors_total", bundle="a", kind="failed") == 1
        assert metric(server, "errors_total", bundle="a", kind="refused") == 1
        assert metric(server, "requests_total", bundle="b") == 1
        until(lambda: metric(server, "connections", bundle="a") == 0)


def test_a_server_that_is_full_or_stuck_is_alive_and_not_ready(policy, monkeypatch):
    watched = Watched(policy)
    with serving_here(watched, max_connections=2) as (_, port, _):
        assert get(port, "readyz") == get(port, "healthz") == "OK\n"
        one, two = connection_to(port), connection_to(port)
        with pytest.raises(urllib.error.HTTPError, match="503"):
            get(port, "readyz")
        two.close()
        until(lambda: ready(port))
        monkeypatch.setattr("action_diffusion.deploy.serve.server.STUCK_SECONDS", 0.1)
        watched.free.clear()
        one.send(wire.pack({"state": states(1)[0]}))
        until(lambda: not ready(port))
        assert get(port, "healthz") == "OK\n"
        watched.free.set()
        one.recv(timeout=20)
        until(lambda: ready(port))
        one.close()


def ready(port: int) -> bool:
    try:
        return get(port, "readyz") == "OK\n"
    except urllib.error.HTTPError:
        return False


# Replacement.


def replace(server: Server, said: str) -> str:
    """Ask for it; gives the line that says `said` and was not there before."""
    before = len(server.lines)
    os.kill(server.process.pid, signal.SIGUSR1)
    found = until(lambda: [line for line in server.lines[before:] if said in line])
    return str(found[0])


@pytest.mark.slow
def test_a_bundle_is_replaced_in_the_midst_of_an_episode(folder):
    """History and noise go on, by the new weights; bundles that clients could not go on with are refused."""
    old = bundles.load(folder, precision="fp32")
    given = states(5)
    with serving({"push": folder, "other": folder.parent / ".bundle-1"}, "max_batch=2", "copies=2") as server:
        connection, url = connection_to(server.port, "push"), f"{server.url}/push"
        remote = RemotePolicy(url)
        said = [ask(connection, {"state": state})["actions"] for state in given[:2]]
        assert replace(server, "push: ").endswith(f"  push: {folder} has not changed")
        save_verified(folder, 2)
        new = bundles.load(folder, precision="fp32")
        replace(server, "has taken its place")
        said += [ask(connection, {"state": given[2]})["actions"]]
        assert np.array_equal(said, expected([old, old, new], given[:3]))
        assert not np.allclose(said[2], expected([old] * 3, given[:3])[2], atol=1.0)

        (folder / "model.safetensors").write_bytes((folder.parent / ".bundle-1" / "model.safetensors").read_bytes())
        line = replace(server, "the golden input gives a chunk that differs by")
        assert line.startswith(f"push: {folder} is not taken, the bundle before it goes on: {folder}: the golden")
        save_verified(folder, 2, control_rate=20.0)
        assert replace(server, "is not taken").endswith("it is for other robots: control_rate is 20.0, not 10.0")
        shutil.rmtree(folder)
        assert "no bundle at" in replace(server, "is not taken")

        said += [ask(connection, {"state": state})["actions"] for state in given[3:]]
        assert np.array_equal(said, expected([old, old, new, new, new], given))
        obs = {"state": states(TO)[None]}
        theirs, ours = (each.predict(obs, **noises())["action_pred"] for each in (remote, new))
        assert np.array_equal(theirs, ours)
        again = RemotePolicy(url)
        assert (again.spec, remote.spec) == (new.spec, old.spec)
        text = get(server.port, "metrics")
        assert 'action_diffusion_replacements_total{bundle="push",kind="taken"} 1.0' in text
        assert 'action_diffusion_replacements_total{bundle="push",kind="refused"} 3.0' in text
        remote.close(), again.close(), connection.close()


def test_no_question_is_lost_while_a_bundle_is_replaced(policy, other, folder):
    """Under clients that ask without pause, of this bundle and of another."""
    new = bundles.load(folder)
    counts: list[int] = []
    over = threading.Event()
    with serving_here({"a": policy, "b": other}) as (server, port, loop):

        def robot(name: str) -> None:
            client = connection_to(port, name)
            n = 0
            while not over.is_set():
                assert "actions" in ask(client, {"state": states(1)[0]})
                n += 1
            client.close()
            counts.append(n)

        threads = [threading.Thread(target=robot, args=(name,)) for name in "aab"]
        for thread in threads:
            thread.start()
        for one in (new, policy, new):
            asyncio.run_coroutine_threadsafe(server.replace("a", [one]), loop).result(20)
        over.set()
        for thread in threads:
            thread.join(20)
        assert server.specs == {"a": new.spec, "b": other.spec}
    assert len(counts) == 3
    assert min(counts) > 0


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"control_rate": 5.0}, "control_rate is 5.0, not 10.0"),
        ({"horizon": 16}, "horizon is 16, not 8"),
        ({"n_action_steps": 2}, "n_action_steps is 2, not 4"),
        ({"observations": {"place": ObservationSpec(shape=(5,))}}, "observation state, shape is none, not (5,)"),
        (
            {"observations": {"state": ObservationSpec(shape=(5,), unit="m")}},
            "observation state, unit is m, not none",
        ),
        ({"action": ActionSpec(shape=(2,), unit="m")}, "action, unit is m, not px"),
        ({"action": ActionSpec(shape=(3,), unit="px")}, "action, shape is (3,), not (2,)"),
    ],
)
def test_a_bundle_for_other_robots_cannot_take_the_place_of_one(policy, changes, line):
    new: Any = dataclasses.make_dataclass("New", ["spec"])(dataclasses.replace(policy.spec, **changes))
    with pytest.raises(InputError, match=re.escape(f"it is for other robots: {line}")):
        check_replacement(policy, new)


def test_statistics_and_where_the_data_lay_may_differ(policy):
    moved = {"state": dataclasses.replace(policy.spec.observations["state"], source="elsewhere")}
    spec = dataclasses.replace(policy.spec, observations=moved, task="new", versions={"torch": "9"}, normalizer={})
    assert policy.spec.difference(spec) == ""


def test_what_extensions_say_stays(policy, tmp_path):
    """A client may act on it (`guard.action`)."""
    path = save_bundle(tmp_path / "bundle")
    add_guard(path)
    guarded = bundles.load(path, extensions=["guard"], precision="fp32")
    with serving_here(guarded, max_batch=1) as (server, _, loop):
        waiting = asyncio.run_coroutine_threadsafe(server.replace("default", [policy]), loop)
        with pytest.raises(InputError, match=r"it says action, action_pred, and clients may need .*guard\.level"):
            waiting.result(20)


# Two servers behind a proxy.


@pytest.mark.slow
@pytest.mark.alone
@needs_haproxy
def test_robots_of_a_server_that_dies_are_served_by_the_other(folder):
    """Within a second, on a machine that is not busy: `benchmarks.robustness.fleet`. Here they have ten."""
    lines: list[str] = []
    over = threading.Event()
    with serving(folder) as first, serving(folder) as second, fleet.proxied((first.port, second.port)) as port:
        url = f"ws://127.0.0.1:{port}"
        robots = [fleet.FleetRobot(RemotePolicy(url, say=lines.append), 4.0, 0.06 * i) for i in range(4)]
        local = robots[0].remote.predict({"state": states(TO)[None]}, **noises())["action_pred"]
        threads = [threading.Thread(target=robot.run, args=(over,)) for robot in robots]
        for thread in threads:
            thread.start()
        until(lambda: all(robot.answers for robot in robots))
        killed = time.monotonic()
        first.process.kill()
        until(lambda: all(robot.outage(killed) < 10 for robot in robots))
        over.set()
        for thread in threads:
            thread.join()
        again = [robot.remote.predict({"state": states(TO)[None]}, **noises())["action_pred"] for robot in robots]
        for robot in robots:
            robot.remote.close()
    assert all(np.array_equal(chunk, local) for chunk in again)
    assert sorted(line.split()[0] for line in lines) == ["connected"] * 2 + ["lost"] * 2  # it had half of them


def test_the_proxy_of_the_documentation_is_the_one_that_was_tried():
    assert fleet.PROXY in (Path(__file__).parents[2] / "docs" / "fleet.md").read_text()


def test_the_load_of_the_benchmark_counts_every_answer(policy):
    with serving_here(policy, max_connections=3) as (server, port, _):
        took = asyncio.run(fleet.load(f"ws://127.0.0.1:{port}", policy.spec, 3, rate=20.0, seconds=0.5))
        assert len(took) == 30
        assert metric(server, "requests_total") == 30


def test_the_benchmark_refuses_what_it_cannot_measure(capsys):
    for words in (["clients=0"], ["rate=0"], ["bundle=nowhere"], ["robots=x"], ["x=1"]):
        assert fleet.main(words) == 2
        assert len(capsys.readouterr().err.splitlines()) == 1


@needs_openpi
def test_openpis_client_asks_for_a_policy_by_its_path(policy, other, tmp_path):
    np.savez(tmp_path / "given.npz", state=states(3))
    script = Path(__file__).parents[1] / "peers" / "openpi_peer.py"
    with serving_here({"a": other, "b": policy}, seed=7) as (_, port, _):
        command = [PEER, script, f"ws://127.0.0.1:{port}/b", tmp_path / "given.npz", tmp_path / "out.npz", "plain"]
        env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
        subprocess.run([str(word) for word in command], env=env, check=True, timeout=60)
    with np.load(tmp_path / "out.npz") as said:
        assert np.array_equal(said["actions"], expected([policy] * 3, states(3)))
