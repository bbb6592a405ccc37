"""The emergency stop and the pause of the operator's page, while all that should not matter goes on beside it.

    python -m benchmarks.robustness.faults [n=100] [bundle=DIR] [tabs=50] [floods=4] [strangers=1100] [busy=2] [seed=0]

`action-diffusion deploy` drives PushT with its page, which asks for a token, by the bundle's policy or an untrained
one. `tabs` further pages are open, `floods` sockets send points as fast as they can, `strangers` connections without a
token say nothing or half of something, and `busy` processes compute. Each of the n times somebody pauses and goes on,
then stops, in turn by the page's socket and by a request, clears the stop and starts. Measured from there to when the
arm's process begins to stop, and the loop to pause. Exit code: 0, 1 where a stop or a pause got lost or the 99th
percentile of the stop's is above 250 ms, 2 for bad input.
"""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import secrets
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np

from action_diffusion.deploy.ipc.channels import Phase, text
from action_diffusion.deploy.ipc.rings import Record, RingReader, shared_folder
from action_diffusion.deploy.loop.operator import Mode
from action_diffusion.errors import InputError
from benchmarks.command import command, options, whole
from benchmarks.speed.period import SPIN

WITHIN = 0.25
LOST = 5.0
"""Seconds after which a stop or a pause counts as lost."""
POINT = '{"order": "point", "values": [256, 256]}'


def untrained(path: Path) -> Path:
    """The bundle of a small policy that sees pictures of PushT and knows nothing, for episodes of an hour."""
    import torch

    from action_diffusion.policy import bundle as bundles
    from action_diffusion.policy.build import build_policy
    from action_diffusion.policy.model.normalizer import fit
    from action_diffusion.policy.spec import ActionSpec, ObservationSpec, PolicySpec

    corners = np.array([[200.0, 200.0], [300.0, 300.0]])
    config = {
        "normalizer": {"default": "minmax"},
        "features": {},
        "encoder": {"name": "observation", "backbone": "resnet18", "width": 0.25, "stages": 1},
        "denoiser": {"name": "unet1d", "channels": [8, 16], "time_dim": 16},
        "process": {"name": "diffusion", "prediction": "epsilon"},
        "sampler": {"scheduler": "ddim", "num_inference_steps": 5},
        "objective": {"loss": "mse"},
    }
    spec = PolicySpec(
        observations={
            "image": ObservationSpec(shape=(96, 96, 3), dtype="uint8", kind="image", source="image"),
            "agent_pos": ObservationSpec(shape=(2,), source="agent_pos"),
        },
        action=ActionSpec(shape=(2,), unit="px"),
        n_obs_steps=2,
        horizon=16,
        n_action_steps=8,
        control_rate=10.0,
        task="pusht_image",
        env={"name": "pusht", "max_steps": 36_000},
        normalizer={"agent_pos": fit(corners), "action": fit(corners)},
    )
    torch.manual_seed(0)
    bundles.save(path, build_policy(config, spec), {"policy": config})
    return path


# What should not matter, each in a process of its own.


def open_tabs(port: int, cookie: str, n: int) -> None:
    """Pages of `n` tabs: both sockets of each, and everything that comes is read."""
    from websockets.asyncio.client import connect

    async def read(path: str) -> None:
        address, headers = f"ws://127.0.0.1:{port}{path}", {"Cookie": cookie}
        async for live in connect(address, additional_headers=headers, proxy=None, compression=None):
            with contextlib.suppress(Exception):
                async for _ in live:
                    pass

    async def work() -> None:
        await asyncio.gather(*(read(path) for path in ("/live", "/stop") for _ in range(n)))

    asyncio.run(work())


def flood(port: int, cookie: str, n: int) -> None:
    """`n` sockets that send points without a pause, and come back when they are cut off."""
    from websockets.sync.client import connect

    def send() -> None:
        while True:
            with contextlib.suppress(Exception):
                address, headers = f"ws://127.0.0.1:{port}/live", {"Cookie": cookie}
                with connect(address, additional_headers=headers, proxy=None, compression=None) as live:
                    while True:
                        live.send(POINT)

    for _ in range(n):
        threading.Thread(target=send).start()


def strangers(port: int, cookie: str, n: int) -> None:
    """`n` connections without a token that stay: every second one says nothing, the others half a request."""
    held: dict[int, socket.socket] = {}
    while True:
        for index in range(n):
            with contextlib.suppress(OSError):
                if index in held and _is_open(held[index]):
                    continue
                held[index] = socket.create_connection(("127.0.0.1", port), timeout=1)
                held[index].setblocking(False)
                if index % 2:
                    held[index].send(b"GET /live HTTP/1.1\r\nHost: 127.0.0.1\r\n" if index % 4 == 1 else b"POST /emer")
        time.sleep(0.2)


def _is_open(connection: socket.socket) -> bool:
    try:
        return bool(connection.recv(4096))
    except BlockingIOError:
        return True


@contextmanager
def crowd(port: int, cookie: str, *, tabs: int, floods: int, strange: int, busy: int) -> Iterator[None]:
    """All of it, for as long as the block."""
    root = Path(__file__).resolve().parents[2]
    words = [
        f"from benchmarks.robustness.faults import *; {work}({port}, {cookie!r}, {n})"
        for work, n in (("open_tabs", tabs), ("flood", floods), ("strangers", strange))
        if n
    ]
    started = [subprocess.Popen([sys.executable, "-c", word], cwd=root) for word in words + busy * [SPIN]]
    try:
        yield
    finally:
        for process in started:
            process.kill()
            process.wait()


# Who stops and pauses.


class PersonAtPage:
    """At a page at `port`, whose run has its shared memory in `folder`; who may come in with `cookie`."""

    def __init__(self, folder: Path, port: int, cookie: str) -> None:
        from websockets.sync.client import connect

        self._port, self._headers = port, {"Cookie": cookie}
        self._events, self._setpoints = RingReader(folder / "events"), RingReader(folder / "setpoints")
        self._modes: RingReader | None = None
        if (folder / "modes").exists():
            self._modes = RingReader(folder / "modes")
        address, how = f"ws://127.0.0.1:{port}", {"additional_headers": self._headers, "proxy": None}
        self._live, self._stop = (connect(f"{address}{path}", **how).__enter__() for path in ("/live", "/stop"))  # type: ignore[arg-type]
        for each in (self._live, self._stop):
            threading.Thread(target=_drain, args=(each,), daemon=True).start()

    def request(self, path: str, body: str = "") -> None:
        """POST it."""
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=LOST)
        connection.request("POST", path, body, self._headers)
        connection.getresponse().read()

    def order(self, order: str) -> None:
        """Say it on the page's socket."""
        self._live.send(f'{{"order": "{order}"}}')

    @property
    def moves(self) -> bool:
        """Whether the arm may move."""
        record = self._setpoints.latest()
        return record is not None and int(record.values["phase"]) == Phase.MOVING

    def stop(self, *, by_request: bool) -> float | None:
        """Seconds until the arm's process began to stop; None where it did not."""
        before, moment = self._events.count, time.monotonic()
        if by_request:
            with contextlib.suppress(OSError, http.client.HTTPException):
                self.request("/emergency")
        else:
            self._stop.send("stop")
        return _seconds(lambda: self._said(before), moment)

    def _said(self, before: int) -> Record | None:
        new = self._events.after(before - 1)
        return next((event for event in new if text(event.values["why"]) == "emergency stop"), None)

    def pause(self) -> float | None:
        """Seconds until the loop paused; None where it did not."""
        assert self._modes is not None
        moment = time.monotonic()
        self.order("pause")
        return _seconds(lambda: self._in(Mode.PAUSED), moment)

    def _in(self, mode: Mode) -> Record | None:
        assert self._modes is not None
        record = self._modes.latest()
        return record if record is not None and int(record.values["mode"]) == mode else None

    def goes_on(self) -> None:
        """Start, until the policy commands. Raises `InputError` where it never does."""
        deadline = time.monotonic() + 60
        while self._in(Mode.POLICY) is None or not self.moves:
            self.order("start")
            time.sleep(0.3)
            if time.monotonic() > deadline:
                raise InputError("the loop does not go on")


def _drain(connection: Iterable[object]) -> None:
    """Read what comes, for as long as it does."""
    with contextlib.suppress(Exception):
        for _ in connection:
            pass


def _seconds(happened: Callable[[], Record | None], since: float) -> float | None:
    while (record := happened()) is None:
        if time.monotonic() - since > LOST:
            return None
        time.sleep(0.002)
    return max(0.0, record.t - since)


def words(bundle: Path, folder: Path) -> list[str]:
    """Of `action-diffusion deploy`: episodes that do not end by themselves, and a page that asks for a token."""
    run = [f"bundle={bundle}", f"output_dir={folder}/out", "n_episodes=100000", "scheduling=naive", "record=false"]
    return [*run, "page=true", f"page_token_file={folder}/token"]


@contextmanager
def deployment(bundle: Path, folder: Path) -> Iterator[tuple[Path, int, str]]:
    """`action-diffusion deploy` under way: its shared memory, the page's port, and the cookie for its token."""
    token = secrets.token_urlsafe()
    (folder / "token").write_text(token)
    line = [sys.executable, "-u", "-m", "action_diffusion", "deploy", *words(bundle, folder)]
    with (folder / "stderr").open("w") as file:
        loop = subprocess.Popen(line, stdout=subprocess.PIPE, stderr=file, text=True)
    try:
        assert loop.stdout is not None
        said = next((line for line in loop.stdout if "page: http" in line), None)
        if said is None:
            raise InputError(f"the loop did not start: {(folder / 'stderr').read_text().strip() or 'it said nothing'}")
        threading.Thread(target=loop.stdout.read, daemon=True).start()
        port = int(said.rpartition(":")[2])
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=LOST)
        connection.request("POST", "/session", headers={"Authorization": f"Api-Key {token}"})
        cookie = (connection.getresponse().getheader("Set-Cookie") or "").split(";")[0]
        yield next(shared_folder().glob(f"action-diffusion-{loop.pid}-*")), port, cookie
    finally:
        loop.kill()  # whatever it started ends when it is gone
        loop.wait()


def _summary(what: str, found: Sequence[float | None]) -> str:
    came = 1e3 * np.array([seconds for seconds in found if seconds is not None])
    if not len(came):
        return f"{what}: {len(found)} lost"
    median, p99 = np.percentile(came, [50, 99])
    lost = len(found) - len(came)
    return f"{what}: {len(found)}, {lost} lost; ms: median {median:.0f}, 99 % {p99:.0f}, largest {came.max():.0f}"


@command
def main(words: Sequence[str]) -> int:
    """See the module."""
    defaults = {"n": "100", "bundle": "", "tabs": "50", "floods": "4", "strangers": "1100", "busy": "2", "seed": "0"}
    given = options(words, defaults)
    n = whole("n", given["n"])
    many = {name: whole(name, given[name], least=0) for name in ("tabs", "floods", "strangers", "busy", "seed")}
    random = np.random.default_rng(many["seed"])
    stops: dict[bool, list[float | None]] = {False: [], True: []}
    pauses: list[float | None] = []
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        bundle = Path(given["bundle"]).resolve() if given["bundle"] else untrained(folder / "bundle")
        shared, port, cookie = stack.enter_context(deployment(bundle, folder))
        person = PersonAtPage(shared, port, cookie)
        around = {"tabs": many["tabs"], "floods": many["floods"], "strange": many["strangers"], "busy": many["busy"]}
        stack.enter_context(crowd(port, cookie, **around))
        time.sleep(5)
        for number in range(n):
            person.goes_on()
            time.sleep(random.uniform(0.2, 1.0))
            pauses.append(person.pause())
            person.goes_on()
            time.sleep(random.uniform(0.2, 1.0))
            by_request = bool(number % 2)
            stops[by_request].append(person.stop(by_request=by_request))
            person.request("/clear", "the area is safe")
            last = [stops[by_request][-1], pauses[-1]]
            took = ["lost" if seconds is None else f"{1e3 * seconds:.0f} ms" for seconds in last]
            print(f"{number + 1}: stop {took[0]}, pause {took[1]}", flush=True)
    print(_summary("stops by the page's socket", stops[False]))
    print(_summary("stops by a request", stops[True]))
    print(_summary("pauses", pauses))
    every = [*stops[False], *stops[True]]
    lost = sum(seconds is None for seconds in every + pauses)
    return 1 if lost or np.percentile(np.array(every, float), 99) > WITHIN else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
