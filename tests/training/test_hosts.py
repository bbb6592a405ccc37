"""Training on two hosts, which are network namespaces here: they train as one does, and who is gone is noticed."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import processes
import pytest
import torch
from namespaces import Pair, pair
from processes import Forked
from tiny import demonstrations

from action_diffusion.errors import InputError
from action_diffusion.policy.model.shares import Share, drawn
from action_diffusion.training.hosts import Hosts, Place

SMALL = [
    "device=cpu",
    "policy.denoiser.channels=[8,16]",
    "policy.denoiser.time_dim=16",
    "train.validate_every=0",
    "train.rollout_every=0",
    "train.tensorboard=false",
    "dataset.val_windows=16",
    "dataset.val_fraction=0.2",
    "evaluation.n_episodes=0",
]
LONG = ["train.max_steps=100000", "train.batch_size=16", "train.checkpoint_every=5"]
ONE = os.environ | {"OMP_NUM_THREADS": "1"}
GONE = "is gone: it was killed, or its host or the network failed. Go on from the last checkpoint"


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("data") / "demos.zarr"
    demonstrations().save(path)
    return path


@pytest.fixture
def hosts():
    with pair() as connected:
        yield connected


def words(data: Path, output: Path, *extra: str) -> list[str]:
    return ["train", f"data={data}", f"output_dir={output}", *SMALL, *extra]


def losses(output: Path, key: str = "loss") -> list[float]:
    file = output / "metrics.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    return [row[key] for row in rows if key in row]


class Run:
    """The same command on both hosts. codes, said: exit codes and what went to stderr, once both have ended."""

    def __init__(self, hosts: Pair, folder: Path, *commands: list[str], **environment: str) -> None:
        folder.mkdir(exist_ok=True)
        self.files = [folder / f"stderr{host}" for host in (0, 1)]
        self.processes: list[Forked] = []
        for host, command in enumerate(commands * (2 if len(commands) == 1 else 1)):
            with self.files[host].open("w") as file:
                env = hosts.environment(host) | environment
                self.processes.append(hosts.start(host, *command, stderr=file, stdout=file, env=env))

    def until(self, output: Path, condition: Callable[[Path], Any]) -> None:
        ends = time.monotonic() + 60
        while not condition(output):
            assert time.monotonic() < ends, self.said
            assert all(process.poll() is None for process in self.processes), self.said
            time.sleep(0.05)

    def codes(self, within: float = 120) -> list[int]:
        try:
            return [process.wait(within) for process in self.processes]
        finally:
            for process in self.processes:
                process.kill()

    @property
    def said(self) -> list[str]:
        return [file.read_text() for file in self.files]


def saved(output: Path) -> bool:
    return any((output / "checkpoints").glob("step_*")) if output.exists() else False


@pytest.mark.slow
def test_one_two_and_four_processes_learn_the_same(data, hosts, tmp_path):
    """With the same batch together: 32 in one process, 16 on each of two hosts, 8 in each of four processes."""
    steps = ["train.max_steps=10", "train.lr=1e-2", "train.warmup=0", "train.validate_every=10"]
    more = [*steps, "train.num_processes=4", "train.batch_size=8"]
    one = words(data, tmp_path / "1", *steps, "train.batch_size=32")
    assert processes.run("-m", "action_diffusion", *one, env=ONE).returncode == 0
    run = Run(hosts, tmp_path / "log", words(data, tmp_path / "2", *steps, "train.batch_size=16"))
    assert run.codes() == [0, 0], run.said
    done = processes.run("-c", FORKING, *words(data, tmp_path / "4", *more), env=ONE)
    assert done.returncode == 0, done.stderr
    for several in ("2", "4"):
        assert losses(tmp_path / several) == pytest.approx(losses(tmp_path / "1"), rel=1e-5)
        averaged, of_one = (losses(tmp_path / n, "validation_loss") for n in (several, "1"))  # that of the EMA
        assert averaged == pytest.approx(of_one, rel=1e-4)
    assert run.said[1].count("\n") <= 2  # one of them speaks


FORKING = """
import functools, sys
import torch.multiprocessing
from action_diffusion import cli
from action_diffusion.training import run
run.spawn = functools.partial(torch.multiprocessing.start_processes, start_method="fork")
sys.exit(cli.main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_bf16_and_accumulation_on_two_hosts(data, hosts, tmp_path):
    both = ["train.max_steps=10", "train.mixed_precision=bf16", "train.gradient_accumulation_steps=2"]
    run = Run(hosts, tmp_path / "log", words(data, tmp_path / "2", *both, "train.batch_size=16"))
    assert run.codes() == [0, 0], run.said
    one = words(data, tmp_path / "1", *both, "train.batch_size=32")
    assert processes.run("-m", "action_diffusion", *one, env=ONE).returncode == 0
    assert losses(tmp_path / "2") == pytest.approx(losses(tmp_path / "1"), rel=5e-3)


@pytest.mark.slow
def test_a_killed_host_ends_the_run_and_another_number_of_processes_goes_on(data, hosts, tmp_path):
    output = tmp_path / "run"
    run = Run(hosts, tmp_path / "log", words(data, output, *LONG))
    run.until(output, saved)
    os.killpg(run.processes[1].pid, signal.SIGKILL)
    killed = time.monotonic()
    assert run.processes[0].wait(30) == 75
    assert time.monotonic() - killed < 20
    assert run.said[0].count(f"error: process 1 on {socket.gethostname()} {GONE}") == 1
    assert "Traceback" not in run.said[0]
    step = int(sorted((output / "checkpoints").glob("step_*"))[-1].name[5:])
    alone = [f"output_dir={output}", "resume=true", f"train.max_steps={step + 5}", "train.batch_size=32"]
    done = processes.run("-m", "action_diffusion", "train", *alone, env=ONE)
    assert done.returncode == 0, done.stderr
    assert f"going on from step {step}" in done.stderr
    assert "in 1 processes instead of 2, 32 samples a step as before: not to the bit" in done.stderr


@pytest.mark.slow
def test_a_network_that_is_gone_ends_both_within_the_timeout(data, hosts, tmp_path):
    output = tmp_path / "run"
    run = Run(hosts, tmp_path / "log", words(data, output, *LONG, "train.host_timeout=5"))
    run.until(output, saved)
    hosts.unplug(1)
    began = time.monotonic()
    assert run.codes(40) == [75, 75]
    assert time.monotonic() - began < 25
    for said in run.said:
        assert said.count(GONE) == 1
        assert "Traceback" not in said


@pytest.mark.slow
def test_a_slow_host_is_waited_for(data, hosts, tmp_path):
    output = tmp_path / "run"
    run = Run(hosts, tmp_path / "log", words(data, output, *LONG[1:], "train.max_steps=40"))
    run.until(output, saved)
    os.killpg(run.processes[1].pid, signal.SIGSTOP)
    time.sleep(5)
    os.killpg(run.processes[1].pid, signal.SIGCONT)
    assert run.codes() == [0, 0], run.said
    assert len(losses(output)) == 4


@pytest.mark.slow
def test_hosts_that_differ_do_not_begin(data, hosts, tmp_path):
    other = tmp_path / "other.zarr"
    demonstrations(seed=1).save(other)
    for folder, theirs, line in (
        ("a", words(data, tmp_path / "x", *LONG, "train.lr=0.5"), "error: options of the hosts differ: train.lr is"),
        ("b", words(other, tmp_path / "y", *LONG), "error: data of the hosts differ: sha256 is"),
    ):
        ours = words(data, tmp_path / folder / "run", *LONG)
        run = Run(hosts, tmp_path / folder, ours, theirs)
        assert run.codes() == [2, 2], run.said
        assert line in run.said[1]
        assert "Traceback" not in "".join(run.said)
        assert not (tmp_path / folder / "run" / "metrics.jsonl").exists()


# Without a network of their own.

SLURM = {
    "srun": 'for i in 0 1; do SLURM_PROCID=$i SLURM_LOCALID=$i "$@" & p[$i]=$!; done\ntrap "kill -TERM ${p[*]}" TERM\n'
    "for i in 0 1 0 1; do wait ${p[$i]}; done\n"  # a signal ends a wait
    "for i in 0 1; do wait ${p[$i]}; c=$?; [ $c -gt $m ] && m=$c; done; exit $m",
    "scontrol": '[ $1 = show ] && printf "a\\nb\\n" || echo "$@" >> requeued',
    "action-diffusion": 'echo $RANK $LOCAL_RANK $WORLD_SIZE $MASTER_ADDR $MASTER_PORT "$@" >> started.$RANK\n'
    'trap "exit 130" TERM; [ $CODE = wait ] || exit $CODE; while :; do sleep 0.05; done',
}
"""What stands in for the commands that the script in the docs calls."""


@pytest.mark.parametrize(
    ("code", "restarts", "ends", "requeued"),
    [
        ("0", "0", 0, False),
        ("2", "0", 2, False),
        ("75", "0", 75, True),
        ("75", "20", 75, False),
        ("wait", "0", 130, True),
    ],
)
def test_the_script_for_slurm(tmp_path, code, restarts, ends, requeued):
    docs = (Path(__file__).parents[2] / "docs" / "scale.md").read_text()
    (tmp_path / "train.sh").write_text(docs.split("```sh\n#!/bin/bash\n")[1].split("```")[0])
    for name, text in SLURM.items():
        (tmp_path / name).write_text(f"#!/bin/bash\nm=0\n{text}\n")
        (tmp_path / name).chmod(0o755)
    given = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "2", "SLURM_JOB_NODELIST": "a,b", "SLURM_RESTART_COUNT": restarts}
    env = os.environ | given | {"CODE": code, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    script = subprocess.Popen(["bash", "train.sh"], cwd=tmp_path, env=env)
    started = [tmp_path / f"started.{rank}" for rank in (0, 1)]
    ending = time.monotonic() + 20
    while not all(file.exists() and file.read_text() for file in started):
        assert time.monotonic() < ending
        time.sleep(0.02)
    if code == "wait":
        time.sleep(0.3)  # until the traps are set
        script.send_signal(signal.SIGUSR1)
    assert script.wait(20) == ends
    for rank, file in enumerate(started):
        assert file.read_text().startswith(f"{rank} {rank} 2 a 20007 train task=custom")
        assert file.read_text().endswith("resume=true\n")
    assert (tmp_path / "requeued").exists() == requeued


@pytest.fixture
def port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        number: int = free.getsockname()[1]
        return number


def test_other_versions_are_named_on_every_host(port):
    found: dict[int, str] = {}

    def join(rank: int) -> None:
        hosts = Hosts(Place(rank, 2, "127.0.0.1", port), timeout=30, joining=10)
        with pytest.raises(InputError) as refused:
            hosts.join({}, {"python": "3.11.7", "torch": f"2.1{rank}"})
        found[rank] = str(refused.value)

    threads = [threading.Thread(target=join, args=(rank,)) for rank in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    name = socket.gethostname()
    line = f"versions of the hosts differ: torch is 2.10 for process 0 on {name}, 2.11 for process 1 on {name}"
    assert found == {0: line, 1: line}


def test_a_head_that_is_not_there_is_one_line(port):
    with pytest.raises(InputError, match=rf"process 0 at 127.0.0.1:{port} was not reached in 1 s .*MASTER_ADDR"):
        Hosts(Place(1, 2, "127.0.0.1", port), timeout=30, joining=1)


def test_a_process_that_does_not_come_is_named(port):
    hosts = Hosts(Place(0, 3, "127.0.0.1", port), timeout=30, joining=0.5)
    with pytest.raises(InputError, match=r"process 1, 2 of 3 did not come in 0.5 s"):
        hosts.join({}, {})


@pytest.mark.parametrize(
    ("given", "line"),
    [
        ({"RANK": "1"}, "WORLD_SIZE='' must be a whole number"),
        ({"RANK": "x", "WORLD_SIZE": "2", "MASTER_PORT": "1"}, "RANK='x' must be a whole number"),
        ({"RANK": "2", "WORLD_SIZE": "2", "MASTER_ADDR": "a", "MASTER_PORT": "1"}, "RANK=2 is none of WORLD_SIZE=2"),
        ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_PORT": "1"}, "MASTER_ADDR is not set"),
        ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "a", "MASTER_PORT": "70000"}, "MASTER_PORT=70000 is no port"),
        ({"ACCELERATE_USE_CPU": "True", "MASTER_ADDR": "a"}, "give --multi_gpu in its place"),
    ],
)
def test_an_environment_that_says_half_is_refused(monkeypatch, given, line):
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "ACCELERATE_USE_CPU"):
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match=line):
        Place.of_environment()


@pytest.mark.parametrize("times", [1, 4])
def test_processes_share_what_one_draws(times):
    """With 4 noises an example as well, one batch behind the other."""

    def draw(n: int, generator: torch.Generator | None) -> torch.Tensor:
        return torch.randn(n, 3, generator=generator)

    whole = draw(times * 6, torch.Generator().manual_seed(5)).view(times, 6, 3)
    shares = [Share(torch.device("cpu"), own=rank, together=5, rows=2, rank=rank, world=3) for rank in range(3)]
    parts = [drawn(draw, times * 2, share).view(times, 2, 3) for share in shares]
    assert torch.equal(torch.cat(parts, 1), whole)
    assert not torch.equal(draw(2, shares[0]), draw(2, shares[1]))  # and each has its own


def test_a_compiled_model_draws_the_same_of_a_share():
    def noisy(x: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        return x + drawn(lambda n, g: torch.randn(n, 3, generator=g), len(x), generator)

    x = torch.zeros(2, 3)
    plain, compiled = (
        call(x, Share(torch.device("cpu"), own=1, together=5, rows=2, rank=1, world=3))
        for call in (noisy, torch.compile(noisy, backend="eager"))
    )
    assert torch.equal(compiled, plain)
