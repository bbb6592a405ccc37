"""What the page shows of trials: a small file in the run's folder, written between runs by whoever runs them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, TypedDict

from action_diffusion.deploy.ipc.processes import report

_NAME = "trials"


class TrialShown(TypedDict):
    """Where trials stand, in words and numbers that name no policy.

    trial, trials, run, runs: "trial 7 of 20, run 2 of 2". reset, mark: what to do before this run, and after it.
    undo: there is a mark that can be taken back. home: there is an arm that can be brought back. starts: cameras of
    which there is a picture of the start.
    """

    trial: int
    trials: int
    run: int
    runs: int
    reset: str
    mark: str
    undo: bool
    home: bool
    starts: list[str]


def picture(folder: Path, camera: str) -> Path:
    """Where the picture of a start is kept."""
    return folder / f"{camera}.jpg"


def show(run: Path, shown: TrialShown, start: Path) -> None:
    """Let the page of the run in the folder `run` show it; `start`: the folder with the pictures of the start."""
    report(run, _NAME, {"shown": shown, "start": str(start)})


def shown(run: Path) -> TrialShown | None:
    """What is to be shown; None before there is anything."""
    said = _read(run)
    found: TrialShown | None = None if said is None else said["shown"]
    return found


def start_picture(run: Path, camera: str) -> Path | None:
    """The picture that is to be shown over `camera`; None where there is none."""
    said = _read(run)
    if said is None or camera not in said["shown"]["starts"]:
        return None
    return picture(Path(said["start"]), camera)


def _read(run: Path) -> dict[str, Any] | None:
    try:
        said: dict[str, Any] = json.loads((run / f"{_NAME}.json").read_text(encoding="utf-8"))
        return said
    except FileNotFoundError:
        return None
