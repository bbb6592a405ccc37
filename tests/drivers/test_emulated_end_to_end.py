"""The whole way on an emulated SO-101, by the commands that a user types: demonstrations, a policy, and its run."""

from __future__ import annotations

import subprocess
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from emulated_arms import LEROBOT
from processes import Forked

from action_diffusion import cli
from action_diffusion.datasets.storage.growing import read_table
from action_diffusion.datasets.storage.replay_buffer import ReplayBuffer
from action_diffusion.deploy.ipc import processes
from action_diffusion.deploy.sim.feetech import Bus, calibration, files, so101

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (LEROBOT / "lerobot").exists(), reason="no lerobot: see test_lerobot.py"),
]

TOLD = [*np.linspace(0, 10, 6), *[10.0] * 6]
"""Of the first joint (°): it goes, and stays for half a second, in which the arm comes to rest."""
MOTOR = 360 / 4095
"""A step of a motor, as lerobot counts it (°)."""
ROBOT = ["robot=lerobot", "hardware=emulated/cell.yaml", "page=false"]
TINY = ["policy.denoiser.channels=[16]", "policy.denoiser.time_dim=16", "task.horizon=8", "task.n_action_steps=4"]
TRAIN = ["train.max_steps=2", "train.tensorboard=false", "evaluation.n_episodes=0", "device=cpu", *TINY]


def forked(words: list[str], *, env: dict[str, str], **_: Any) -> Forked:
    """The same process without its imports: of lerobot's 5 s, torch takes 4."""
    return Forked(*words[1:], env=env)


def test_demonstrations_a_policy_and_its_run_on_one_arm(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(LEROBOT))
    monkeypatch.chdir(tmp_path)
    starting = SimpleNamespace(**vars(subprocess) | {"Popen": forked})
    monkeypatch.setattr(processes, "subprocess", starting)
    script = "".join(f"{a} {a / 2} {-a} 0 0 {50 + a}\n" for a in TOLD)
    (tmp_path / "drive.txt").write_text(f"start\n{script}keep\n")

    def does(*words: str) -> str:
        assert cli.main(list(words)) == 0, capsys.readouterr()
        return capsys.readouterr().out

    with Bus(so101()) as bus:
        files(tmp_path / "emulated", bus)
        cell = tmp_path / "emulated" / "cell.yaml"
        cell.write_text(cell.read_text() + "seconds: 0.6\n")
        demonstrate = ["device=script", "script=drive.txt", "task.control_rate=10", "output=arm.zarr"]
        does("collect", "task=custom", "agent=teleop", *ROBOT, *demonstrate)
        recorded = ReplayBuffer.open(tmp_path / "arm.zarr")
        np.testing.assert_allclose(recorded["action"][1:, 0], TOLD[:-1], atol=1e-4)  # a row's is due at its own instant
        np.testing.assert_allclose(recorded["state"][-1], recorded["action"][-1], atol=MOTOR)

        does("train", "task=custom", "data=arm.zarr", "output_dir=policy", *TRAIN)

        sampler = ["device=cpu", "sampler.num_inference_steps=2"]
        does("deploy", "bundle=policy/bundle", *ROBOT, *sampler, "output_dir=run")
        setpoints = read_table(tmp_path / "run" / "record.zarr", "setpoints")["command"]
        assert len(np.unique(setpoints[:, 0])) > 3
        ranges = [each["range_min"] + each["range_max"] for each in calibration(bus.motors).values()]
        at = [(motor.goal - middle / 2) * MOTOR for motor, middle in zip(bus.motors.values(), ranges, strict=True)]
        np.testing.assert_allclose(at[:5], setpoints[-1, :5], atol=MOTOR)
        assert all(motor.torque for motor in bus.motors.values())
    assert "bit for bit" in does("deploy", "replay=run", "bundle=policy/bundle")
