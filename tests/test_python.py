"""docs/python.md: its blocks run, as one program, on demonstrations and a smaller network."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import processes
import pytest
from tiny import demonstrations

from action_diffusion.errors import InputError
from action_diffusion.options import Action, Policy, Sampler, Task, Train, TrainSettings, plain

PAGE = Path(__file__).resolve().parents[1] / "docs" / "python.md"


@pytest.mark.slow
def test_the_page_runs(tmp_path):
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert len(blocks) == 4
    assert max(len(block.strip().splitlines()) for block in blocks) <= 16
    demonstrations(length=30).save(tmp_path / "demos.zarr")
    code = "\n".join(blocks).replace("[48, 96, 192]", "[8, 16]").replace("max_steps=2000", "max_steps=3, batch_size=8")
    code = (
        code.replace('{"name": "pusht"}', '{"name": "pusht", "max_steps": 20}')
        .replace("100004", "100001")
        .replace('"demos.zarr", task', '"demos.zarr", device="cpu", evaluation=options.Evaluation(n_episodes=1), task')
    )
    done = processes.run("-c", code, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "evaluation" / "report.html").exists()
    steps = [json.loads(line) for line in (tmp_path / "deployed" / "log.jsonl").read_text().splitlines()]
    assert len(steps) == 20


def test_typed_options_are_checked():
    task = Task(name="mine", n_obs_steps=2, horizon=8, n_action_steps=4, action=Action())
    parts: dict[str, Any] = {"encoder": {"name": "observation"}, "denoiser": {"name": "unet1d", "channels": [8]}}
    parts |= {"process": {"name": "diffusion"}, "objective": {"name": "denoising"}, "normalizer": {"default": "minmax"}}
    with pytest.raises(InputError, match=r"policy\.sampler\.num_inference_steps"):
        Policy(**parts, sampler=Sampler(scheduler="ddim", num_inference_steps=0))
    policy = Policy(**parts, sampler=Sampler(scheduler="ddim", num_inference_steps=10))
    policy.sampler.num_inference_steps = 0
    with pytest.raises(InputError, match=r"policy\.sampler\.num_inference_steps"):
        plain(Train(data="x", task=task, policy=policy, train=TrainSettings(max_steps=1)))
