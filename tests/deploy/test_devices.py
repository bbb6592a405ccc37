"""Gamepads, SpaceMice and leader arms: what they tell the session, on the installed libraries as far as these go.

pyspacemouse runs itself, on reports as the device sends them over USB. Of pygame and lerobot stand-ins take the place,
whose methods are compared with the libraries' (lerobot's in lerobot_peer.py).
"""

from __future__ import annotations

import importlib
import struct
import sys
import time
import types
from typing import Any

import numpy as np
import pytest
import vendors

from action_diffusion.deploy.teleop.devices.device import Ask, Signals, Together
from action_diffusion.deploy.teleop.devices.gamepad import BUTTONS, Gamepad
from action_diffusion.deploy.teleop.devices.leader import Leader
from action_diffusion.deploy.teleop.devices.registry import make_device
from action_diffusion.deploy.teleop.devices.spacemouse import SILENT, SpaceMouse
from action_diffusion.errors import InputError

# SpaceMouse


class Hid:
    """A SpaceMouse Compact as easyhid has it: reports that wait to be read, None where there is none."""

    vendor_id, product_id = 9583, 50741
    product_string = manufacturer_string = serial_number = "SpaceMouse"
    release_number = 1

    def __init__(self) -> None:
        self.reports: list[bytes] = []
        self.closed = False
        self.error: Exception | None = None

    def open(self) -> None:
        pass

    def close(self) -> None:
        self.closed = True

    def set_nonblocking(self, enable_nonblocking: bool) -> None:
        assert enable_nonblocking

    def read(self, size: int = 64, timeout: float | None = None) -> bytes | None:
        if self.error is not None:
            raise self.error
        return self.reports.pop(0) if self.reports else None

    def push(self, right: int, towards: int, down: int) -> None:
        """-350 to 350 each, along the axes of USB."""
        self.reports.append(b"\x01" + struct.pack("<3h", right, towards, down))

    def turn(self, pitch: int, roll: int, yaw: int) -> None:
        self.reports.append(b"\x02" + struct.pack("<3h", pitch, roll, yaw))

    def press(self, *buttons: int) -> None:
        self.reports.append(bytes([3, sum(1 << button for button in buttons)]))


@pytest.fixture
def mouse(monkeypatch):
    """A device, and the driver on it, connected."""
    pytest.importorskip("pyspacemouse")
    hid = Hid()
    found = types.SimpleNamespace(find=lambda **_: [hid])
    monkeypatch.setattr("pyspacemouse.api.Enumeration", lambda *_: found)
    return hid


def connected(**options: Any) -> SpaceMouse:
    device = SpaceMouse(**options)
    device.connect()
    return device


def test_a_spacemouse_moves_as_it_is_pushed(mouse):
    device = connected()
    assert device.poll().twist.tolist() == [0.0] * 6
    for report, axis, sign in (
        ((0, -350, 0), 0, 1),  # away from the person: forward
        ((-350, 0, 0), 1, 1),  # to the left
        ((0, 0, -350), 2, 1),  # lifted
        ((350, 0, 0), 1, -1),
    ):
        mouse.push(*report)
        expected = np.zeros(6)
        expected[axis] = sign
        np.testing.assert_allclose(device.poll().twist, expected, atol=1e-9)
    mouse.push(0, 0, 0)
    for report, axis in (((350, 0, 0), 4), ((0, 350, 0), 3), ((0, 0, 350), 5)):
        mouse.turn(*report)
        assert np.flatnonzero(device.poll().twist).tolist() == [axis]
    device.close()
    assert mouse.closed


def test_every_report_is_read_and_the_last_one_counts(mouse):
    device = connected()
    for step in range(120):
        mouse.push(0, -step, 0)
    assert device.poll().twist[0] == pytest.approx((119 / 350 - 0.08) / 0.92)
    assert mouse.reports == []


def test_a_spacemouse_at_rest_does_not_drift(mouse):
    device = connected()
    mouse.push(20, -25, 5)
    mouse.turn(-20, 3, 25)
    assert device.poll().twist.tolist() == [0.0] * 6
    assert device.poll().engaged


def test_a_spacemouse_that_is_unplugged_while_pushed_moves_nothing(mouse):
    device = connected()
    mouse.push(0, -350, 0)
    assert device.poll().engaged
    time.sleep(SILENT + 0.05)
    said = device.poll()
    assert (said.engaged, "silent" in said.why) == (False, True)
    mouse.error = OSError("no such device")
    with pytest.raises(InputError, match="device=spacemouse: no such device"):
        device.poll()


def test_buttons_of_a_spacemouse(mouse):
    device = connected(clutch=True)
    assert not device.poll().engaged
    mouse.press(1)
    assert device.poll().engaged
    mouse.press(0, 1)
    assert [device.poll().toggle for _ in range(3)] == [True, False, False]
    mouse.press()
    assert not device.poll().engaged


def test_no_spacemouse(monkeypatch):
    pytest.importorskip("pyspacemouse")
    monkeypatch.setattr("pyspacemouse.api.Enumeration", lambda *_: types.SimpleNamespace(find=lambda **_: []))
    with pytest.raises(InputError, match=r"device=spacemouse: .*hidapi"):
        SpaceMouse().connect()


# Gamepad


class Controller:
    """pygame._sdl2.controller.Controller: its axes and buttons are what a test says."""

    axes: dict[int, int]
    buttons: set[int]
    here = True

    def __init__(self, index: int) -> None:
        Controller.axes, Controller.buttons, Controller.here = {}, set(), True

    def attached(self) -> bool:
        return Controller.here

    def get_axis(self, axis: int) -> int:
        return Controller.axes.get(axis, 0)

    def get_button(self, button: int) -> bool:
        return button in Controller.buttons

    def quit(self) -> None:
        pass


@pytest.fixture
def pad(monkeypatch):
    """pygame as it is, with one gamepad that is plugged in."""
    pads = importlib.import_module("pygame._sdl2.controller")
    monkeypatch.setattr(pads, "get_count", lambda: 1)
    monkeypatch.setattr(pads, "is_controller", lambda index: index == 0)
    monkeypatch.setattr(pads, "Controller", Controller)
    device = Gamepad()
    device.connect()
    yield device
    device.close()


def hold(*names: str, **axes: float) -> None:
    import pygame

    Controller.buttons = {getattr(pygame, f"CONTROLLER_BUTTON_{name}") for name in names}
    Controller.axes = {getattr(pygame, f"CONTROLLER_AXIS_{name}"): round(32767 * value) for name, value in axes.items()}


def test_sticks_of_a_gamepad(pad):
    assert pad.poll().twist.tolist() == [0.0] * 6
    hold("DPAD_UP", "DPAD_LEFT", LEFTY=-1.0, LEFTX=0.05, RIGHTY=0.56, RIGHTX=-1.0)
    np.testing.assert_allclose(pad.poll().twist, [1, 0, -0.5, -1, 1, 1], atol=1e-4)


def test_buttons_of_a_gamepad(pad):
    hold("A", "START")
    first, second = pad.poll(), pad.poll()
    assert (first.toggle, first.orders) == (True, (Ask.START,))
    assert (second.toggle, second.orders) == (False, ())
    hold("Y", "B", "BACK", "LEFTSHOULDER")
    said = pad.poll()
    assert set(said.orders) == {Ask.KEEP, Ask.DISCARD, Ask.UNDO}
    assert said.speed == 0.5
    Controller.here = False
    with pytest.raises(InputError, match="no longer there"):
        pad.poll()


def test_the_clutch_of_a_gamepad(pad):
    pad._clutch = True
    assert not pad.poll().engaged
    hold("RIGHTSHOULDER")
    assert pad.poll().engaged


def test_no_gamepad():
    with pytest.raises(InputError, match="number 7 is not among the"):
        Gamepad(index=7).connect()


def test_the_stand_in_is_like_pygame():
    """pygame's module is compiled: names are all that can be compared."""
    import pygame

    real = importlib.import_module("pygame._sdl2.controller").Controller
    for name in vars(Controller):
        if not name.startswith("_") and callable(getattr(Controller, name)):
            assert callable(getattr(real, name))
    names = [*BUTTONS, "A", "LEFTSHOULDER", "RIGHTSHOULDER", "DPAD_UP", "DPAD_DOWN", "DPAD_LEFT", "DPAD_RIGHT"]
    assert all(hasattr(pygame, f"CONTROLLER_BUTTON_{name}") for name in names)
    assert all(hasattr(pygame, f"CONTROLLER_AXIS_{name}") for name in ("LEFTX", "LEFTY", "RIGHTX", "RIGHTY"))


# Leader arms

KOCH: dict[str, Any] = {
    "type": "koch_leader",
    "config": {"port": "/dev/ttyACM1", "id": "mine"},
    "motors": ["shoulder_pan", "gripper"],
}


@pytest.fixture
def koch(monkeypatch, tmp_path):
    return vendors.install_lerobot_leader(monkeypatch, tmp_path)


def test_a_leader_shows_where_it_is(koch):
    leader = Leader(**KOCH)
    leader.connect()
    assert ("leader.connect", (False,)) in koch.told  # asks no questions
    said = leader.poll()
    assert said.target is not None
    assert said.target.tolist() == [10.0, 50.0]
    assert said.twist is None
    leader.close()
    assert koch.names()[-1] == "leader.disconnect"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"type": "koch_leeder"}, "unknown teleoperator 'koch_leeder'.*did you mean koch_leader"),
        ({"config": {"port": "x", "prot": "y"}}, "unknown option 'prot'.*did you mean port"),
        ({"motors": ["elbow"]}, r"it has no elbow\.pos; it has shoulder_pan\.pos, gripper\.pos"),
    ],
)
def test_leaders_that_cannot_be(koch, change, message):
    with pytest.raises(InputError, match=message):
        Leader(**{**KOCH, **change}).connect()


def test_leaders_that_fail(koch):
    koch.answers["leader.is_calibrated"] = False
    with pytest.raises(InputError, match="lerobot-calibrate --teleop"):
        Leader(**KOCH).connect()
    koch.answers.clear()
    leader = Leader(**KOCH)
    leader.connect()
    koch.answers["get_action"] = {"shoulder_pan.pos": float("nan"), "gripper.pos": 1.0}
    with pytest.raises(InputError, match="finite numbers were expected"):
        leader.poll()
    koch.breaks["get_action"] = ConnectionError("Failed to sync read")
    with pytest.raises(InputError, match="Failed to sync read"):
        leader.poll()


# All


@pytest.mark.parametrize(
    ("device", "module", "extra"),
    [
        (Gamepad, "pygame", "gamepad"),
        (SpaceMouse, "pyspacemouse", "spacemouse"),
        (lambda: Leader(**KOCH), "lerobot.teleoperators", "lerobot"),
    ],
)
def test_a_missing_library_is_named_with_what_installs_it(monkeypatch, device, module, extra):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(InputError, match=rf"{module} cannot be imported.*pip install 'action-diffusion\[{extra}\]'"):
        device().connect()


def test_devices_by_name():
    assert make_device("browser", {}) is None
    assert isinstance(make_device("gamepad", {}, clutch=True), Gamepad)
    cell = {"arm": {"motors": ["a", "b"]}, "leader": {"type": "koch_leader", "config": {}}}
    leader = make_device("leader", cell)
    assert isinstance(leader, Leader)
    assert leader._motors == ["a.pos", "b.pos"]
    with pytest.raises(InputError, match=r"leader: .*unexpected keyword argument 'port'"):
        make_device("leader", {"leader": {"type": "x", "config": {}, "port": 1}})


def test_orders_come_from_everywhere_and_one_drives():
    class Says:
        help = "me"

        def __init__(self, signals: Signals) -> None:
            self.signals, self.closed = signals, False

        def connect(self) -> None:
            pass

        def poll(self) -> Signals:
            return self.signals

        def close(self) -> None:
            self.closed = True
            raise OSError

    driver = Says(Signals(twist=np.ones(6), orders=(Ask.KEEP,)))
    page = Says(Signals(engaged=False, orders=(Ask.FINISH,)))
    both = Together(driver, [page])
    assert both.poll().orders == (Ask.KEEP, Ask.FINISH)
    assert both.poll().engaged
    both.close()
    assert driver.closed
    assert page.closed
