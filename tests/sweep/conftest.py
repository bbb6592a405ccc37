"""Sweeps whose runs are a stand-in's."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from pathlib import Path

import pytest

from action_diffusion.cli import main
from action_diffusion.policy import bundle
from action_diffusion.training.sweep import job

HERE = Path(__file__).resolve().parent


class Sweeping:
    """`action-diffusion sweep train`, of the stand-in, into `folder`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __call__(self, *words: str, command: str = "train") -> int:
        return main(["sweep", command, *words, f"output_dir={self.folder}"])

    def interrupted(self, waiting: str, *words: str) -> int:
        """The same, with Ctrl-C as soon as the run `waiting` waits."""

        def press() -> None:
            while not list(self.folder.glob(f"runs/{waiting}-*/waits")):
                time.sleep(0.05)
            os.kill(os.getpid(), signal.SIGINT)

        thread = threading.Thread(target=press, daemon=True)
        thread.start()
        code = self(*words)
        thread.join()
        return code

    def starts(self) -> dict[str, int]:
        """How often each run was begun, by its name without the hash."""
        logs = {path.parent.name: path.read_text() for path in self.folder.glob("runs/*/log.txt")}
        return {name.rpartition("-")[0]: text.count("begun with") for name, text in logs.items()}

    def run(self, name: str) -> Path:
        (found,) = self.folder.glob(f"runs/{name}-*")
        return found


@pytest.fixture
def sweep(tmp_path, monkeypatch) -> Sweeping:
    monkeypatch.setattr(job, "PROGRAM", (sys.executable, str(HERE / "stand_in.py")))
    return Sweeping(tmp_path / "sweep")


@pytest.fixture
def first_bundle(tmp_path, policy, tiny_config) -> Path:
    """Of a tiny policy, for words that name one."""
    bundle.save(tmp_path / "bundle", policy, {"policy": tiny_config})
    return tmp_path / "bundle"
