"""Bundles to deploy, and `action-diffusion deploy` in this process or one of its own."""

from __future__ import annotations

import json
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from processes import Forked
from tiny import TINY

from action_diffusion.deploy.ipc.channels import Phase
from action_diffusion.deploy.ipc.rings import RingReader, shared_folder
from action_diffusion.options import Deploy, configuration
from action_diffusion.policy import bundle as bundles
from action_diffusion.policy.build import build_policy
from action_diffusion.policy.extensions.extension import Fitted, write
from action_diffusion.policy.model.normalizer import fit
from action_diffusion.policy.spec import ActionSpec, ObservationSpec, PolicySpec

TO, TA, HORIZON = 2, 4, 8


def save_bundle(path: Path, *, encoder: Mapping[str, Any] | None = None, **changes: Any) -> Path:
    """A tiny policy with random weights, on PushT's states; `changes` go to its specification."""
    corners = np.array([[200.0, 200.0, 200.0, 200.0, -3.0], [300.0, 300.0, 300.0, 300.0, 3.0]])
    values: dict[str, Any] = {
        "observations": {"state": ObservationSpec(shape=(5,), source="state")},
        "action": ActionSpec(shape=(2,), unit="px"),
        "n_obs_steps": TO,
        "horizon": HORIZON,
        "n_action_steps": TA,
        "control_rate": 10.0,
        "task": "pusht_state",
        "env": {"name": "pusht", "max_steps": 12},
        "normalizer": {"state": fit(corners), "action": fit(corners[:, :2])},
    }
    torch.manual_seed(0)
    config = TINY | {"features": {}, "encoder": encoder or TINY["encoder"]}
    bundles.save(path, build_policy(config, PolicySpec(**values | changes)), {"policy": config})
    return path


def add_guard(bundle: Path, horizon: int = HORIZON) -> None:
    """Fit a guard by hand that finds everything unusual that is not in the middle of what was demonstrated."""
    arrays = {
        "conditions": np.zeros((1, TO * 5)),
        "scale": np.ones(TO * 5),
        "noise": np.ones((1, horizon, 2)),
        "grid": np.array([[50.0, 0.7, 0.7]]),
        "thresholds": np.array([1e6, 1.0, 0.1, 2.0]),
    }
    write(bundle, "guard", Fitted({"chunk": True}, {name: value.astype(np.float32) for name, value in arrays.items()}))


def deploy(bundle: Path, output_dir: Path, *options: str) -> Deploy:
    words = [f"bundle={bundle}", f"output_dir={output_dir}", "device=cpu", *options]
    settings: Deploy = configuration.settings("deploy", words)
    return settings


def read_log(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def save_image_bundle(path: Path, observations: dict[str, ObservationSpec], normalizer: dict[str, Any]) -> None:
    encoder = {"name": "observation", "width": 0.25, "stages": 1}
    values: dict[str, Any] = {"observations": observations, "normalizer": normalizer, "task": "", "env": None}
    save_bundle(path, encoder=encoder, action=ActionSpec(shape=(2,)), **values)


def until(condition: Callable[[], Any], seconds: float = 30.0) -> Any:
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return found


class Deployment:
    """`action-diffusion deploy`, or another `command` that moves a robot, in a process of its own, with its page."""

    def __init__(self, bundle: Path | str, output_dir: Path, *options: str, command: str = "deploy") -> None:
        words = [f"bundle={bundle}", f"output_dir={output_dir}", "device=cpu", "page=true", *options]
        self.process = Forked(
            *("-m", "action_diffusion", command, *words), stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        assert self.process.stdout is not None
        self.lines: list[str] = []
        self._reader = threading.Thread(target=lambda: self.lines.extend(self.process.stdout or []), daemon=True)
        self._reader.start()
        said = until(lambda: [line for line in self.lines if "page: http" in line] or self.process.poll(), 60)
        assert isinstance(said, list), self.lines
        self.url = said[0].split()[-1]
        self.folder = next(shared_folder().glob(f"action-diffusion-{self.process.pid}-*"))
        self.steps, self.setpoints = RingReader(self.folder / "steps"), RingReader(self.folder / "setpoints")

    @property
    def phase(self) -> Phase:
        record = self.setpoints.latest()
        return Phase(int(record.values["phase"])) if record is not None else Phase.STILL

    def goes_on(self, n: int = 8) -> None:
        """That many further steps come, all on time."""
        before = self.steps.count
        until(lambda: self.steps.count >= before + n, 10)

    def end(self) -> int:
        self.process.send_signal(signal.SIGINT)
        code = self.process.wait(30)
        self._reader.join(5)
        return code
