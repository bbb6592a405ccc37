"""The devices by name, from plain values."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from action_diffusion.deploy.page.link import PageLink
from action_diffusion.deploy.teleop.devices import terminal
from action_diffusion.deploy.teleop.devices.device import Device, Together
from action_diffusion.deploy.teleop.devices.gamepad import Gamepad
from action_diffusion.deploy.teleop.devices.leader import Leader
from action_diffusion.deploy.teleop.devices.script import Script
from action_diffusion.deploy.teleop.devices.spacemouse import SpaceMouse
from action_diffusion.deploy.teleop.devices.terminal import Terminal
from action_diffusion.deploy.teleop.page.board import Browser
from action_diffusion.errors import InputError, unknown
from action_diffusion.registry import DEVICES, check_arguments

SHOWS_PLACES = ("leader", "script")
"""Devices that give targets, never twists."""


def make_device(
    name: str, cell: Mapping[str, Any], *, index: int = 0, clutch: bool = False, script: str | None = None
) -> Device | None:
    """What `device=` names; None for the browser, whose page belongs to the run.

    cell: a hardware file's sections; `leader` is a leader arm, `device` has the options of a plugin's device.
    index: of several gamepads. clutch: it drives only while a button is held. script: a file, or "-".
    Raises `InputError` for an unknown name, and where a part of the description is missing.
    """
    if name not in DEVICES:
        raise unknown("device", str(name), DEVICES)
    if name not in DEVICES.own:
        part, options = DEVICES.load(name), cell.get("device") or {}
        check_arguments(part, options, f"device {name}")
        return cast(Device, part(**options))
    if name == "leader":
        return _leader(cell)
    if name == "script":
        if not script:
            raise InputError("device=script needs script=FILE, or script=- for what is piped in")
        return Script(script)
    if name == "gamepad":
        return Gamepad(index=index, clutch=clutch)
    if name == "spacemouse":
        return SpaceMouse(index=index, clutch=clutch)
    return Terminal() if name == "keyboard" else None


def _leader(cell: Mapping[str, Any]) -> Leader:
    described = cell.get("leader")
    if not described:
        raise InputError(
            "device=leader needs hardware=FILE.yaml with  leader: {type: so101_leader, config: {port: …, id: …}}"
        )
    motors = (cell.get("arm") or {}).get("motors")
    try:
        return Leader(**({"motors": motors} if motors else {}), **described)
    except TypeError as error:
        raise InputError(f"leader: {error}") from None


def everything(driver: Device | None, folder: Path, page: PageLink | None, *, points: bool) -> Device:
    """`driver`, or the page; orders also come from the page and from this process' terminal, where they are there."""
    browser = None if page is None else Browser(folder, page, points=points)
    if driver is None:
        if browser is None:
            raise InputError("device=browser needs its page: page=true")
        driver, browser = browser, None
    others: list[Device] = [] if browser is None else [browser]
    if not isinstance(driver, Terminal | Script) and terminal.is_there():
        others.append(Terminal())
    return Together(driver, others)
