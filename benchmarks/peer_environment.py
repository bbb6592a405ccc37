"""lerobot's own environment: made once, outside of the checkout, and kept.

    ~/.cache/action-diffusion/peers/lerobot-0.4.4/
        bin/python       with lerobot and what it needs: 8.5 GB, most of it torch's
        ffmpeg/          links to the FFmpeg libraries in PyAV's wheel, under the names that torchcodec looks for
        complete.json    written last; without it the folder is a torn installation, and is made anew

An installation takes minutes, all of it network and disk.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from action_diffusion.datasets.files import atomic_path, cache_folder, locked, remove, require_space, writing
from action_diffusion.errors import InputError

VERSION = "0.4.4"
REQUIREMENTS = (f"lerobot[pusht]=={VERSION}", "torch<2.11", "diffusers<0.36")
VARIABLE = "ACTION_DIFFUSION_PEER"
N_BYTES = 12_000_000_000
"""Room that the installation takes at most, with what pip unpacks on the way."""

Say = Callable[[str], None]


@dataclass(frozen=True)
class PeerEnvironment:
    """A complete environment."""

    folder: Path

    @property
    def python(self) -> Path:
        return self.folder / "bin" / "python"

    @property
    def variables(self) -> dict[str, str]:
        """What its processes need in their environment beside ours."""
        before = os.environ.get("LD_LIBRARY_PATH")
        return {
            "LD_LIBRARY_PATH": os.pathsep.join([str(self.folder / "ffmpeg"), *([before] if before else [])]),
            "HF_HOME": str(self.folder / "huggingface"),
            "HF_HUB_OFFLINE": "1",
            "SDL_VIDEODRIVER": "dummy",
            "PYTHONPATH": "",
        }


def default_folder() -> Path:
    """Where the environment is: $ACTION_DIFFUSION_PEER, or a folder of the user's cache."""
    given = os.environ.get(VARIABLE)
    return Path(given).expanduser() if given else cache_folder() / "peers" / f"lerobot-{VERSION}"


def peer_environment(folder: Path | None = None, *, say: Say = print) -> PeerEnvironment:
    """The environment in `folder` (default: `default_folder`), installed now where it is not complete.

    Raises `InputError` where it cannot be made: no network, no room, a package that does not build.
    """
    folder = (folder or default_folder()).absolute()
    with locked(folder):
        if not _complete(folder):
            if folder.exists() and not (folder / "pyvenv.cfg").exists() and any(folder.iterdir()):
                raise InputError(f"{folder} is no Python environment and not empty: set {VARIABLE} to another folder")
            _install(folder, say)
    return PeerEnvironment(folder)


def _complete(folder: Path) -> bool:
    try:
        return json.loads((folder / "complete.json").read_text())["requirements"] == list(REQUIREMENTS)
    except (OSError, ValueError, KeyError):
        return False


def _install(folder: Path, say: Say) -> None:
    began = time.monotonic()
    say(f"installing lerobot {VERSION} once, in an environment of its own (8.5 GB, some minutes): {folder}")
    require_space(folder.parent, N_BYTES, f"lerobot's environment (another folder: {VARIABLE})")
    log = folder.with_name(f"{folder.name}.log")
    with writing(str(folder)):
        remove(folder)
        log.unlink(missing_ok=True)
    _run([sys.executable, "-m", "venv", str(folder)], log, say)
    pip = [str(folder / "bin" / "python"), "-m", "pip", "install", "--disable-pip-version-check", "--progress-bar=off"]
    _run([*pip, *REQUIREMENTS], log, say)
    link_ffmpeg(folder, folder / "ffmpeg")
    with atomic_path(folder / "complete.json") as temporary:
        temporary.write_text(json.dumps({"requirements": list(REQUIREMENTS)}) + "\n")
    say(f"installed in {time.monotonic() - began:.0f} s")


def _run(command: list[str], log: Path, say: Say) -> None:
    """Run a command whose output goes to `log`, saying now and then which package it is at."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    last, said = "", time.monotonic()
    try:
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment, errors="replace"
        )
        assert process.stdout is not None
        with log.open("a") as written:
            packages = 0
            for line in process.stdout:
                written.write(line)
                packages += line.startswith("Collecting ")
                if line.startswith("ERROR") or (line.strip() and not last.startswith("ERROR")):
                    last = line.strip()
                if time.monotonic() - said > 10 and re.match(r"\s*(Collecting|Downloading|Installing|Building)", line):
                    said = time.monotonic()
                    say(f"  {packages} packages, {' '.join(line.split()[:3])[:100]}")
    except OSError as error:
        raise InputError(f"lerobot's environment cannot be made: {error}") from error
    if process.wait() != 0:
        raise InputError(f"lerobot's environment cannot be made: {last or 'no reason given'} (all of it: {log})")


def link_ffmpeg(folder: Path, links: Path) -> None:
    """Into `links`, those of the environment in `folder`, under the names that torchcodec looks for.

    PyAV's wheel has them as libavutil-1a2b3c.so.59.39.100.

    Where this finds none (macOS, say), torchcodec looks for a system's FFmpeg, and without one lerobot decodes by PyAV.
    """
    links.mkdir(exist_ok=True)
    for library in folder.glob("lib/python*/site-packages/av.libs/lib*.so.*"):
        match = re.fullmatch(r"(lib(?:av|sw)[a-z]+)-[0-9a-f]+\.so\.(\d+)[.\d]*", library.name)
        if match is not None:
            (links / f"{match[1]}.so.{match[2]}").symlink_to(library)
