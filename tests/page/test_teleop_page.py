"""PushT in a real browser: episodes that somebody leads with the mouse and that train, and a loop that keeps time."""

from __future__ import annotations

import http.client
import json
import os
import re
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from processes import Forked
from websockets.exceptions import InvalidStatus
from websockets.sync.client import connect
from websockets.typing import Origin

from action_diffusion import cli
from action_diffusion.datasets.storage.replay_buffer import ReplayBuffer
from action_diffusion.deploy.ipc.channels import text
from action_diffusion.deploy.ipc.rings import RingReader, shared_folder
from action_diffusion.deploy.page.shared import Nonsense
from action_diffusion.deploy.teleop.page.app import word
from action_diffusion.envs.pusht.expert import PushTExpert
from action_diffusion.envs.pusht.simulator import PushT
from benchmarks.robustness.kills import child_of


def until(condition: Callable[[], Any], seconds: float = 30.0) -> Any:
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return found


class Collecting:
    """`action-diffusion collect agent=teleop` in a process of its own, with its page."""

    def __init__(self, *words: str) -> None:
        command = ["-m", "action_diffusion", "collect", "task=pusht_state", "agent=teleop", *words]
        self.process = Forked(*command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        assert self.process.stdout is not None
        self.lines: list[str] = []
        self._reader = threading.Thread(target=lambda: self.lines.extend(self.process.stdout or []), daemon=True)
        self._reader.start()
        until(lambda: [line for line in self.lines if "ssh" in line] or self.process.poll() is not None, 60)
        self.url = next((line.split()[-1] for line in self.lines if "page: http" in line), "")
        assert self.url, self.lines
        self.port = int(self.url.rpartition(":")[2])
        folder = next(shared_folder().glob(f"action-diffusion-{self.process.pid}-*"))
        until((folder / "sessions").exists)
        self.sessions = RingReader(folder / "sessions")
        until(lambda: self.sessions.count > 0)

    def end(self) -> dict[str, str]:
        """Ctrl-C; what the command says in the end."""
        self.process.send_signal(signal.SIGINT)
        return self.ended()

    def ended(self) -> dict[str, str]:
        assert self.process.wait(30) == 0, self.lines
        self._reader.join(5)
        return dict(re.findall(r"^(\w+): (.*)$", "".join(self.lines), re.MULTILINE))

    def ticks(self, seconds: float) -> np.ndarray:
        """When the loop ticks, for so long (monotonic s)."""
        first = self.sessions.count
        time.sleep(seconds)
        return np.array([record.t for record in self.sessions.after(first)])


@pytest.fixture
def collecting() -> Iterator[Callable[..., Collecting]]:
    started: list[Collecting] = []

    def start(*words: str) -> Collecting:
        started.append(Collecting(*words))
        return started[-1]

    yield start
    for one in started:
        one.process.kill()
        one.process.wait()


class Person:
    """At a browser, with a mouse."""

    def __init__(self, browser: Any, url: str) -> None:
        self.page = browser.new_page(viewport={"width": 500, "height": 800})
        self.errors: list[str] = []
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.goto(url)
        self.sees("mode", "ready")
        until(lambda: self.page.evaluate("document.getElementById('board').dataset.finger"))
        assert self.page.evaluate("document.documentElement.scrollWidth") <= 500

    def sees(self, name: str, text: str) -> None:
        shown = f"document.getElementById('{name}').textContent"
        try:
            until(lambda: text in self.page.evaluate(shown), 15)
        except AssertionError:
            raise AssertionError(self.page.inner_text("body")) from None

    def state(self) -> np.ndarray:
        """What the page shows of the world, as a demonstration has it."""
        finger, block = self.page.evaluate(
            "(({finger, block}) => [finger, block])(document.getElementById('board').dataset)"
        )
        return np.array([float(value) for value in f"{finger},{block}".split(",")])

    def point(self, place: np.ndarray) -> None:
        share = np.clip(place / 512, 0, 1)
        self.page.mouse.move(
            self.box["x"] + share[0] * self.box["width"], self.box["y"] + share[1] * self.box["height"]
        )

    def begins(self) -> None:
        """Start, and the pointer on the finger when the countdown is over."""
        self.page.click("#start")
        self.box = self.page.locator("#board").bounding_box()
        self.point(self.state()[:2])
        self.sees("mode", "recording")

    def pushes(self, seconds: float) -> None:
        """What somebody does who sees the page: lead the finger behind the block and push."""
        expert = PushTExpert(seed=0)
        expert.reset()
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            state = self.state()
            wanted = expert.act({"state": state.astype(np.float32)})
            self.point(state[:2] + np.clip(wanted - state[:2], -60, 60))
            time.sleep(0.08)


@pytest.mark.slow
def test_a_person_at_a_browser_records_episodes_that_train(collecting, browser, tmp_path):
    path = tmp_path / "mine.zarr"
    run = collecting(f"output={path}", "countdown=0.2", "seed=7")
    person = Person(browser, run.url)
    for index in range(4):
        person.begins()
        person.pushes(1.0)
        if index == 1:
            person.page.keyboard.press("Backspace")
            person.sees("message", "discarded: the same start again")
        else:
            person.page.click("#keep")
            person.sees("message", "kept episode")
        person.sees("mode", "ready")
    person.sees("episodes", "3 of 20 episodes")
    person.page.keyboard.press("u")
    person.sees("message", "took back episode 3")
    person.page.click("#finish")
    said = run.ended()
    person.sees("message", "2 episodes saved")
    assert person.page.evaluate("document.getElementById('lost').hidden")
    assert (said["episodes"], said["discarded"], said["undone"]) == ("2", "1", "1")
    assert person.errors == []
    check(path, 2)
    words = [f"data={path}", f"output_dir={tmp_path}/run", "device=cpu", "train.max_steps=2", "train.batch_size=4"]
    words.append("policy.denoiser.channels=[8,16]")
    assert cli.main(["train", "task=pusht_state", *words, "train.validate_every=0", "evaluation.n_episodes=0"]) == 0
    assert (tmp_path / "run" / "bundle" / "model.safetensors").exists()


def check(path: Path, n_episodes: int) -> None:
    """The simulator gives the recorded states from the recorded actions: nothing is missing, nothing is out of step."""
    buffer = ReplayBuffer.open(path)
    assert buffer.n_episodes == n_episodes
    for index, episode in enumerate(buffer.episodes()):
        assert len(episode["action"]) > 6
        env = PushT()
        env.reset(buffer.attrs["seed"] + index)
        for state, action, reward in zip(episode["state"], episode["action"], episode["reward"], strict=True):
            np.testing.assert_array_equal(env.observe(["state"])["state"], state)
            assert np.float32(env.step(action)[0]) == reward
        assert np.linalg.norm(episode["state"][-1, :2] - episode["state"][0, :2]) > 5


@pytest.mark.slow
@pytest.mark.alone
def test_a_browser_that_stalls_or_is_closed_pauses_the_episode_and_not_the_loop(collecting, browser, tmp_path):
    path = tmp_path / "mine.zarr"
    run = collecting(f"output={path}", "countdown=0", "page=true")
    person = Person(browser, run.url)
    person.begins()
    person.pushes(1.0)
    before = run.sessions.count
    person.page.evaluate("() => { const end = Date.now() + 1500; while (Date.now() < end); }")
    stalled = [json.loads(text(record.values["json"])) for record in run.sessions.after(before)]
    assert any("silent or hidden" in said["message"] and not said["driven"] for said in stalled)
    person.page.close()
    ticks = run.ticks(1.5)
    assert 14 <= len(ticks) <= 16
    assert np.abs(np.diff(ticks) - 0.1).max() < 0.06
    before = last(run)
    again = Person.__new__(Person)
    assert (before["mode"], before["driven"]) == ("RECORDING", False)
    assert "silent or hidden" in before["message"]
    again.page = browser.new_page(viewport={"width": 500, "height": 800})
    again.page.goto(run.url)
    again.sees("mode", "paused")
    again.box = again.page.locator("#board").bounding_box()
    again.point(again.state()[:2])
    again.sees("mode", "recording")
    again.pushes(1.0)
    again.page.click("#keep")
    again.sees("episodes", "1 of 20")
    said = run.end()
    assert said["episodes"] == "1"
    check(path, 1)


@pytest.mark.slow
def test_a_finger_on_a_touch_screen_leads_and_lets_go(collecting, browser, tmp_path):
    run = collecting(f"output={tmp_path}/mine.zarr", "countdown=0")
    person = Person(browser, run.url)
    hand = person.page.context.new_cdp_session(person.page)

    def touch(kind: str, *places: np.ndarray) -> None:
        box = person.page.locator("#board").bounding_box()
        points = [{"x": box["x"] + x / 512 * box["width"], "y": box["y"] + y / 512 * box["height"]} for x, y in places]
        hand.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": points})

    person.page.click("#start")
    touch("touchStart", person.state()[:2])
    person.sees("mode", "recording")
    for _ in range(8):
        touch("touchMove", person.state()[:2] + np.array([8, 0]))
        time.sleep(0.1)
    touch("touchEnd")
    person.sees("mode", "paused")
    assert "onto the table" in last(run)["message"]
    assert last(run)["step"] > 5
    assert run.end()["kept_now"] == "0"
    assert person.errors == []


def last(run: Collecting) -> dict[str, Any]:
    record = run.sessions.latest()
    assert record is not None
    return dict(json.loads(text(record.values["json"])))


@pytest.mark.parametrize(
    "message", ["nonsense", "{}", '{"order": "fly"}', '{"pointer": [1], "down": [], "pressed": []}']
)
def test_a_page_that_says_nonsense_is_cut_off(message):
    with pytest.raises(Nonsense):
        word(message)


@pytest.mark.slow
def test_who_may_come_in_and_who_drives(collecting, tmp_path):
    run = collecting(f"output={tmp_path}/mine.zarr", "countdown=0")
    address = f"ws://127.0.0.1:{run.port}/live"
    for headers in ({"Host": f"elsewhere.example:{run.port}"}, {"Origin": "http://elsewhere.example"}):
        connection = http.client.HTTPConnection("127.0.0.1", run.port, timeout=10)
        connection.request("GET", "/about", headers=headers)
        assert connection.getresponse().status == 403
    with pytest.raises(InvalidStatus):
        connect(address, origin=Origin("http://elsewhere.example"), proxy=None)
    with connect(address, proxy=None) as first, connect(address, proxy=None) as second:
        first.send('{"order": "start"}')
        until(lambda: last(run)["mode"] == "RECORDING")
        first.send('{"pointer": [1, 1], "down": [], "pressed": []}')
        second.send('{"pointer": [2, 2], "down": [], "pressed": ["Backspace"]}')
        time.sleep(0.3)
        assert last(run)["mode"] == "RECORDING"
        assert '"drives": false' in [second.recv() for _ in range(3)][-1]
        second.send('{"order": "discard"}')
        until(lambda: last(run)["mode"] == "READY")
        second.send('{"order": "start"}')
        until(lambda: last(run)["mode"] == "RECORDING")
        os.kill(child_of(run.process.pid, "page.process"), signal.SIGKILL)
    until(lambda: "page's process has died" in last(run)["message"])
    assert run.end()["episodes"] == "0"
