"""Environments of their own for whom we are measured beside: made once, outside of the checkout, and kept.

    ~/.cache/action-diffusion/peers/lerobot-0.6.1/     or under $ACTION_DIFFUSION_PEER
        bin/python       with the peer and what it needs: 8.5 GB for a lerobot, most of it torch's
        ffmpeg/          links to the FFmpeg libraries in PyAV's wheel, under the names that torchcodec looks for
        complete.json    written last; without it the folder is a torn installation, and is made anew

An installation takes minutes, all of it network and disk.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from action_diffusion.errors import InputError
from action_diffusion.files import atomic_path, cache_folder, locked, remove, require_space, writing

VARIABLE = "ACTION_DIFFUSION_PEER"
Say = Callable[[str], None]


@dataclass(frozen=True)
class Peer:
    """What an environment is made of.

    requirements: of pip. gigabytes: room that the installation takes at most, with what pip unpacks on the way.
    python: the oldest that will do. shared: its packages are imported by our own Python, which looks for them last, so
    that the environment is of that Python.
    """

    requirements: tuple[str, ...]
    gigabytes: float
    python: tuple[int, int] = (3, 11)
    shared: bool = False


OLDER, NEWER, RUNTIMES = "lerobot==0.4.4", "lerobot==0.6.1", "runtimes"
PEERS = {
    OLDER: Peer(("lerobot[pusht]==0.4.4", "torch<2.11", "diffusers<0.36"), 12.0),
    NEWER: Peer(("lerobot[dataset,diffusion,evaluation,pusht,training]==0.6.1",), 12.0, python=(3, 12)),
    RUNTIMES: Peer(
        ("onnx==1.23.2", "onnxscript==0.7.2", "onnxruntime==1.32.0", "openvino==2026.4.1"), 2.0, shared=True
    ),
}


@dataclass(frozen=True)
class PeerEnvironment:
    """A complete environment."""

    folder: Path

    @property
    def python(self) -> Path:
        return self.folder / "bin" / "python"

    @property
    def packages(self) -> Path:
        """Where its packages are."""
        return next(self.folder.glob("lib/python*/site-packages"))

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


def default_folder(name: str = OLDER) -> Path:
    """Where the environment of a peer is: in $ACTION_DIFFUSION_PEER (or it itself), or in the user's cache."""
    given = os.environ.get(VARIABLE)
    folder = Path(given).expanduser() if given else cache_folder() / "peers"
    if _complete(folder, PEERS[name]):
        return folder
    version = f"-python{sys.version_info[0]}.{sys.version_info[1]}" if PEERS[name].shared else ""
    return folder / (name.replace("==", "-") + version)


def peer_environment(name: str, folder: Path | None = None, *, say: Say = print) -> PeerEnvironment:
    """The environment of the peer `name` in `folder` (default: `default_folder`), installed now where not complete.

    Raises `InputError` where it cannot be made: no Python, no network, no room, a package that does not build.
    """
    folder = (folder or default_folder(name)).absolute()
    with locked(folder):
        if not _complete(folder, PEERS[name]):
            if folder.exists() and not (folder / "pyvenv.cfg").exists() and any(folder.iterdir()):
                raise InputError(f"{folder} is no Python environment and not empty: set {VARIABLE} to another folder")
            _install(name, folder, say)
    return PeerEnvironment(folder)


def is_there(name: str) -> bool:
    """Whether the environment of a peer is installed."""
    return _complete(default_folder(name), PEERS[name])


def _complete(folder: Path, peer: Peer) -> bool:
    try:
        return json.loads((folder / "complete.json").read_text())["requirements"] == list(peer.requirements)
    except (OSError, ValueError, KeyError):
        return False


def _install(name: str, folder: Path, say: Say) -> None:
    peer, began = PEERS[name], time.monotonic()
    python = _python(peer.python, name)
    say(f"installing {name} once, in an environment of its own (some minutes): {folder}")
    require_space(folder.parent, int(peer.gigabytes * 1e9), f"the environment of {name} (another folder: {VARIABLE})")
    log = folder.with_name(f"{folder.name}.log")
    with writing(str(folder)):
        remove(folder)
        log.unlink(missing_ok=True)
    _run([python, "-m", "venv", str(folder)], log, say)
    pip = [str(folder / "bin" / "python"), "-m", "pip", "install", "--disable-pip-version-check", "--progress-bar=off"]
    _run([*pip, *peer.requirements], log, say)
    link_ffmpeg(folder, folder / "ffmpeg")
    with atomic_path(folder / "complete.json") as temporary:
        temporary.write_text(json.dumps({"requirements": list(peer.requirements)}) + "\n")
    say(f"installed in {time.monotonic() - began:.0f} s")


def _python(least: tuple[int, int], name: str) -> str:
    """A Python of at least this version: this one, or one of the PATH or of pyenv. Raises `InputError`."""
    if sys.version_info >= least:
        return sys.executable
    for minor in range(least[1], least[1] + 3):
        found = shutil.which(f"python{least[0]}.{minor}")
        others = sorted(Path.home().glob(f".pyenv/versions/{least[0]}.{minor}.*/bin/python"))
        for python in [*([found] if found else []), *map(str, others)]:
            if subprocess.run([python, "-c", "import ensurepip, venv"], capture_output=True).returncode == 0:
                return python
    raise InputError(
        f"{name} needs Python {least[0]}.{least[1]}, and there is none: put python{least[0]}.{least[1]} on the PATH, "
        "or leave that peer out (--peer)"
    )


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
        raise InputError(f"the environment cannot be made: {error}") from error
    if process.wait() != 0:
        raise InputError(f"the environment cannot be made: {last or 'no reason given'} (all of it: {log})")


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
