"""Cheap mistakes are refused at once: before torch is imported, and before anything is computed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from action_diffusion.datasets.storage.replay_buffer import ReplayBuffer
from action_diffusion.policy import bundle as bundles

MISTAKES = {
    "train data=nowhere.zarr": "nowhere.zarr: no such file or folder",
    "train data=nowhere": "unknown data set 'nowhere'",
    "train data=own.zarr task=custom policy.encoder.crop=[64,64]": "encoder.crop=[64, 64] is larger than the frames",
    "train data=own.zarr task=custom policy.encoder.crop=[8,64]": "encoder.crop=[8, 64] is larger than the frames",
    "train data=own.zarr task=lift_state": "unknown key of the buffer for observation 'object'",
    "train task.env.name=pushd": "unknown task.env.name 'pushd': did you mean pusht?",
    "train task.env.max_steps=-1": "task.env.max_steps=-1 must be at least 1",
    "train task.env.max_step=3": "unknown option 'max_step' in task.env: did you mean max_steps?",
    "train init=nowhere": "no bundle at nowhere",
    "train policy.encoder.weights=nowhere.safetensors": "policy.encoder.weights=nowhere.safetensors: no such file",
    "train task.horizon=1000000": "task.horizon=1000000 must be at most 1,024",
    "train device=meta": "device=meta must be a word, such as auto",
    "train policy.action_frame={name:position,observation:state}": "policy.action_frame.columns is missing",
    "evaluate bundle=nowhere": "no bundle at nowhere",
    "evaluate bundle=own compare=nowhere": "no bundle at nowhere",
    "evaluate bundle=own compare=own": "own/config.yaml: data is missing",
    "evaluate bundle=own compare=simulated": "simulated is for a task with a simulator, own is not",
    "evaluate bundle=[own,simulated]": "simulated is for a task with a simulator, own is not",
    "evaluate bundle=own data=nowhere.zarr": "data=nowhere.zarr: no such file or folder",
    "evaluate bundle=own sampler.timestep_spacing=karras": "sampler.timestep_spacing=karras: choose from leading,",
    "deploy bundle=nowhere": "no bundle at nowhere",
    "deploy bundle=own hardware=nowhere.yaml": "hardware=nowhere.yaml: no such file or folder",
    "serve bundle=nowhere": "no bundle at nowhere",
    "collect output=x.zarr visited_by=nowhere": "no bundle at nowhere",
}

EACH = """\
import json, sys, time
from action_diffusion import cli
found = {}
for line in json.load(sys.stdin):
    began = time.process_time()
    sys.stderr = open("said", "w")
    code = cli.main(line.split())
    sys.stderr.close()
    found[line] = code, open("said").read(), time.process_time() - began, "torch" in sys.modules
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> dict[str, list]:
    """What came of each mistake, in one process: exit code, words, seconds, whether torch was imported."""
    from tiny import TINY, demonstrations, tiny_policy

    folder = tmp_path_factory.mktemp("mistakes")
    policy = tiny_policy(demonstrations())
    bundles.save(folder / "simulated", policy, {"policy": TINY})
    object.__setattr__(policy.spec, "env", None)
    bundles.save(folder / "own", policy, {"policy": TINY})
    columns = {"front": np.zeros((20, 32, 48, 3), np.uint8), "state": np.zeros((20, 5), np.float32)}
    ReplayBuffer.from_arrays(columns | {"action": np.zeros((20, 2), np.float32)}, [10, 20]).save(folder / "own.zarr")
    words = json.dumps(list(MISTAKES))
    done = subprocess.run([sys.executable, "-c", EACH], input=words, capture_output=True, text=True, cwd=folder)
    assert done.returncode == 0, done.stderr
    assert {path.name for path in Path(folder).iterdir()} <= {"own", "own.zarr", "simulated", "said", "outputs"}
    return json.loads(done.stdout)


@pytest.mark.parametrize("line", MISTAKES)
def test_a_cheap_mistake_is_refused_before_torch_is_imported(line, found):
    code, said, seconds, torch_is_there = found[line]
    assert code == 2, said
    assert MISTAKES[line] in said
    assert said.count("\n") == 1
    assert seconds < 2
    assert not torch_is_there
