"""Cheap mistakes are refused at once: before torch is imported, and before anything is computed."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from robomimic_files import write_robomimic, write_robosuite

from action_diffusion.datasets.storage.replay_buffer import ReplayBuffer
from action_diffusion.policy import bundle as bundles

MISTAKES = {
    "train data=nowhere.zarr": "nowhere.zarr: no such file or folder",
    "train data=nowhere": "unknown data set 'nowhere'",
    "train data=own.zarr task=custom policy.encoder.crop=[64,64]": "encoder.crop=[64, 64] is larger than the frames",
    "train data=own.zarr task=custom policy.encoder.crop=[8,64]": "encoder.crop=[8, 64] is larger than the frames",
    "train data=own.zarr task=lift_state": "unknown key of the buffer for observation 'object'",
    "train data=[own.zarr,nowhere.zarr] task=custom": "nowhere.zarr: no such file or folder",
    "train data=[own.zarr,own.zarr] task=custom": "data= names own.zarr twice",
    "train data=[own.zarr,other.zarr] task=custom": "other.zarr has no column front, which own.zarr has",
    "train data=[own.zarr,fast.zarr] task=custom drop=[front] dataset.weights=[1,2,3]": "dataset.weights has 3 values",
    "train data=own.zarr task=custom dataset.weights=[1,2]": "dataset.weights are of several data sets: give data=[A,",
    "train data=pusht_human dataset.weights=[1]": "dataset.weights are of several data sets: give data=[A,B]",
    "train data=[own.zarr,fast.zarr] dataset.weights=[0,0]": "dataset.weights: all weights are 0, so that nothing",
    "train data=[own.zarr,fast.zarr] dataset.weights=[1,-1]": "dataset.weights[1]=-1 must not be negative",
    "train data=[own.zarr,fast.zarr] dataset.weights=[1,nan]": "dataset.weights[1]=nan: expected a number",
    "train data=[own.zarr,fast.zarr] dataset.weights=[1,inf]": "dataset.weights[1]=inf: expected a number",
    "train data=[own.zarr,fast.zarr] dataset.weights=[1,a]": "dataset.weights[1]=a: expected a number",
    "train data=[own.zarr,fast.zarr] dataset.weights=[]": "dataset.weights has 0 values, expected 1 to 64",
    "train data=[own.zarr,fast.zarr] data.weights=[1,2]": "unknown option 'data.weights': did you mean dataset.weights",
    "train data=own.zarr task=custom dataset.task_weights={push:1}": "unknown task 'push' in dataset.task_weights of",
    "train data=own.zarr task=custom dataset.subset_weights={a:1}": "unknown subset 'a' in own.zarr",
    "train data=own.zarr task=custom dataset.subset_weights={a:-1}": "dataset.subset_weights.a=-1 must not be negative",
    "train data=own.zarr task=custom dataset.task_weights={}": "dataset.task_weights has 0 values, expected 1 to",
    "train dataset.task_weights={a:1} dataset.subset_weights={b:1}": "are both given: a window is drawn by one of them",
    "train data=own.zarr task=custom drop=[fron]": "unknown observation 'fron' in drop of own.zarr: did you mean front",
    "train data=own.zarr task=custom drop=[front,state]": "drop=[front,state] leaves no observation of own.zarr",
    "train drop=[state] data=pusht_expert": "drop=[state]: policy.features is made from it; give policy.features=null",
    "train drop=[stat]": "unknown observation 'stat' in drop of ",
    "train data=own.zarr task=custom task.observations.wrist=null": "unknown observation 'wrist' in drop of own.zarr",
    "train data=junk task=custom": "junk: no known format",
    "train data=runs task=custom": "data convert in=runs out=runs.zarr action=COLUMN,COLUMN state=COLUMN,COLUMN",
    "train data=own.hdf5 task=lift_state": "'robot0_eef_pos' in own.hdf5: did you mean robot0_gripper_qpos?",
    "train data=states.hdf5 task=lift_state": "action-diffusion data convert in=states.hdf5 out=states.zarr",
    "train data=own.zarr task=custom task.action.source=absolute_action": "action-diffusion data absolute in=own.zarr",
    "train drop=[state] policy.features=null policy.action_frame={name:pose,position:state@2}": "policy.action_frame",
    "train policy.action_frame=pose": "{name: pose, position: …}",
    "train policy.action_frame={name:pose}": "policy.action_frame.position is missing",
    "train policy.action_frame={name:pose,position:[]}": "policy.action_frame.position has 0 values",
    "train policy.action_frame={name:pose,position:a,observed:none}": "policy.action_frame.observed=none: choose from",
    "train policy.action_frame=position": "{name: position, observation: …, columns: …, action_columns: …}",
    "train task.env.name=pushd": "unknown task.env.name 'pushd': did you mean pusht?",
    "train task.env.max_steps=-1": "task.env.max_steps=-1 must be at least 1",
    "train task.env.max_step=3": "unknown option 'max_step' in task.env: did you mean max_steps?",
    "train init=nowhere": "no bundle at nowhere",
    "train objective=consistency": "objective=consistency learns from a policy: policy.objective.teacher=",
    "train objective=distillation": "objective=distillation learns from a policy: policy.objective.teacher=",
    "train objective=distillation policy.objective.teacher=nowhere": "no bundle at nowhere",
    "train objective=distillation policy.sampler.num_inference_steps=2": "num_inference_steps=2 must be 1: objective",
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
    "evaluate bundle=own data=other.zarr": "unknown key of the buffer for 'state' of own",
    "evaluate bundle=own data=[other.zarr,nowhere.zarr]": "unknown key of the buffer for 'state' of own",
    "evaluate bundle=own data=fast.zarr": "fast.zarr has 30 steps a second, own's control_rate is 10: take demonstr",
    "train data=fast.zarr task=custom task.control_rate=10": "data convert in=fast.zarr out=fast_copy.zarr rate=10",
    "train data=own.zarr task=custom output_dir=run": "run already holds a run: give resume=true to go on with it",
    "evaluate bundle=own sampler.timestep_spacing=karras": "sampler.timestep_spacing=karras: choose from leading,",
    "evaluate bundle=simulated sampler.num_inference_steps=1000": "error: sampler.num_inference_steps=1000 for ddim",
    "evaluate bundle=simulated sampler.scheduler=flow": "error: sampler.scheduler=flow is of the flow family, but the",
    "evaluate bundle=simulated sampler.shift=2": "error: sampler option not known to ddim: shift",
    "evaluate bundle=simulated output_dir=run/evaluated": "run/evaluated already holds an evaluation: give another out",
    "evaluate bundle=simulated output_dir=run/compared": "run/compared already holds an evaluation: give another out",
    "train policy.sampler.num_inference_steps=1000": "error: policy.sampler.num_inference_steps=1000 for ddim must",
    "train policy.sampler.num_inference_steps=7": "policy.sampler.num_inference_steps=7 does not divide 100 training",
    "deploy bundle=nowhere": "no bundle at nowhere",
    "deploy bundle=own sampler.num_inference_steps=1000": "error: sampler.num_inference_steps=1000 for ddim must be",
    "deploy server=ws://127.0.0.1:9 sampler.eta=0": "sampler.eta is for whoever predicts: give it to action-diffusion",
    "deploy bundle=own output_dir=run/deployed": "run/deployed already holds a log: give another output_dir",
    "deploy bundle=seven": "bundle=seven does not fit robot=sim_pusht: an action of 7 values is no command: the arm",
    "deploy bundle=own robot=sim_arm": "robot=sim_arm does lift, can, square; this is no simulated task",
    "deploy bundle=seven robot=ur hardware=ur.yaml": "an action of 7 values is no command: the arm takes 6",
    "deploy bundle=own robot=ur hardware=junk.yaml": "arm ur: ",
    "deploy bundle=faster": "meant for 20 Hz, the robot takes commands at 10 Hz",
    "deploy bundle=seven robot=own_arm:Arm hardware=cell.yaml": "an action of 7 values is no command: the arm takes 6",
    "deploy bundle=own robot=own_arm:Arms hardware=cell.yaml": "arm own_arm:Arms: module 'own_arm' has no attribute",
    "deploy bundle=own hardware=nowhere.yaml": "hardware=nowhere.yaml: no such file or folder",
    "deploy": "bundle is required: action-diffusion deploy bundle=…, or server=ws://HOST:PORT",
    "deploy bundle=own robot=sim_push": "unknown robot 'sim_push': did you mean sim_pusht?",
    "deploy bundle=own robot=ur": "hardware=FILE.yaml is missing: what the arm and its cameras are",
    "deploy bundle=own scheduling=fast": "unknown scheduling 'fast': choose from ensemble, naive, rtc, sync",
    "deploy replay=nowhere": "replay=nowhere: no such file or folder",
    "collect output=x.zarr agent=teleop robot=urr": "unknown robot 'urr': did you mean ur?",
    "serve bundle=nowhere": "no bundle at nowhere",
    "serve bundle=own sampler.num_inference_steps=1000": "error: sampler.num_inference_steps=1000 for ddim must be",
    "serve bundle=own host=0.0.0.0": "host=0.0.0.0 lets other machines in: give token_file=PATH, or set",
    "deploy bundle=own page_host=0.0.0.0": "page_host=0.0.0.0 lets other machines in: give page_token_file=PATH",
    "collect output=x.zarr visited_by=nowhere": "no bundle at nowhere",
}

OWN_ARM = """\
from action_diffusion.deploy.hardware.protocols import Group

class Arm:
    def __init__(self):
        self.command = (Group(name="joints", size=6, kind="linear", unit="rad"),)
"""
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
    seven = shutil.copytree(folder / "own", folder / "seven")
    spec = json.loads((seven / "spec.json").read_text())
    spec["action"]["shape"] = [7]
    (seven / "spec.json").write_text(json.dumps(spec))
    faster = shutil.copytree(folder / "own", folder / "faster")
    (faster / "spec.json").write_text(
        json.dumps(json.loads((faster / "spec.json").read_text()) | {"control_rate": 20.0})
    )
    (folder / "own_arm.py").write_text(OWN_ARM)
    (folder / "cell.yaml").write_text("arm: {}\n")
    (folder / "ur.yaml").write_text("arm: {host: 127.0.0.1, model: ur5e}\n")
    (folder / "junk.yaml").write_text("arm: {hosts: 127.0.0.1}\n")
    columns: dict[str, np.ndarray] = {
        "front": np.zeros((20, 32, 48, 3), np.uint8),
        "state": np.zeros((20, 5), np.float32),
    }
    ReplayBuffer.from_arrays(columns | {"action": np.zeros((20, 2), np.float32)}, [10, 20]).save(folder / "own.zarr")
    del columns["front"], columns["state"]
    ReplayBuffer.from_arrays(columns | {"action": np.zeros((20, 2), np.float32)}, [10, 20]).save(folder / "other.zarr")
    rows = {"state": np.zeros((20, 5), np.float32), "action": np.zeros((20, 2), np.float32)}
    ReplayBuffer.from_arrays(rows, [10, 20], attrs={"control_rate": 30.0}).save(folder / "fast.zarr")
    for name in ("junk", "runs", "run"):
        (folder / name).mkdir()
    (folder / "run" / "metrics.jsonl").write_text('{"step": 10}\n')
    for name in ("evaluated/results.json", "compared/comparison/results.json", "deployed/log.jsonl"):
        (folder / "run" / name).parent.mkdir(parents=True)
        (folder / "run" / name).write_text("{}\n")
    (folder / "runs" / "run_0.csv").write_text("x,target_x\n0,1\n1,2\n")
    write_robomimic(folder / "own.hdf5")
    write_robosuite(folder / "states.hdf5")
    there = {path.name for path in folder.iterdir()}
    words = json.dumps(list(MISTAKES))
    done = subprocess.run([sys.executable, "-c", EACH], input=words, capture_output=True, text=True, cwd=folder)
    assert done.returncode == 0, done.stderr
    assert {path.name for path in Path(folder).iterdir()} <= {*there, "said", "outputs"}
    return json.loads(done.stdout)


@pytest.mark.slow
@pytest.mark.parametrize("line", MISTAKES)
def test_a_cheap_mistake_is_refused_before_torch_is_imported(line, found):
    code, said, seconds, torch_is_there = found[line]
    assert code == 2, said
    assert MISTAKES[line] in said
    assert said.count("\n") == 1
    assert seconds < 2
    assert not torch_is_there
