"""The operator's page, in a real browser: what it shows, what its buttons do, and that nothing depends on it."""

from __future__ import annotations

import contextlib
import dataclasses
import http.client
import json
import os
import re
import signal
import socket
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from deployments import Deployment, save_bundle, until
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import ClientConnection, connect

from action_diffusion import cli
from action_diffusion.datasets.storage.growing import read_table
from action_diffusion.datasets.storage.replay_buffer import ReplayBuffer
from action_diffusion.deploy.arm.link import ArmLink, ArmSetup
from action_diffusion.deploy.ipc.channels import EVENTS, Phase, text
from action_diffusion.deploy.ipc.rings import Moment, RingReader, RingWriter, Segments
from action_diffusion.deploy.loop.events import Seen, StepRecord
from action_diffusion.deploy.loop.operator import Order, Pointer
from action_diffusion.deploy.page.connections import PATIENCE
from action_diffusion.deploy.page.link import PageLink
from action_diffusion.deploy.page.view import RunView
from action_diffusion.deploy.records.stream import RunStream
from action_diffusion.deploy.robot.robots import Observation
from action_diffusion.deploy.sim.robots import board
from action_diffusion.errors import InputError
from action_diffusion.policy.spec import ActionSpec, ObservationSpec, PolicySpec
from benchmarks.robustness.faults import WITHIN, PersonAtPage, crowd, untrained
from benchmarks.robustness.kills import child_of


@pytest.fixture
def open_page(browser) -> Iterator[Callable[..., Any]]:
    """Opens an address; whatever the page says on its console counts as an error."""
    pages, errors = [], []

    def open_(url: str, *, width: int = 400, scheme: str = "light") -> Any:
        page = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme)
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.set_default_timeout(10_000)
        page.goto(url)
        pages.append(page)
        return page

    yield open_
    for page in pages:
        page.close()
    assert errors == []


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny policy that sees pictures, for long episodes."""
    return untrained(tmp_path_factory.mktemp("page") / "bundle")


@pytest.fixture
def deployment(bundle, tmp_path) -> Iterator[Callable[..., Deployment]]:
    started: list[Deployment] = []

    def start(*options: str) -> Deployment:
        started.append(Deployment(bundle, tmp_path / "run", *options))
        return started[-1]

    yield start
    for one in started:
        one.process.kill()
        one.process.wait()


@pytest.mark.slow
def test_an_operator_at_work(deployment, open_page, tmp_path, capsys):
    """Start, pause, take over by pointing, give back, mark; the record knows it all and replays."""
    run = deployment("wait=true", "scheduling=naive", "n_episodes=2")
    page = open_page(run.url, width=400)
    until(lambda: page.evaluate("document.getElementById('mode').textContent === 'paused'"), 10)
    assert page.evaluate("document.documentElement.scrollWidth") <= 400
    assert run.steps.count == 0
    assert "Pause: it is paused" in page.inner_text("#why")
    page.click("#start")
    until(lambda: run.steps.count > 12)
    until(lambda: page.evaluate("Number(document.getElementById('camera-image').dataset.planned) >= 2"), 10)
    until(lambda: page.evaluate("document.getElementById('timing').textContent.includes('inference')"), 10)
    colours = page.evaluate(
        "(() => { const c = document.getElementById('camera-image'); const d = c.getContext('2d')"
        ".getImageData(0, 0, c.width, c.height).data; return new Set(Array.from(d)).size; })()"
    )
    assert colours > 20  # a picture, not an empty canvas
    page.screenshot(path=os.environ.get("PAGE_SCREENSHOT", str(tmp_path / "page.png")), full_page=True)
    page.click("#pause")
    until(lambda: page.evaluate("document.getElementById('mode').textContent === 'paused'"), 10)
    count = run.steps.count
    time.sleep(0.5)
    assert run.steps.count == count
    assert run.phase is Phase.MOVING  # it rests, ready to go on
    page.click("#take_over")
    until(lambda: page.evaluate("document.getElementById('mode').textContent === 'you command'"), 10)
    box = page.locator("#camera-image").bounding_box()
    for index in range(25):
        page.mouse.move(box["x"] + box["width"] * (0.45 + 0.004 * index), box["y"] + box["height"] * 0.5)
        time.sleep(0.05)
    record = run.steps.latest()
    assert record.values["operator"]
    assert record.values["action"] == pytest.approx([0.546 * 512, 256], abs=12)
    page.click("#start")
    run.goes_on()
    page.click("#success")
    until(lambda: any("success" in line for line in run.lines))
    until(lambda: page.evaluate("document.getElementById('mode').textContent === 'paused'"), 10)  # the next one waits
    assert run.end() == 130
    until(lambda: page.evaluate("document.getElementById('mode').textContent === 'the run is over'"), 10)
    assert page.evaluate("document.getElementById('lost').hidden && document.getElementById('unreachable').hidden")
    path = tmp_path / "run" / "record.zarr"
    assert ReplayBuffer.open(path).n_episodes == 1
    steps = read_table(path, "steps")
    assert 10 <= steps["operator"].sum() <= 40
    assert read_table(path, "episodes")["mark"][0] == 1
    capsys.readouterr()
    assert cli.main(["deploy", f"replay={path}"]) == 0
    assert "bit for bit" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.alone
def test_the_emergency_stop(deployment, open_page):
    run = deployment("scheduling=naive", "n_episodes=5")
    page = open_page(run.url, width=1000, scheme="dark")
    until(lambda: run.steps.count > 5)
    page.evaluate(
        "document.getElementById('emergency').addEventListener('click', () => { window.at = Date.now(); }, true)"
    )
    seconds = [stopped_for(run, page) for _ in range(3)]
    assert 0 <= statistics.median(seconds) + 0.002 < 0.1  # the browser shares the cores with the arm and the policy


@pytest.mark.slow
def test_boxes_leave_a_part_of_the_action_to_the_policy(deployment, open_page):
    """They are there while a person commands, and the last one cannot be cleared."""
    run = deployment("scheduling=naive")
    page = open_page(run.url)
    until(lambda: run.steps.count > 5)
    assert page.is_hidden("#owned")
    page.click("#take_over")
    boxes = page.locator("#owned input")
    page.wait_for_selector("#owned", state="visible")
    assert [boxes.nth(index).is_checked() for index in range(boxes.count())] == [True, True]
    boxes.nth(1).click()
    until(lambda: int(run.steps.latest().values["owned"]) == 1)
    until(lambda: boxes.nth(0).is_disabled() and not boxes.nth(1).is_checked(), 10)
    boxes.nth(1).click()
    until(lambda: int(run.steps.latest().values["owned"]) == 3)


def stopped_for(run: Deployment, page: Any) -> float:
    """Seconds from a click on the emergency stop to the arm's; all stands still until it is cleared, then goes on."""
    events = RingReader(run.folder / "events")
    before, told = events.count, sum("clear it on the page" in line for line in run.lines)
    page.click("#emergency")
    until(lambda: events.count > before)
    event = events.last(events.count - before)[0]
    assert text(event.values["why"]) == "emergency stop"
    clicked = page.evaluate("window.at") / 1e3 - time.time() + time.monotonic()
    page.wait_for_selector("#stopped", state="visible")
    page.wait_for_selector("#confirmed:has-text('Stop confirmed: the arm began to stop within')")
    until(lambda: sum("clear it on the page" in line for line in run.lines) > told)
    count = run.steps.count
    time.sleep(0.3)
    assert (run.steps.count, run.phase) == (count, Phase.STILL)
    page.click("#clear")
    page.click("#confirm")
    page.wait_for_selector("#stopped", state="hidden")
    until(lambda: page.evaluate("document.getElementById('mode').textContent === 'paused'"), 10)
    time.sleep(0.3)
    assert run.steps.count == count  # nothing moves before somebody says so
    page.click("#start")
    run.goes_on()
    return float(event.t - clicked)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
@pytest.mark.alone
def test_a_page_that_dies_or_hangs_changes_nothing_else(deployment, open_page, number, tmp_path):
    run = deployment("scheduling=naive")
    until(lambda: run.steps.count > 5)
    before = run.steps.count
    page = open_page(run.url) if number == signal.SIGSTOP else None
    os.kill(child_of(run.process.pid, "page.process"), number)
    run.goes_on(15)
    if page is not None:
        page.wait_for_selector("#lost", state="visible")
    rows = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()][before:]
    assert not any(row["interventions"] for row in rows)
    assert sum(row["missed_ticks"] for row in rows) <= 1
    assert run.end() == 130


# Without a browser: the page's process beside an arm, and a loop that does nothing.

LIMITS = {"low": [-2.0] * 3, "high": [2.0] * 3, "max_step": [1.0] * 3}
LIMITS |= {"velocity": [2.0] * 3, "acceleration": [10.0] * 3, "jerk": [200.0] * 3}
ABOUT = {"n_obs_steps": 2, "control_rate": 10.0, "cameras": [], "dimensions": ["a", "b", "c"], "plane": None}
ABOUT |= {
    "task": "a test",
    "units": ["", "", ""],
    "low": LIMITS["low"],
    "high": LIMITS["high"],
    "teleop": None,
    "parts": [[0], [1, 2]],
    "trials": False,
}


class Served:
    """An arm, and the page's process beside it."""

    def __init__(self, **options: Any) -> None:
        self.segments = Segments()
        setup = ArmSetup(driver="ideal", settings={"n_joints": 2}, limits=LIMITS)
        self.arm = ArmLink(folder=self.segments.path, setup=setup)
        arguments = {"host": "127.0.0.1", "token_file": None} | options
        try:
            folder, module = self.segments.path, "action_diffusion.deploy.page.process"
            self.page = PageLink(module, folder, **arguments, port=0, about=ABOUT, stops=True)
        except InputError:
            self.arm.close()
            self.segments.remove()
            raise
        self.port = self.page.port

    def request(self, method: str, path: str, body: str = "", **headers: str) -> http.client.HTTPResponse:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=10)
        connection.request(method, path, body, headers)
        return connection.getresponse()

    def close(self) -> None:
        self.page.end()
        self.arm.close()
        self.segments.remove()


@pytest.fixture
def served() -> Iterator[Served]:
    one = Served()
    yield one
    one.close()


@pytest.fixture(scope="module")
def one_for_all() -> Iterator[Served]:
    """For tests that do not mind what the others did."""
    one = Served()
    yield one
    one.close()


@pytest.mark.slow
@pytest.mark.alone
def test_the_emergency_stop_needs_no_loop(served):
    """The loop's main thread is busy: this test does nothing from `begin` on, but for asking the page."""
    served.request("GET", "/about").read()
    served.arm.begin()
    moment = time.monotonic()
    assert served.request("POST", "/emergency").status == 204
    until(lambda: served.arm.phase is Phase.STILL)
    event = RingReader(served.segments.path / "events").last(1)[0]
    assert text(event.values["why"]) == "emergency stop"
    assert 0 <= event.t - moment < 0.1
    with pytest.raises(InputError, match="the emergency stop is set"):
        served.arm.begin()
    assert served.request("POST", "/clear").status == 400
    with pytest.raises(InputError, match="the emergency stop is set"):
        served.arm.begin()
    assert served.request("POST", "/clear", "the area is safe").status == 204
    served.arm.begin()


def test_a_page_that_comes_right_after_a_stop_hears_of_it_first(served):
    for _ in range(10):  # the page looks for news 100 times a second, so one of ten would come between two looks
        assert served.request("POST", "/clear", "the area is safe").status == 204
        with connect(f"ws://127.0.0.1:{served.port}/stop", proxy=None) as page:
            assert not json.loads(page.recv())["emergency"]
        assert served.request("POST", "/emergency").status == 204
        with connect(f"ws://127.0.0.1:{served.port}/stop", proxy=None) as page:
            assert json.loads(page.recv())["emergency"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 204),
        ({"Origin": "http://127.0.0.1:{port}"}, 204),
        ({"Origin": "http://elsewhere.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Origin": "https://127.0.0.1:{port}"}, 403),
        ({"Origin": "https://127.0.0.1:{port}", "X-Forwarded-Proto": "https"}, 204),  # a proxy with TLS
        ({"Origin": "http://127.0.0.1:{port}", "X-Forwarded-Proto": "https"}, 403),
        ({"Origin": "http://127.0.0.1:{port}", "Sec-Fetch-Site": "same-origin"}, 204),
        ({"Sec-Fetch-Site": "cross-site"}, 403),
        ({"Sec-Fetch-Site": "same-site"}, 403),  # another port of this machine
        ({"Sec-Fetch-Site": "same-origin"}, 204),
        ({"Sec-Fetch-Site": "none"}, 204),
        ({"Host": "[::1"}, 403),
        ({"Host": "elsewhere.example:{port}"}, 403),
    ],
)
def test_other_pages_of_the_browser_do_not_come_in(one_for_all, headers, status):
    served = one_for_all
    orders = RingReader(served.segments.path / "orders")
    before = orders.count
    filled = {name: value.format(port=served.port) for name, value in headers.items()}
    assert served.request("POST", "/emergency", **filled).status == status
    assert served.request("GET", "/about", **filled).status == (200 if status == 204 else 403)
    address, rest = f"ws://127.0.0.1:{served.port}", {name: filled[name] for name in filled if name != "Host"}
    if "Host" in filled:
        return
    if status == 204:
        with connect(f"{address}/stop", additional_headers=rest, proxy=None) as page:
            assert json.loads(page.recv())["emergency"]
        with connect(f"{address}/live", additional_headers=rest, proxy=None) as page:
            assert json.loads(page.recv())["phase"] in ("STILL", "STOPPING")
            page.send('{"order": "pause"}')
            until(lambda: orders.count == before + 1)
    else:
        for path in ("/live", "/stop"):
            with pytest.raises(InvalidStatus):
                connect(f"{address}{path}", additional_headers=rest, proxy=None)


def read_to_the_end(page: ClientConnection) -> None:
    while True:
        page.recv(timeout=10)


@pytest.mark.parametrize(
    ("path", "message", "code"),
    [
        ("/live", "nonsense", 1008),
        ("/live", "[" * 50_000, 1008),
        ("/live", "[]", 1008),
        ("/live", "{}", 1008),
        ("/live", '{"order": "fly"}', 1008),
        ("/live", '{"order": ["pause"]}', 1008),
        ("/live", '{"order": "redo"}', 1008),
        ("/live", '{"order": "score", "value": 0.5}', 1008),
        ("/live", '{"order": "point"}', 1008),
        ("/live", '{"order": "point", "values": [1, 2]}', 1008),
        ("/live", '{"order": "point", "values": [1, 2, NaN]}', 1008),
        ("/live", '{"order": "point", "values": [1, 2, 1e999]}', 1008),
        ("/live", '{"order": "point", "values": [1, 2, "x"]}', 1008),
        ("/live", '{"order": "own", "values": [1, 1]}', 1008),
        ("/live", '{"order": "own", "values": [0, 0, 0]}', 1008),
        ("/live", '{"order": "own", "values": [1, 1, 0]}', 1008),
        ("/live", b'{"order": "pause"}', 1003),
        ("/live", "x" * (1 << 17), 1009),
        ("/stop", "halt", 1008),
        ("/stop", b"stop", 1003),
    ],
)
def test_a_socket_that_brings_nonsense_is_closed(one_for_all, path, message, code):
    folder = one_for_all.segments.path
    orders, emergency = RingReader(folder / "orders"), Moment(folder / "emergency")
    before = orders.count, emergency.t
    with connect(f"ws://127.0.0.1:{one_for_all.port}{path}", proxy=None) as page:
        page.send(message)
        with pytest.raises(ConnectionClosed) as closed:
            read_to_the_end(page)
    assert closed.value.rcvd.code == code
    assert (orders.count, emergency.t) == before


@pytest.mark.slow
def test_points_that_flood_push_no_order_out_and_end_their_socket(served):
    orders = RingReader(served.segments.path / "orders")
    with (
        connect(f"ws://127.0.0.1:{served.port}/live", proxy=None, max_queue=None) as mine,
        connect(f"ws://127.0.0.1:{served.port}/live", proxy=None, max_queue=None) as flooding,
    ):
        mine.send('{"order": "pause"}')
        with contextlib.suppress(ConnectionClosed):
            for number in range(10_000):
                flooding.send(f'{{"order": "point", "values": [0, 1, {number}]}}')
        with pytest.raises(ConnectionClosed, match="too many messages"):
            read_to_the_end(flooding)
        mine.send('{"order": "start"}')
        until(lambda: orders.count == 2)
    assert [int(record.values["order"]) for record in orders.after(-1)] == [Order.PAUSE, Order.START]
    pointer = Pointer(served.segments.path)
    assert pointer.command(time.monotonic() + 60) is None
    command = pointer.command(0.0)
    assert command is not None
    assert list(command[:2]) == [0, 1]


@pytest.mark.parametrize("length", [16, 300_000_000])
def test_no_more_of_a_body_is_read_than_it_takes_to_refuse_it(one_for_all, length):
    """Though it never comes to its end."""
    with socket.create_connection(("127.0.0.1", one_for_all.port), timeout=10) as connection:
        head = f"POST /clear HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: {length}\r\n\r\n"
        connection.sendall(head.encode() + b"the area was not")
        assert connection.recv(100).startswith(b"HTTP/1.1 400 ")


@pytest.mark.slow
def test_whoever_gets_nowhere_is_let_go(one_for_all):
    """Connections that say nothing, or half of something, to either process; the port goes on."""
    beginnings = (
        b"",
        b"POST",
        b"GET /about HTTP/1.1\r\n",
        b"GET /stop HTTP/1.1\r\nHost:",
        b"POST /emergency HTTP/1.1\r\n",
    )
    held = []
    for beginning in 60 * beginnings:
        held.append(socket.create_connection(("127.0.0.1", one_for_all.port), timeout=PATIENCE + 10))
        held[-1].sendall(beginning)
    assert one_for_all.request("GET", "/about").status == 200
    for connection in held:
        with contextlib.suppress(ConnectionError):
            assert connection.recv(1) == b""
        connection.close()
    assert one_for_all.request("POST", "/emergency").status == 204


@pytest.mark.slow
@pytest.mark.alone
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_the_stop_needs_no_page(served, number):
    """Whose process is dead, or hangs with all that it was given."""
    person = PersonAtPage(served.segments.path, served.port, "")
    os.kill(child_of(os.getpid(), "page.process"), number)
    waiting = [socket.create_connection(("127.0.0.1", served.port)) for _ in range(500)]
    for connection in waiting:
        with contextlib.suppress(ConnectionError):
            connection.sendall(b"GET /about HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
    for by_request in (False, True):
        served.arm.begin()
        seconds = person.stop(by_request=by_request)
        assert seconds is not None
        assert seconds < WITHIN
        person.request("/clear", "the area is safe")
    for connection in waiting:
        connection.close()


@pytest.mark.slow
@pytest.mark.alone
def test_the_stop_waits_for_nobody(tmp_path):
    """Tabs, floods, and strangers without the token."""
    secret = "a-token-of-more-than-16-letters"
    (tmp_path / "token").write_text(secret)
    served = Served(token_file=str(tmp_path / "token"))
    try:
        cookie = served.request("POST", "/session", Authorization=f"Api-Key {secret}").getheader("Set-Cookie")
        assert cookie is not None
        person = PersonAtPage(served.segments.path, served.port, cookie.split(";")[0])
        with crowd(served.port, cookie.split(";")[0], tabs=20, floods=2, strange=1100, busy=0):
            time.sleep(4)
            for number in range(10):
                served.arm.begin()
                time.sleep(0.2)
                seconds = person.stop(by_request=number % 2 == 1)
                assert seconds is not None
                assert seconds < WITHIN
                person.request("/clear", "the area is safe")
    finally:
        served.close()


@pytest.mark.slow
@pytest.mark.alone
def test_the_page_says_whether_the_stop_was_confirmed(served, open_page):
    page = open_page(f"http://127.0.0.1:{served.port}")
    until(lambda: page.evaluate("document.getElementById('phase').textContent === 'arm still'"), 10)
    served.arm.begin()
    page.click("#emergency")
    page.wait_for_selector("#confirmed:has-text('Stop confirmed: the arm began to stop within')")
    page.wait_for_selector("#why:has-text('Start, Take over: the emergency stop is set: clear it first')")
    assert page.is_disabled("#start")
    page.click("#clear")
    page.click("#confirm")
    page.wait_for_selector("#stopped", state="hidden")
    until(lambda: page.is_enabled("#start"), 10)
    served.arm.begin()
    os.kill(served.arm.child.process.pid, signal.SIGSTOP)
    page.click("#emergency")
    page.wait_for_selector("#confirmed.alarm:has-text('THE STOP IS NOT CONFIRMED: the stop arrived, but the arm')")
    os.kill(served.arm.child.process.pid, signal.SIGCONT)
    page.wait_for_selector("#confirmed.bad:has-text('Stop confirmed')")
    served.page._stop.process.kill()  # of this page, not of the one that other tests share
    page.wait_for_selector("#unreachable", state="visible")
    page.click("#emergency")
    page.wait_for_selector("#confirmed.alarm:has-text('the stop did not arrive')")


@pytest.mark.slow
def test_other_machines_need_the_token(tmp_path, monkeypatch):
    monkeypatch.delenv("ACTION_DIFFUSION_TOKEN", raising=False)
    with pytest.raises(InputError, match=r"page_host=0\.0\.0\.0 lets other machines in"):
        Served(host="0.0.0.0")
    secret = "a-token-of-more-than-16-letters"
    (tmp_path / "token").write_text(secret)
    served = Served(host="0.0.0.0", token_file=str(tmp_path / "token"))
    try:
        assert served.request("GET", "/").status == 200
        for method, path in (("GET", "/about"), ("POST", "/emergency"), ("POST", "/clear")):
            assert served.request(method, path).status == 401
        with pytest.raises(InvalidStatus):
            connect(f"ws://127.0.0.1:{served.port}/live", proxy=None)
        assert served.request("POST", "/session", Authorization="Api-Key wrong").status == 401
        cookie = served.request("POST", "/session", Authorization=f"Api-Key {secret}").getheader("Set-Cookie")
        assert cookie is not None
        assert {"HttpOnly", "SameSite=strict"} <= set(re.split("; ", cookie))
        assert secret not in cookie
        assert served.request("GET", "/about", Cookie=cookie.split(";")[0]).status == 200
        assert served.request("POST", "/emergency", Cookie=cookie.split(";")[0]).status == 204
    finally:
        served.close()


def test_what_the_page_shows_of_events_and_of_a_machine_that_is_too_slow(tmp_path):
    """Lines that differ in their numbers are counted; what helps is said while deadlines are missed."""
    for name in ("loop.beat", "emergency"):
        Moment.create(tmp_path / name)
    spec = PolicySpec(
        observations={"state": ObservationSpec(shape=(5,), source="state")},
        action=ActionSpec(shape=(2,)),
        n_obs_steps=1,
        horizon=8,
        n_action_steps=4,
        control_rate=10.0,
        normalizer={},
    )
    recording = RunStream(tmp_path, spec, output=None, attrs={})
    events = RingWriter(tmp_path / "events", fields=EVENTS, n_slots=64)
    state = RingWriter(tmp_path / "state", fields={"state": ("f8", (5,))}, n_slots=4)
    about: Any = ABOUT | {"plane": {"camera": None, "size": [512, 512], "board": board()}}
    view: Any = RunView(tmp_path, about)
    assert view.state()["scene"] is None
    state.append(0.0, {"state": np.arange(5.0)})
    for number in range(40):
        why = f"command[0] = {number / 7:g} is outside" if number % 2 else "stale"
        events.append(float(number), {"kind": b"refused", "why": why.encode()})
    said = view.state()
    assert said["scene"] == [0.0, 1.0, 2.0, 3.0, 4.0]
    assert [(event["text"], event["times"]) for event in said["events"]] == [
        (f"refused: command[0] = {39 / 7:g} is outside", 20),
        ("refused: stale", 20),
    ]
    assert said["advice"] is said["guard"] is None
    step = StepRecord(
        seed=0,
        step=0,
        t=0.0,
        action=[0.0, 0.0],
        reward=None,
        inference_ms=250.0,
        delay=0,
        jump=None,
        held=False,
        observation_age_ms=1.0,
        lateness_ms=150.0,
        missed_ticks=2,
        interventions=[],
        operator=False,
    )
    seen = Seen(0.0, 0, 0, Observation(0.0, {"state": np.zeros(5, np.float32)}), False, [])
    recording.stepped(step, seen)
    assert view.state()["advice"].startswith("Too slow: a chunk takes 250 ms, a control step 100. scheduling=rtc")
    assert view.state()["guard"] is None
    recording.stepped(dataclasses.replace(step, inference_ms=5.0, guard_level=1.5), seen)
    recording.stepped(dataclasses.replace(step, inference_ms=5.0, guard_alarm=True), seen)
    assert view.state()["guard"] == {"level": 1.5, "alarm": True}
    assert "other programs keep this machine busy" in view.state()["advice"]
    for _ in range(200):
        recording.stepped(dataclasses.replace(step, missed_ticks=0), seen)
        view.look()
    assert view.state()["advice"] is None


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["page=-1"], "page=-1 must be a whole number from 0 to 65535"),
        (["page=maybe"], "page=maybe: expected true or false or a whole number from 0 to 65535"),
        (["page=false", "wait=true"], "wait=true waits for somebody at the page"),
    ],
)
def test_bad_options(tmp_path, capsys, words, message):
    bundle = save_bundle(tmp_path / "bundle")
    assert cli.main(["deploy", f"bundle={bundle}", f"output_dir={tmp_path}", "device=cpu", *words]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.slow
def test_a_taken_port(served, tmp_path, capsys):
    bundle = save_bundle(tmp_path / "bundle")
    words = [f"bundle={bundle}", f"output_dir={tmp_path}", "device=cpu", f"page={served.port}"]
    assert cli.main(["deploy", *words]) == 2
    assert "cannot listen at 127.0.0.1" in capsys.readouterr().err
