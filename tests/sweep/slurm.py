"""A stand-in for Slurm's command line: `sbatch`, `srun`, `sacct`, `scancel` and `scontrol requeue` of one machine.

It is put on the PATH under these names. Jobs are processes; what is known of them lies in $SLURM_STAND_IN: JOB.json
with how to start it again and its process, JOB.state with its state, as sacct says it.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

PLACE = Path(os.environ["SLURM_STAND_IN"])


def sbatch(words: list[str]) -> int:
    script = Path(words[-1])
    text = script.read_text()
    number = str(1000 + len(list(PLACE.glob("*.json"))))
    found = re.search(r"^#SBATCH --array=0-(\d+)", text, re.MULTILINE)
    tasks = [None] if found is None else range(int(found[1]) + 1)
    for task in tasks:
        name = number if task is None else f"{number}_{task}"
        kept = PLACE / f"{name}.sh"
        kept.write_text(text)
        env = {"SLURM_JOB_ID": number} if task is None else {"SLURM_JOB_ID": name.replace("_", "00")}
        env |= {} if task is None else {"SLURM_ARRAY_JOB_ID": number, "SLURM_ARRAY_TASK_ID": str(task)}
        start(name, env)
    print(f"Submitted batch job {number}")
    return 0


def start(name: str, env: dict[str, str]) -> None:
    """Run a job behind, and write its state when it ends, unless it was begun again meanwhile."""
    (PLACE / f"{name}.state").write_text("RUNNING")
    words = [sys.executable, __file__, "--run", name]
    quiet: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    ignore = functools.partial(signal.signal, signal.SIGUSR2, signal.SIG_IGN)  # it is not for the batch script
    process = subprocess.Popen(words, env=os.environ | env, start_new_session=True, preexec_fn=ignore, **quiet)
    (PLACE / f"{name}.json").write_text(json.dumps({"env": env, "pid": process.pid}))


def run(name: str) -> int:
    code = subprocess.call(["bash", str(PLACE / f"{name}.sh")])
    if json.loads((PLACE / f"{name}.json").read_text())["pid"] == os.getpid():
        (PLACE / f"{name}.state").write_text("COMPLETED" if code == 0 else "FAILED")
    return code


def srun(words: list[str]) -> int:
    """Options, then a command; %j, %A, %a and %t are filled in the places of its output."""
    places, rest = {}, list(words)
    while rest[0].startswith("--"):
        option = rest.pop(0)
        if option in ("--output", "--error"):
            places[option] = rest.pop(0)
    number, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    filled = {"%j": os.environ["SLURM_JOB_ID"], "%A": number or "", "%a": task or "", "%t": "0"}
    for option, place in places.items():
        for sign, value in filled.items():
            place = place.replace(sign, value)
        Path(place).parent.mkdir(parents=True, exist_ok=True)
        os.dup2(os.open(place, os.O_WRONLY | os.O_CREAT | os.O_APPEND), 1 if option == "--output" else 2)
    os.execvp(rest[0], rest)


def sacct(words: list[str]) -> int:
    print("JobID|State|NodeList")
    for file in sorted(PLACE.glob("*.state")):
        print(f"{file.stem}|{file.read_text()}|here")
    return 0


def scancel(words: list[str]) -> int:
    """All processes of a job are told: SIGTERM, or `--signal`."""
    name, number = words[0], signal.SIGTERM
    if "--signal" in words:
        number = signal.Signals[words[words.index("--signal") + 1].removeprefix("SIG").join(("SIG", ""))]
    for pid in below(json.loads((PLACE / f"{name}.json").read_text())["pid"]):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)
    return 0


def below(pid: int) -> list[int]:
    """A process and all that it started, as Slurm knows those of a job."""
    started = subprocess.run(["ps", "-o", "pid=", "--ppid", str(pid)], stdout=subprocess.PIPE, text=True).stdout.split()
    return [pid, *(one for child in started for one in below(int(child)))]


def scontrol(words: list[str]) -> int:
    assert words[0] == "requeue"
    start(words[1], json.loads((PLACE / f"{words[1]}.json").read_text())["env"])
    return 0


if __name__ == "__main__":
    if sys.argv[1:2] == ["--run"]:
        sys.exit(run(sys.argv[2]))
    commands = {"sbatch": sbatch, "srun": srun, "sacct": sacct, "scancel": scancel, "scontrol": scontrol}
    sys.exit(commands[Path(sys.argv[0]).name](sys.argv[1:]))
