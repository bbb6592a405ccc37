"""A policy that thinks on another machine: `RemotePolicy` predicts what the policy behind a server predicts.

Every question has all that its answer depends on, whole histories, the initial noise and the running chunk, so that
nothing is lost with a connection, and a server's answer is the local policy's. A thread of its own connects again:

    connected ──(closed, reset, no answer for `timeout`)──▶ lost ──(0.1 s, 0.2 s, … `MAX_WAIT`)──▶ connected
    predict: a chunk                                        predict: raises `Unavailable` at once
"""

from __future__ import annotations

import contextlib
import random
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import numpy as np

from action_diffusion.deploy.loop.inference_worker import Unavailable
from action_diffusion.deploy.serve.access import authorization
from action_diffusion.deploy.serve.wire import EXTRA, decode_array, pack, require, shortened, unpack
from action_diffusion.errors import InputError
from action_diffusion.policy.noise import draw, set_state, state_of
from action_diffusion.policy.spec import PolicySpec

if TYPE_CHECKING:
    from websockets.sync.client import ClientConnection

    from action_diffusion.policy.diffusion.sampler import Hook
    from action_diffusion.policy.sample import Prefix

LOOK_SECONDS = 0.05
"""So often it looks whether the connection is there still: when a question comes, another one is there already."""
FIRST_WAIT, MAX_WAIT = 0.1, 2.0
"""Seconds between two attempts to connect: doubled from the one to the other, each up to a quarter longer by chance."""
MOST_SECONDS = 3600.0
PING_SECONDS = 20.0
STATUS = {
    401: "it asks for a token, and not for this one",
    503: "it has as many connections as it takes, or a proxy has no server",
}


class RemotePolicy:
    """The policy behind `action-diffusion serve` at `url`; `spec` is its specification.

    Args:
        url: ws://HOST:PORT, with /NAME for one of several policies; wss:// through a proxy that encrypts.
        token: what the server asks for.
        timeout: seconds that an answer, and a connection, may take (> 0).
        patience: seconds in which the first connection must come about.
        say: takes a line whenever the connection is lost or there again.

    Raises:
        InputError: where the first connection does not come about, or is not to such a server.
    """

    def __init__(
        self,
        url: str,
        *,
        token: str | None = None,
        timeout: float = 5.0,
        patience: float = 10.0,
        say: Callable[[str], None] = lambda line: print(line, file=sys.stderr),
    ) -> None:
        _check_url(url)
        if not 0 < timeout <= MOST_SECONDS:
            raise InputError(f"server_timeout={timeout} must be above 0 s and at most {MOST_SECONDS:g}")
        self._url, self._token, self._timeout, self._say = url, token, timeout, say
        lost = require("websockets.exceptions").WebSocketException
        self._lost = (OSError, EOFError, UnicodeError, lost)  # UnicodeError: a name that no host can have
        self._connect = require("websockets.sync.client").connect
        self._changed = threading.Condition()
        self._reason = "not connected yet"
        self.timing: dict[str, object] = {}
        """What the server said of its last answer: `infer_ms`, and `wait_ms` for the policy to be free."""
        self._closing = False
        self._connection: ClientConnection | None
        self._connection, self.spec = self._first(patience)
        self._keeper = threading.Thread(target=self._keep, name="policy server", daemon=True)
        self._keeper.start()

    def predict(
        self,
        obs: Mapping[str, np.ndarray],
        *,
        noise: np.ndarray | None = None,
        noise_generator: Any = None,
        generator: Any = None,
        prefix: Prefix | None = None,
        hooks: Sequence[Hook] = (),
        running: Sequence[np.ndarray | None] | None = None,
        delay: Sequence[int] | None = None,
        guidance: Mapping[str, object] | None = None,
    ) -> dict[str, np.ndarray]:
        """`action` [(B,) Ta, A], `action_pred` [(B,) H, A] and notes, to whatever `DiffusionPolicy.predict` takes.

        The initial noise is `noise`, or is drawn here from `noise_generator`, on a CPU. `generator` draws that of the
        steps: its state travels there and back, row by row; where there is none the server has its own. What is only
        known to the network's code cannot travel: `hooks` and `prefix` are refused, and chunks continue a running one
        by `running` and `delay`, see `policy.rtc.continuing`, with the fields of `prediction.Guidance`.

        Raises `Unavailable` where there is no answer, and `InputError` for what the policy does not take.
        """
        if prefix is not None or len(hooks):
            raise InputError(f"{self._url}: hooks and prefix steps do not travel: give running, delay and guidance")
        batched = self.spec.check(obs)
        rows = {key: np.asarray(obs[key] if batched else np.asarray(obs[key])[None]) for key in self.spec.observations}
        n, shape = len(next(iter(rows.values()))), (self.spec.horizon, *self.spec.action.shape)
        noise = self._noise(noise, noise_generator, (n, *self.spec.noise_shape))
        drawing = _of_rows(generator, n)
        answers = []
        for row, steps in enumerate(drawing):
            extra: dict[str, object] = {"history": True, "noise": noise[row]}
            if steps is not None:
                extra["generator"] = state_of(steps)
            rest = None if running is None else running[row]
            if rest is not None and len(rest):
                extra |= {"running": np.asarray(rest, np.float32)[: shape[0]], "guidance": self._guidance(guidance)}
                extra["delay"] = 0 if delay is None else min(int(delay[row]), shape[0])
            answers.append(self._ask(self._row(rows, row) | {EXTRA: extra}))
            if steps is not None:
                self._advance(steps, answers[-1])
        chunks = np.stack([self._array(answer, "action_pred", shape) for answer in answers]).astype(np.float32)
        now = self.spec.n_obs_steps - 1
        actions = chunks[:, now : now + self.spec.n_action_steps]
        made = self._notes(answers) | {"action": actions, "action_pred": chunks}
        return made if batched else {name: value[0] for name, value in made.items()}

    def continuing(
        self, running: Sequence[np.ndarray | None], delay: Sequence[int], guidance: Mapping[str, object]
    ) -> dict[str, object]:
        """Options of `predict` for chunks that continue others: the server does it (`loop.prediction`)."""
        return {"running": running, "delay": delay, "guidance": guidance}

    def _noise(self, given: np.ndarray | None, generator: Any, shape: tuple[int, ...]) -> np.ndarray:
        """[B, H, A]."""
        if given is None:
            return draw(shape, generator)
        if np.shape(given) != shape:
            raise InputError(f"noise has shape {list(np.shape(given))}, not {list(shape)}")
        return np.asarray(given, np.float32)

    def _guidance(self, given: Mapping[str, Any] | None) -> dict[str, object]:
        """As the server takes it: no overlap is longer than a chunk."""
        values = dict(given or {})
        if values.get("overlap") is not None:
            values["overlap"] = min(values["overlap"], self.spec.horizon)
        return values

    def close(self) -> None:
        """Leave the server."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._keeper.join(self._timeout + 2)

    def _row(self, obs: Mapping[str, np.ndarray], row: int) -> dict[str, object]:
        kinds = {key: np.uint8 if spec.kind == "image" else np.float32 for key, spec in self.spec.observations.items()}
        return {key: np.asarray(obs[key][row], kind) for key, kind in kinds.items()}

    def _ask(self, message: Mapping[str, object]) -> dict[str, object]:
        connection = self._connection
        if connection is None:
            raise Unavailable(f"no connection to {self._url}: {self._reason}")
        try:
            connection.send(pack(message))
            answer = connection.recv(timeout=self._timeout)
        except self._lost as error:
            reason = f"no answer in {self._timeout:g} s" if isinstance(error, TimeoutError) else _said(error)
            self._drop(connection, reason)
            raise Unavailable(f"lost {self._url}: {reason}") from None
        if isinstance(answer, str):
            if answer.startswith("refused: "):
                raise InputError(f"{self._url} refused: {shortened(answer.removeprefix('refused: '), 300)}")
            raise Unavailable(f"{self._url} {shortened(answer, 300)}")
        try:
            decoded = unpack(answer)
        except InputError as error:
            raise Unavailable(f"{self._url}: {error}") from None
        timing = decoded.get("server_timing")
        self.timing = timing if isinstance(timing, dict) else {}
        return decoded

    def _array(self, answer: Mapping[str, object], name: str, shape: tuple[int, ...]) -> np.ndarray:
        try:
            value = decode_array(answer.get(name), f"{self._url}: {name}")
        except InputError as error:
            raise Unavailable(str(error)) from None
        if value.shape != shape:
            raise Unavailable(f"{self._url}: {name} has shape {list(value.shape)}, not {list(shape)}")
        return value.copy()

    def _notes(self, answers: Sequence[Mapping[str, object]]) -> dict[str, np.ndarray]:
        """What the extensions of the server's policy say of each row, name → float32 [B]."""
        rows = [answer.get("notes", {}) for answer in answers]
        numbers = [
            {name: value for name, value in row.items() if isinstance(name, str) and isinstance(value, int | float)}
            for row in rows
            if isinstance(row, dict)
        ]
        if numbers != rows or any(row.keys() != numbers[0].keys() for row in numbers):
            raise Unavailable(f"{self._url}: notes are {shortened(rows[0])}, not numbers by name")
        return {name: np.array([row[name] for row in numbers], np.float32) for name in numbers[0]}

    def _advance(self, generator: Any, answer: Mapping[str, object]) -> None:
        state = self._array(answer, "generator", state_of(generator).shape)
        try:
            set_state(generator, state)
        except InputError as error:
            raise Unavailable(f"{self._url}: generator: {_said(error)}") from None

    def _drop(self, connection: ClientConnection, reason: str) -> None:
        """Leave it to the other thread to connect again."""
        with self._changed:
            if self._connection is not connection:  # it was dropped already
                return
            self._reason, self._connection = reason, None
            self._changed.notify_all()
        self._say(f"lost {self._url}: {reason}; connecting again")

    def _keep(self) -> None:
        """Connect whenever there is no connection, until `close`."""
        wait = FIRST_WAIT
        current = self._connection
        while True:
            while not self._closing and (there := self._connection) is not None:
                if there.close_code is not None:
                    self._drop(there, "the connection ended")
                with self._changed:
                    self._changed.wait_for(lambda: self._closing or self._connection is None, LOOK_SECONDS)
            with contextlib.suppress(*self._lost):
                if current is not None:
                    current.close()
            if self._closing:
                return
            current = self._again()
            if current is not None:
                wait = FIRST_WAIT
                continue
            with self._changed:
                self._changed.wait_for(lambda: self._closing, wait * random.uniform(1.0, 1.25))
            wait = min(2 * wait, MAX_WAIT)

    def _again(self) -> ClientConnection | None:
        """One attempt: the connection, or None, and `_reason` says why."""
        try:
            connection, spec = self._open()
        except (*self._lost, InputError) as error:
            self._reason = _said(error)
            return None
        if difference := self.spec.difference(spec):
            self._reason = f"it serves another policy now: {difference}"
            connection.close()
            return None
        with self._changed:
            self._connection = connection
        self._say(f"connected to {self._url} again")
        return connection

    def _open(self) -> tuple[ClientConnection, PolicySpec]:
        opening = self._connect(
            self._url,
            additional_headers=authorization(self._token),
            compression=None,
            max_size=2**24,
            open_timeout=self._timeout,
            ping_interval=PING_SECONDS,
            ping_timeout=PING_SECONDS,
            close_timeout=1,
            proxy=None,
        )
        connection = opening.__enter__()  # what opens it; ended by close()
        # Sending blocks where the other side has stopped reading: that, too, must end.
        seconds = struct.pack("ll", int(self._timeout), int(self._timeout % 1 * 1e6))
        connection.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, seconds)
        try:
            return connection, _spec(unpack(connection.recv(timeout=self._timeout)), self._url)
        except BaseException:
            connection.close()
            raise

    def _first(self, patience: float) -> tuple[ClientConnection, PolicySpec]:
        began = time.monotonic()
        while True:
            try:
                return self._open()
            except self._lost as error:
                if _status(error) is not None or time.monotonic() - began >= patience:
                    raise InputError(f"no policy server at {self._url}: {_said(error)}") from None
                time.sleep(FIRST_WAIT)


def _of_rows(generator: Any, n: int) -> Sequence[Any]:
    """Whose turn it is in each row."""
    if isinstance(generator, Sequence):
        if len(generator) != n:
            raise InputError(f"{len(generator)} generators for {n} rows; give one, or one per row")
        return generator
    return [generator] * n


def _check_url(url: str) -> None:
    """Raises `InputError` for what is no address of a server."""
    try:
        parts = urlsplit(url)
        good = parts.scheme in ("ws", "wss") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # brackets that do not close, a port that is none
        good = False
    if not good or any(character.isspace() for character in url):
        raise InputError(f"server={url}: write ws://HOST:PORT, with a port from 1 to 65535")


def _spec(metadata: Mapping[str, Any], url: str) -> PolicySpec:
    if metadata.get("policy") != "action-diffusion":
        raise InputError(f"{url} is no server of ours: it does not say what its policy takes")
    return PolicySpec.from_json({key: value for key, value in metadata.items() if key != "policy"}, url)


def _said(error: Exception) -> str:
    """Why, in one line."""
    response: Any = getattr(error, "response", None)
    status = _status(error)
    text = str(error) if status is None else STATUS.get(status, str(error))
    if status == 404:  # the server says which policies it has
        text = (response.body or b"").decode("utf-8", "replace")
    return shortened(text, 300) or type(error).__name__


def _status(error: Exception) -> int | None:
    """Of the HTTP answer that a server gave instead of a connection."""
    status: int | None = getattr(getattr(error, "response", None), "status_code", None)
    return status
