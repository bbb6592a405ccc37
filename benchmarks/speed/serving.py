"""What a policy server adds to a prediction: the time on the way, over loopback, to a server in a process of its own.

    python -m benchmarks.speed.serving [output=FILE.json] [n=200] [bundle=DIR]

Without bundle=, two untrained policies with the networks that `train` makes for PushT: from states, and from two 96×96
images and a position. Calls are made in turn, one local, one with a single observation as openpi's client sends it,
one with a whole history by `RemotePolicy`. What is added is the client's time for the call, less what the policy took.
FILE.json gets a row for each: {"policy", "client", "message_bytes", "total_ms", "added_ms", "local_ms"}, each time as
its median and 95th percentile. Exit code: 0, 2 for bad input.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from action_diffusion.deploy.serve import wire
from action_diffusion.deploy.serve.client import RemotePolicy
from action_diffusion.envs.rollout import generators
from action_diffusion.errors import InputError
from action_diffusion.files import atomic_path
from action_diffusion.options import configuration
from action_diffusion.policy import bundle as bundles
from action_diffusion.policy.build import build_policy
from action_diffusion.policy.model.normalizer import fit
from action_diffusion.policy.spec import ActionSpec, ObservationSpec, PolicySpec
from benchmarks.command import command, options, whole

DEFAULTS = {"bundle": "", "n": "200", "output": ""}
STATE = {"state": ObservationSpec(shape=(5,), source="state")}
CAMERA = ObservationSpec(shape=(96, 96, 3), dtype="uint8", kind="image", source="image")
IMAGES = {"front": CAMERA, "wrist": CAMERA, "agent_pos": ObservationSpec(shape=(2,), source="agent_pos")}
WITHOUT = ("features", "action_frame", "estimator")
"""Parts of PushT's policies that say where the T is."""


def untrained(folder: Path, task: str, observations: Mapping[str, ObservationSpec]) -> Path:
    """A bundle in `folder` of the size that `train task=…` makes, with random weights."""
    config = configuration.load("train", [f"task={task}"])["policy"]
    config = {key: value for key, value in config.items() if key not in WITHOUT} | {"features": {}}
    corners = {
        key: np.array([np.zeros(value.shape), np.full(value.shape, 512.0)]) for key, value in observations.items()
    }
    corners["action"] = np.array([[0.0, 0.0], [512.0, 512.0]])
    keys = ("action", *(key for key, value in observations.items() if value.kind == "state"))
    normalizer = {key: fit(corners[key]) for key in keys}
    sizes: dict[str, Any] = {"n_obs_steps": 2, "horizon": 16, "n_action_steps": 8, "control_rate": 10.0}
    spec = PolicySpec(
        observations=dict(observations), action=ActionSpec(shape=(2,)), normalizer=normalizer, task=task, **sizes
    )
    bundles.save(folder, build_policy(config, spec), {"policy": config})
    return folder


@contextmanager
def serving(bundle: Path) -> Iterator[str]:
    """`action-diffusion serve` with one thread; gives its address."""
    command = [
        sys.executable,
        "-c",
        "import torch; torch.set_num_threads(1); from action_diffusion.cli import main; main()",
    ]
    process = subprocess.Popen(
        [*command, "serve", f"bundle={bundle}", "port=0", "device=cpu"], stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        for line in process.stdout:
            found = re.search(r"ws://\S+?:\d+", line)
            if found:
                yield found[0]
                return
        raise InputError(f"the server of {bundle} did not start")
    finally:
        process.terminate()
        process.communicate()


def measure(bundle: Path, n: int) -> list[dict[str, Any]]:
    """The rows of one bundle, of `n` calls each."""
    policy = bundles.load(bundle, precision="fp32")
    spec = policy.spec
    random = np.random.default_rng(0)
    one = {key: (random.random(value.shape) * 255).astype(value.dtype) for key, value in spec.observations.items()}
    history = {key: np.stack([value] * spec.n_obs_steps)[None] for key, value in one.items()}
    noise, steps = generators(0)
    noises: dict[str, Any] = {"noise_generator": [noise], "generator": [steps]}
    with serving(bundle) as url, wire.require("websockets.sync.client").connect(url, compression=None) as plain:
        remote = RemotePolicy(url)
        plain.recv()

        def ask_plain() -> float:
            plain.send(wire.pack(one))
            answer: Any = wire.unpack(plain.recv())
            return float(answer["server_timing"]["infer_ms"])

        def ask_remote() -> float:
            remote.predict(history, **noises)
            timing: Any = remote.timing
            return float(timing["infer_ms"])

        def ask_local() -> float:
            policy.predict(history, **noises)
            return 0.0

        calls: dict[str, Callable[[], float]] = {"local": ask_local, "openpi": ask_plain, "RemotePolicy": ask_remote}
        times: dict[str, list[tuple[float, float]]] = {name: [] for name in calls}
        for i in range(n + 10):
            for name, call in calls.items():
                began = time.perf_counter()
                inference = call()
                total = 1e3 * (time.perf_counter() - began)
                if i >= 10:  # the first ones warm up
                    times[name].append((total, total - inference))
        remote.close()
    extra = {
        "history": True,
        "noise": np.zeros((spec.horizon, *spec.action.shape), np.float32),
        "generator": noises["generator"][0].get_state().numpy(),
    }
    whole = {key: value[0] for key, value in history.items()} | {wire.EXTRA: extra}
    sizes = {"openpi": len(wire.pack(one)), "RemotePolicy": len(wire.pack(whole))}
    local = _spread([total for total, _ in times["local"]])
    return [
        {
            "policy": spec.task,
            "client": name,
            "message_bytes": sizes[name],
            "total_ms": _spread([total for total, _ in times[name]]),
            "added_ms": _spread([added for _, added in times[name]]),
            "local_ms": local,
        }
        for name in sizes
    ]


def _spread(values: Sequence[float]) -> dict[str, float]:
    median, p95 = np.percentile(values, [50, 95])
    return {"median": round(float(median), 3), "p95": round(float(p95), 3)}


@command
def main(words: Sequence[str]) -> int:
    given = options(words, DEFAULTS)
    n = whole("n", given["n"])
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        if given["bundle"]:
            paths = [Path(given["bundle"])]
        else:
            paths = [
                untrained(Path(folder) / "state", "pusht_state", STATE),
                untrained(Path(folder) / "image", "pusht_image", IMAGES),
            ]
        rows = [row for path in paths for row in measure(path, n)]
    print("policy, client: bytes, ms median / 95 %: the call, of which added on the way; a local call")
    for row in rows:
        times = "   ".join(
            f"{row[name]['median']:.2f} / {row[name]['p95']:.2f}" for name in ("total_ms", "added_ms", "local_ms")
        )
        print(f"{row['policy']}, {row['client']}: {row['message_bytes']}   {times}")
    if given["output"]:
        with atomic_path(Path(given["output"])) as temporary:
            temporary.write_text(json.dumps(rows, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
