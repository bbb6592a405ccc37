"""Who is told how a session stands: the page, the terminal, or the program that writes the script."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TypedDict

from action_diffusion.deploy.page.link import PageLink, page_port
from action_diffusion.deploy.sim.robots import board
from action_diffusion.deploy.teleop.devices.device import Device
from action_diffusion.deploy.teleop.devices.keys import HELP
from action_diffusion.deploy.teleop.page.board import Pictures, Shown
from action_diffusion.deploy.teleop.session import Status
from action_diffusion.deploy.teleop.world import World, is_plane
from action_diffusion.options import Collect

MODULE = "action_diffusion.deploy.teleop.page.process"
POINTING = (
    "lead the finger with the mouse, or with your own on a touch screen; Enter start, K keep, Backspace discard, U undo"
)


class AboutTeleop(TypedDict):
    """What does not change. points: the pointer shows targets; emergency: there is an arm that can be stopped."""

    task: str
    help: str
    points: bool
    emergency: bool
    board: dict[str, object] | None


def open_page(
    config: Collect, world: World, driver: Device | None, folder: Path
) -> tuple[Shown | None, PageLink | None]:
    """The page's process, ready, and what it shows; None where there is to be none.

    driver: None for the page itself. Raises `InputError` for an address that cannot be had, and a missing extra.
    """
    wanted = config.page
    if wanted is None and (driver is None or config.device == "script"):
        wanted = driver is None
    port = page_port(wanted, print)
    if port is None:
        return None, None
    shown, about = Shown(folder), _about(config, world, driver)
    page = PageLink(
        MODULE,
        folder,
        host=config.page_host,
        token_file=config.page_token_file,
        port=port,
        about=about,
        stops=about["emergency"],
    )
    print(f"page: {page.url}", flush=True)
    print("from another machine: ssh -L PORT:localhost:PORT HOST, then http://localhost:PORT", flush=True)
    return shown, page


def _about(config: Collect, world: World, driver: Device | None) -> AboutTeleop:
    """What the page is told at its start."""
    points = driver is None and is_plane(world)
    return {
        "task": config.task.name,
        "help": driver.help if driver is not None else POINTING if points else HELP,
        "points": points,
        "emergency": not world.waits,
        "board": board() if is_plane(world) else None,
    }


def teller(config: Collect, world: World, shown: Shown | None) -> Callable[[Status], None]:
    """Takes a session's status after every tick."""
    if config.device == "script" and shown is None:
        if config.script != "-":
            return lambda status: None
        return lambda status: print(json.dumps({**status, **world.scene()}), flush=True)
    say = Lines(print)
    if shown is None:
        return say
    pictures = Pictures(world.picture, shown)

    def show(status: Status) -> None:
        say(status)
        shown.tell({**status, **world.scene()})
        pictures(status["mode"], status["step"])

    return show


class Lines:
    """A line for whoever looks at the terminal, each time that something happens.

    Args:
        say: takes it.
    """

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say, self._last = say, ("", "")

    def __call__(self, status: Status) -> None:
        now = (status["mode"], status["message"])
        if now == self._last:
            return
        mode, message = now
        score = "" if status["score"] is None else f", score {status['score']:.2f}"
        if message or mode != self._last[0]:
            self._say(f"{mode.lower()}, {status['episodes']} kept, step {status['step']}{score}. {message}".rstrip())
        self._last = now
