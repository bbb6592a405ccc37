"""The policy server: with openpi's own client, with bad clients, and with several at once."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from importlib import import_module
from importlib.machinery import ModuleSpec
from importlib.util import module_from_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgpack
import numpy as np
import pytest
from deployments import HORIZON, TA, TO, save_bundle, save_image_bundle
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from servers import Server, ask, connection_to, serving, serving_here, states
from websockets.exceptions import ConnectionClosed, InvalidStatus

from action_diffusion import cli
from action_diffusion.deploy.serve import command as serve
from action_diffusion.deploy.serve import wire
from action_diffusion.deploy.serve.access import is_loopback, read_token
from action_diffusion.deploy.serve.command import ServerStatistics
from action_diffusion.deploy.serve.session import EXTRAS, ClientSession
from action_diffusion.envs.rollout import generators
from action_diffusion.errors import InputError
from action_diffusion.files import cache_folder
from action_diffusion.policy import bundle as bundles
from action_diffusion.policy.agent import Agent
from action_diffusion.policy.model.normalizer import fit
from action_diffusion.policy.policy import DiffusionPolicy
from action_diffusion.policy.spec import ActionSpec, ObservationSpec, PolicySpec

if "benchmarks" not in sys.modules:  # not a package that installs, and the root is not on the path
    package = ModuleSpec("benchmarks", None, is_package=True)
    package.submodule_search_locations = [str(Path(__file__).resolve().parents[2] / "benchmarks")]
    sys.modules["benchmarks"] = module_from_spec(package)

TOKEN = "a-token-of-more-than-16-characters"
PEER = cache_folder() / "peers" / "openpi-client" / "bin" / "python"
SPEC = PolicySpec(
    observations={"state": ObservationSpec(shape=(5,), source="state")},
    action=ActionSpec(shape=(2,)),
    n_obs_steps=TO,
    horizon=HORIZON,
    n_action_steps=TA,
    control_rate=10.0,
)
needs_openpi = pytest.mark.skipif(
    not PEER.exists(),
    reason=f"no openpi-client: python3 -m venv {PEER.parents[1]} && {PEER} -m pip install -r tests/peers/openpi.txt",
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
    return bundles.load(bundle, precision="fp32")  # as `serve` does


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


def openpi(server: Server, tmp_path: Path, how: str = "plain", token: str | None = None, **given: Any) -> Any:
    """What openpi's client gets for observations by key, [n, …] each."""
    np.savez(tmp_path / "given.npz", **given)
    script = Path(__file__).parents[1].joinpath("peers", "openpi_peer.py")
    command = [str(PEER), str(script), server.url, str(tmp_path / "given.npz"), str(tmp_path / "out.npz"), how]
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    env |= {"OPENPI_API_KEY": token} if token else {}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    with np.load(tmp_path / "out.npz") as file:
        return dict(file)


@pytest.mark.slow
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
    assert all(row["prev_total_ms"] >= 0 for row in timing[1:])


@needs_openpi
def test_openpis_broker_executes_chunk_after_chunk(server, policy, tmp_path):
    given = states(2 * TA)
    got = openpi(server, tmp_path, "broker", state=given)
    assert np.array_equal(got["actions"], expected(policy, given[::TA]).reshape(-1, 2))


@pytest.mark.slow
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


@pytest.mark.slow
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


# Histories.


def test_each_connection_is_an_episode_with_a_history_of_its_own(server, policy):
    """Two clients in turn get what each would get alone; so does a third that comes after them."""
    first, second = states(4, seed=1), states(4, seed=2)
    with server.connect() as one, server.connect() as two:
        one.recv(), two.recv()
        both = [(ask(one, {"state": a}), ask(two, {"state": b})) for a, b in zip(first, second, strict=True)]
    assert np.array_equal(np.stack([answer["actions"] for answer, _ in both]), expected(policy, first))
    assert np.array_equal(np.stack([answer["actions"] for _, answer in both]), expected(policy, second))
    with server.connect() as three:
        three.recv()
        assert np.array_equal(ask(three, {"state": first[0]})["actions"], expected(policy, first[:1])[0])


@pytest.mark.slow
def test_without_remembering_each_observation_is_a_history_of_its_own(bundle, policy):
    given = states(3)
    noise_generator, generator = generators(7)
    alone = [
        policy.predict({"state": np.stack([row, row])[None]}, noise_generator=[noise_generator], generator=[generator])[
            "action"
        ][0]
        for row in given
    ]
    with serving(bundle, "remember=false") as server, server.connect() as connection:
        connection.recv()
        assert np.array_equal([ask(connection, {"state": row})["actions"] for row in given], alone)


def test_reset_begins_a_new_episode_on_the_same_connection(server, policy):
    given = states(4)
    with server.connect() as connection:
        connection.recv()
        answers = [
            ask(connection, {"state": row, wire.EXTRA: {"reset": i == 2}})["actions"] for i, row in enumerate(given)
        ]
    again = np.concatenate([expected(policy, given[:2]), expected(policy, given[2:])])
    assert np.array_equal(np.stack(answers), again)


def test_a_whole_history_is_not_remembered(server, policy):
    given = states(3)
    with server.connect() as connection:
        connection.recv()
        ask(connection, {"state": given[0]})
        answer = ask(connection, {"state": states(2, seed=9), wire.EXTRA: {"history": True, "noise": np.zeros((8, 2))}})
        assert answer["action_pred"].shape == (HORIZON, 2)
        assert np.array_equal(answer["actions"], answer["action_pred"][TO - 1 : TO - 1 + TA])
        assert np.array_equal(ask(connection, {"state": given[1]})["actions"], expected(policy, given[:2])[1])


# Messages that are wrong.

GOOD = states(1)[0]
PLAIN = {b"__ndarray__": True, b"data": GOOD.tobytes(), b"dtype": "<f4", b"shape": [5]}
WRONG = [
    (b"", "cannot be read as msgpack"),
    (b"\xc1", "cannot be read as msgpack"),
    (b"garbage " * 9, "cannot be read as msgpack"),
    (b"\x91" * 100_000, "cannot be read as msgpack"),
    (b"\x91" * 900, "cannot be read as msgpack"),
    (b"\x81\xa5state" * 500 + b"\xc0", "observation 'state' is a dict of length 1, not a numpy array"),
    (b"\x81\xa5state" * 990 + b"\xc0", "observation 'state' is a dict of length 1, not a numpy array"),
    (b"\x81\xa5state" * 3000 + b"\xc0", "cannot be read as msgpack"),
    (b"\xdd\xff\xff\xff\xff", "cannot be read as msgpack"),
    (b"\xdc\x0f\xff" + b"\x90" * 0xFFF, "more than 1000 maps and lists"),
    (msgpack.packb([1, 2]), "not a map"),
    (msgpack.packb({1: 2}), "cannot be read as msgpack"),
    (msgpack.packb({"state": 1}) + b"\x00", "cannot be read as msgpack"),
    ("text", "the message is text"),
    ({}, "observation 'state' is missing: the policy takes state; got nothing"),
    ({"stat": GOOD}, "observation 'state' is missing: the policy takes state; got stat"),
    ({"state": 10**15}, "is 1000000000000000, not a numpy array"),
    ({"state": [1.0] * 5}, "not a numpy array"),
    ({"state": "x" * 1000}, "not a numpy array"),
    ({"state": msgpack.ExtType(5, b"x")}, "not a numpy array"),
    ({"state": GOOD[:4]}, "observation 'state' has shape [4], the policy takes [5]"),
    ({"state": states(TO)}, "has shape [2, 5], the policy takes [5]"),
    ({"state": np.full(5, np.nan)}, "observation 'state' holds NaN or infinite values"),
    ({"state": np.full(5, 1e300)}, "observation 'state' holds NaN or infinite values"),
    ({"state": PLAIN | {b"dtype": "|O"}}, "has dtype |O"),
    ({"state": PLAIN | {b"dtype": "<c8"}}, "has dtype <c8"),
    ({"state": PLAIN | {b"dtype": "<U5"}}, "has dtype <U5"),
    ({"state": PLAIN | {b"dtype": [["a", "<f4"]]}}, "has dtype a list of length 1"),
    ({"state": PLAIN | {b"shape": [2**60, 2**60]}}, "bytes, not 20 bytes"),
    ({"state": PLAIN | {b"shape": [2**63, 2**63, 2**63, 2**63]}}, "a number of over 40 digits bytes"),
    ({"state": PLAIN | {b"shape": [-5]}}, "shape [-5], which is none"),
    ({"state": PLAIN | {b"shape": [0, 2**62]}}, "which is none"),
    ({"state": PLAIN | {b"shape": [True] * 5}}, "which is none"),
    ({"state": PLAIN | {b"shape": [5, *[1] * 40]}}, "which is none"),
    ({"state": PLAIN | {b"shape": None}}, "shape None, which is none"),
    ({"state": PLAIN | {b"data": "text"}}, "need 20 bytes, not text"),
    ({"state": PLAIN | {b"data": b"x" * 19}}, "need 20 bytes, not 19 bytes"),
    ({"state": GOOD, wire.EXTRA: 3}, "action_diffusion is 3, not a map"),
    ({"state": GOOD, wire.EXTRA: {"rest": True}}, "unknown entry of action_diffusion 'rest': did you mean reset?"),
    ({"state": GOOD, wire.EXTRA: {"reset": 1}}, "reset is 1, not true or false"),
    ({"state": GOOD, wire.EXTRA: {"noise": np.zeros((7, 2))}}, "noise has shape [7, 2], not [8, 2]"),
    ({"state": GOOD, wire.EXTRA: {"noise": np.full((8, 2), np.inf)}}, "noise holds NaN"),
    ({"state": GOOD, wire.EXTRA: {"generator": np.zeros(9, np.uint8)}}, "generator is not the state of a torch"),
    ({"state": GOOD, wire.EXTRA: {"generator": np.zeros(5056, np.uint8)}}, "generator is not the state of a torch"),
    ({"state": GOOD, wire.EXTRA: {"generator": np.zeros((8, 632))}}, "generator is not the state of a torch"),
    ({"state": GOOD, wire.EXTRA: {"running": np.zeros((9, 2))}}, "running has shape [9, 2]"),
    ({"state": GOOD, wire.EXTRA: {"running": np.zeros(2)}}, "running has shape [2]"),
    ({"state": GOOD, wire.EXTRA: {"delay": 1.5}}, "delay is 1.5"),
    ({"state": GOOD, wire.EXTRA: {"delay": 2**31}}, "delay is 2147483648, not a whole number from 0 to 8"),
    ({"state": GOOD, wire.EXTRA: {"delay": -1}}, "delay is -1, not a whole number from 0 to 8"),
    ({"state": GOOD, wire.EXTRA: {"guidance": {"beta": float("inf")}}}, "guidance beta is inf, not a number above 0"),
    ({"state": GOOD, wire.EXTRA: {"guidance": {"beta": 1e300}}}, "guidance beta is 1e+300, not a number above 0"),
    ({"state": GOOD, wire.EXTRA: {"guidance": {"beta": 2**64 - 1}}}, "guidance beta is 18446744073709551615"),
    ({"state": GOOD, wire.EXTRA: {"guidance": {"overlap": 2**31}}}, "guidance overlap is 2147483648"),
    ({"state": GOOD, wire.EXTRA: {"guidance": {"rounds": -1}}}, "guidance rounds is -1"),
    ({"state": GOOD, wire.EXTRA: {"guidance": {"method": "x" * 10**6}}}, "unknown rtc.method 'xxx"),
    ({"state": GOOD, wire.EXTRA: {"guidance": {"mask": "x" * 10**6}}}, "unknown rtc.mask 'xxx"),
    ({"state": GOOD, wire.EXTRA: {"guidance": {"x" * 10**6: 1}}}, "unknown entry of guidance 'xxx"),
    ({"state": GOOD, wire.EXTRA: {"x" * 10**6: 1}}, "unknown entry of action_diffusion 'xxx"),
    ({"x" * 10**6: GOOD}, "got xxx"),
    ({"state": GOOD, wire.EXTRA: {"guidance": {"mask": "soft"}}}, "unknown rtc.mask 'soft'"),
    ({"state": GOOD, wire.EXTRA: {"guidance": {"beta": "5"}}}, "guidance beta is 5"),
    ({"state": GOOD, wire.EXTRA: {"guidance": {"betta": 5}}}, "unknown entry of guidance 'betta'"),
]


def test_what_is_wrong_with_a_message_is_said_and_the_connection_goes_on(server, policy):
    """And nothing of it is remembered, not even where only the extra was wrong."""
    given = states(2)
    with server.connect() as connection:
        connection.recv()
        assert np.array_equal(ask(connection, {"state": given[0]})["actions"], expected(policy, given)[0])
        for message, line in WRONG:
            answer = ask(connection, message)
            assert isinstance(answer, str), line
            assert answer.startswith("refused: "), answer
            assert line in answer
            assert "\n" not in answer
            assert len(answer) < 400
        assert np.array_equal(ask(connection, {"state": given[1]})["actions"], expected(policy, given)[1])


def test_what_the_policy_does_not_take_is_left_alone(server, policy):
    """Prompts, other cameras, arrays of any kind: they are for other policies."""
    others = {"prompt": "x", "wrist": np.zeros((9, 9, 3), np.uint8), "deep": {"a": [{"b": 1}]}, b"bytes": 1}
    with server.connect() as connection:
        connection.recv()
        answer = ask(connection, {"state": GOOD, **others, "object": PLAIN | {b"dtype": "|O"}})
    assert np.array_equal(answer["actions"], expected(policy, GOOD[None])[0])


def encoded() -> st.SearchStrategy[Any]:
    """Nearly arrays."""
    return st.fixed_dictionaries(
        {},
        optional={
            b"__ndarray__": st.booleans(),
            b"data": st.one_of(st.binary(max_size=60), st.just(GOOD.tobytes()), st.integers(0, 9)),
            b"dtype": st.sampled_from([*wire.DTYPES, "|O", "<c16", "<M8[s]", "V8", "", ">f4"]) | st.text(max_size=5),
            b"shape": st.lists(st.integers(-3, 2**63), max_size=10) | st.just([5]) | st.integers(0, 9),
        },
    )


def anything() -> st.SearchStrategy[Any]:
    leaves = st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.text() | st.binary()
    keys = st.text(max_size=8) | st.binary(max_size=8)
    return st.recursive(leaves | encoded(), lambda inner: st.lists(inner) | st.dictionaries(keys, inner), max_leaves=20)


def messages() -> st.SearchStrategy[bytes]:
    extras = st.dictionaries(st.sampled_from(EXTRAS) | st.text(max_size=4), anything(), max_size=4)
    whole = st.fixed_dictionaries({"state": encoded() | st.just(PLAIN) | anything()}, optional={wire.EXTRA: extras})
    packed = (whole | anything()).map(msgpack.packb)
    torn = st.tuples(packed, st.integers(0, 80), st.binary(max_size=4)).map(lambda t: t[0][: t[1]] + t[2])
    return packed | torn | st.binary(max_size=200)


@pytest.mark.slow
@settings(deadline=None, max_examples=300, suppress_health_check=[HealthCheck.too_slow])
@given(messages())
def test_no_message_is_anything_but_a_question_or_refused(data):
    session = ClientSession(spec=SPEC)
    try:
        question = session.take(wire.unpack(data))
    except InputError:
        return
    assert question.obs["state"].shape == (1, TO, 5)
    assert question.obs["state"].dtype == np.float32
    assert np.isfinite(question.obs["state"]).all()


def test_garbage_on_the_wire_costs_the_server_nothing(server, policy):
    """Fuzzed bytes through a real connection; afterwards it answers as before."""
    random = np.random.default_rng(0)
    good = wire.pack({"state": GOOD})
    with server.connect() as connection:
        connection.recv()
        for _ in range(200):
            broken = bytearray(good)
            for place in random.integers(0, len(good), random.integers(1, 4)):
                broken[place] = random.integers(256)
            ask(connection, bytes(broken))
    for _ in range(20):
        with socket.create_connection(("127.0.0.1", server.port)) as raw:
            raw.sendall(random.integers(0, 256, 300).astype(np.uint8).tobytes())
    assert health(server) == "OK\n"
    with server.connect() as connection:
        connection.recv()
        assert np.array_equal(ask(connection, {"state": GOOD})["actions"], expected(policy, GOOD[None])[0])


# Limits.


@pytest.mark.slow
def test_a_message_that_is_too_large_ends_its_connection_alone(bundle):
    with serving(bundle, "max_message_mb=0.1") as server, server.connect() as other:
        other.recv()
        with server.connect() as connection:
            connection.recv()
            with pytest.raises(ConnectionClosed, match="1009"):
                ask(connection, {"state": GOOD, "image": np.zeros(200_000, np.uint8)})
        assert ask(other, {"state": GOOD})["actions"].shape == (TA, 2)


@pytest.mark.slow
def test_more_connections_than_allowed_are_turned_away_until_one_ends(bundle):
    with serving(bundle, "max_connections=2") as server:
        connections = [server.connect(), server.connect()]
        for connection in connections:
            connection.recv()
        with pytest.raises(InvalidStatus, match="503"):
            server.connect()
        connections[0].close()
        with server.connect() as connection:
            connection.recv()
            assert ask(connection, {"state": GOOD})["actions"].shape == (TA, 2)
        connections[1].close()


def test_web_pages_are_turned_away(server):
    """Any page in a browser on this machine could connect to it otherwise."""
    with pytest.raises(InvalidStatus, match="403"):
        server.connect(origin="http://evil.example")


@pytest.mark.parametrize("site", ["cross-site", "same-site", "same-origin"])
def test_web_pages_that_name_no_origin_are_turned_away(server, site):
    with pytest.raises(InvalidStatus, match="403"):
        server.connect(additional_headers={"Sec-Fetch-Site": site})


def test_health_and_other_paths(server):
    assert health(server) == "OK\n"
    with pytest.raises(urllib.error.HTTPError, match="426"):
        urllib.request.urlopen(f"http://127.0.0.1:{server.port}/", timeout=10)


# In a thread of this process, with policies that are slow or fail.


class Slow:
    """Takes 50 ms for an answer, and fails for states above 1000; counts."""

    def __init__(self) -> None:
        self.spec = SPEC
        self.calls = 0

    def predict(self, obs: dict[str, np.ndarray], **_: Any) -> dict[str, np.ndarray]:
        self.calls += 1
        n = len(obs["state"])
        time.sleep(0.05)
        if obs["state"].max() > 2000:
            return {"action": np.full((n, TA, 2), np.nan), "action_pred": np.full((n, HORIZON, 2), np.nan)}
        if obs["state"].max() > 1000:
            raise RuntimeError("out of memory\nand more")
        return {"action": np.zeros((n, TA, 2), np.float32), "action_pred": np.zeros((n, HORIZON, 2), np.float32)}


@pytest.mark.slow
@pytest.mark.alone
def test_clients_take_turns_and_one_that_floods_waits_for_its_own(policy):
    """A client that sends fifty questions at once does not hold up one that asks properly."""
    with serving_here(Slow()) as (_, port, _):
        greedy, polite, silent = (connection_to(port) for _ in range(3))
        for _ in range(50):
            greedy.send(wire.pack({"state": GOOD}))
        took = []
        for _ in range(5):
            began = time.monotonic()
            ask(polite, {"state": GOOD})
            took.append(time.monotonic() - began)
        assert max(took) < 0.5
        for connection in (greedy, polite, silent):
            connection.socket.close()


def test_what_a_client_asked_before_it_left_is_not_computed():
    slow = Slow()
    with serving_here(slow) as (_, port, _):
        busy = connection_to(port)
        busy.send(wire.pack({"state": GOOD}))
        for _ in range(5):
            connection = connection_to(port)
            connection.send(wire.pack({"state": GOOD}))
            connection.close()
        busy.recv()
        time.sleep(0.2)
        busy.close()
    assert slow.calls <= 4


def test_a_policy_that_fails_is_one_line_to_its_client_and_nothing_to_the_others():
    said: list[str] = []
    turned_down: list[str] = []
    with serving_here(Slow(), say=said.append, turned_down=turned_down.append) as (_, port, _):
        one, two = connection_to(port), connection_to(port)
        assert ask(one, {"state": GOOD + 1000}) == "failed: RuntimeError: out of memory and more"
        assert ask(two, {"state": GOOD})["actions"].shape == (TA, 2)
        assert (
            ask(two, {"state": GOOD + 2000}) == "failed: FloatingPointError: the predicted chunk holds NaN or infinity"
        )
        assert ask(one, {"state": GOOD, wire.EXTRA: {"reset": True}})["actions"].shape == (TA, 2)
        one.close(), two.close()
    assert len(said) == len(turned_down) == 2


@pytest.mark.slow
def test_what_is_added_on_the_way_is_measured(bundle, tmp_path, capsys):
    """The benchmark, on a tiny policy."""
    main = import_module("benchmarks.speed.serving").main
    assert main([f"bundle={bundle}", "n=3", f"output={tmp_path / 'rows.json'}"]) == 0
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert [row["client"] for row in rows] == ["openpi", "RemotePolicy"]
    assert all(0 < row["added_ms"]["median"] <= row["total_ms"]["p95"] for row in rows)
    assert main(["n=x"]) == 2


def test_the_line_of_statistics():
    statistics = ServerStatistics()
    assert statistics.line(1) == "1 connection, 0 chunks"
    for ms in range(1, 101):
        statistics.answered(ms / 1e3)
    statistics.turned_down("refused: …")
    line = "2 connections, 100 chunks, inference 50.5 ms median, 95.0 ms 95 %, 1 messages refused"
    assert statistics.line(2).replace("95.1", "95.0") == line
    statistics.reset()
    assert statistics.line(0) == "0 connections, 0 chunks"


@pytest.mark.slow
def test_a_line_a_minute(monkeypatch, capsys):
    monkeypatch.setattr(serve, "STATUS_SECONDS", 0.01)
    monkeypatch.setattr(serve, "LINE_SECONDS", 0.05)
    statistics = ServerStatistics()
    statistics.answered(0.02)

    async def watch() -> None:
        server: Any = SimpleNamespace(n_connections=3)
        reporting = asyncio.create_task(serve._report(statistics, server))
        await asyncio.sleep(0.5)
        reporting.cancel()

    asyncio.run(watch())
    lines = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"\d\d:\d\d:\d\d  3 connections, 1 chunks, inference 20\.0 ms median, 20\.0 ms 95 %", lines[0])
    assert lines[1].endswith("3 connections, 0 chunks")


# The command.


@pytest.mark.slow
@pytest.mark.parametrize(("how", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 0)])
def test_ctrl_c_and_termination_end_it_cleanly_with_clients_there(bundle, how, code):
    with serving(bundle) as server, server.connect() as connection:
        connection.recv()
        ask(connection, {"state": GOOD})
        server.process.send_signal(how)
        with pytest.raises(ConnectionClosed, match="1001"):
            connection.recv(timeout=10)
        assert server.process.wait(10) == code
        server._reader.join(5)
        assert "Traceback" not in "\n".join(server.lines)
        assert "stopped" in server.lines


@pytest.mark.slow
def test_what_is_wrong_with_the_address_is_said_in_one_line(bundle, server, capsys, monkeypatch):
    monkeypatch.delenv("ACTION_DIFFUSION_TOKEN", raising=False)
    for words, line in (
        ([f"port={server.port}"], f"cannot listen at host=127.0.0.1 port={server.port}: the port is in use"),
        (["host=0.0.0.0"], "host=0.0.0.0 lets other machines in: give token_file=PATH, or set ACTION_DIFFUSION_TOKEN"),
        (["host=::"], "host=:: lets other machines in"),
        (["max_message_mb=0.001"], "max_message_mb=0.001 is too little: a history takes 0.004"),
    ):
        assert cli.main(["serve", f"bundle={bundle}", "device=cpu", *words]) == 2
        err = capsys.readouterr().err
        assert line in err
        assert len(err.splitlines()) == 1


@pytest.mark.parametrize("token", ["short", "ünicode-of-more-than-16", "a token\nof two lines, long"])
def test_a_token_that_is_none_is_refused_and_not_repeated(tmp_path, monkeypatch, token):
    (tmp_path / "token").write_text(token)
    monkeypatch.setenv("ACTION_DIFFUSION_TOKEN", token)
    for file in (str(tmp_path / "token"), None):
        with pytest.raises(InputError, match="holds no token of at least 16") as refusal:
            read_token(file)
        assert token not in str(refusal.value)


def test_which_hosts_are_this_machine():
    assert all(is_loopback(host) for host in ("localhost", "127.0.0.1", "127.8.8.8", "::1"))
    assert not any(is_loopback(host) for host in ("", "0.0.0.0", "::", "192.168.1.2", "localhost.evil.example", "x"))


@pytest.mark.slow
def test_what_to_install_is_said_where_the_extra_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "msgpack", None)
    with pytest.raises(InputError, match=r"msgpack is not installed: pip install 'action-diffusion\[serve\]'"):
        wire.pack({})
