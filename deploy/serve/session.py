"""What the policy server keeps of one client, and how a message becomes a question for the policy.

A client of openpi sends one observation at a time; those of a connection are its history, in an `Agent`. What the
policy is told it may send as words, under the observation's name or, as openpi has it, under `prompt`. `RemotePolicy`
sends whole histories, and beside them under `wire.EXTRA`:

    reset      true: a new episode begins with this observation
    history    true: the observations are [To, …]; nothing is remembered
    noise      [H, A], the noise that denoising begins with
    generator  the state of what draws the noise of the steps; the answer has it as it then is
    running    [n, A], what the running chunk has from now on: the answer continues it (real-time chunking)
    delay      control steps that the answer is expected to take
    guidance   how strongly it is continued: the fields of `prediction.Guidance`
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np

from action_diffusion.deploy.loop.prediction import METHODS, Guidance
from action_diffusion.deploy.serve.wire import EXTRA, decode_array, shortened
from action_diffusion.envs.rollout import generators
from action_diffusion.errors import InputError, unknown
from action_diffusion.policy import noise
from action_diffusion.policy.action_queue import MASKS
from action_diffusion.policy.agent import Agent
from action_diffusion.policy.spec import PolicySpec
from action_diffusion.policy.text.words import Words

PROMPT = "prompt"
EXTRAS = ("reset", "history", "noise", "generator", "running", "delay", "guidance")
MAX_ROUNDS = 20
"""Of guidance in a denoising step: a client must not keep the others waiting."""
MAX_BETA = 1e6


@dataclass(frozen=True, eq=False)
class Question:
    """What the policy is asked: histories key → [1, To, …], with whatever the message said about noise and guidance."""

    obs: dict[str, np.ndarray]
    noise_generator: Any
    generator: Any
    """What draws the noise of the steps: of the episode, or as the message has it; the answer then has it too."""
    returns_generator: bool = False
    noise: np.ndarray | None = None
    running: np.ndarray | None = None
    delay: int = 0
    guidance: Guidance = field(default_factory=Guidance)
    whole: bool = False
    """Whether the answer is to have the whole chunk as well."""

    @property
    def generators(self) -> tuple[Any, Any]:
        return self.noise_generator, self.generator


class ClientSession:
    """One connection: its history, and its noise.

    Args:
        seed: every episode draws the noise that `envs.rollout` draws for this start; None: a new one each time.
        remember: observations come at every control step, so that the last To are the history. False: they come once a
            chunk, too far apart to be one, and each stands for its whole history, as at the start of an episode.
        words: what the policy is told where the client says nothing.
    """

    def __init__(
        self, *, spec: PolicySpec, seed: int | None = None, remember: bool = True, words: Words | None = None
    ) -> None:
        self._spec = spec
        self._words = words or Words.of(spec)
        self._seed = seed
        self._remember = remember
        self._agent = Agent(n_obs_steps=spec.n_obs_steps, n_action_steps=spec.n_action_steps)
        self._reset()

    def _reset(self) -> None:
        self._agent.reset()
        fresh = np.random.SeedSequence().generate_state(1)[0] if self._seed is None else self._seed
        self.noise_generator, self.generator = generators(int(fresh))

    def take(self, message: Mapping[str, object]) -> Question:
        """The question that a message asks; a single observation is remembered.

        Raises `InputError` for a message that does not fit the policy, and then remembers nothing of it. Keys that the
        policy does not take are left alone: robots send prompts and cameras that are for others.
        """
        extra = _extra(message.get(EXTRA, {}))
        whole_history = _flag(extra, "history")
        obs = self._observations(message, (self._spec.n_obs_steps,) if whole_history else ())
        options = self._options(extra)
        if _flag(extra, "reset"):
            self._reset()
        if not whole_history:
            if not self._remember:
                self._agent.reset()
            self._agent.observe(obs)
            obs = self._agent.history()
        options.setdefault("generator", self.generator)
        rows = {key: value[None] for key, value in obs.items()}
        return Question(rows, self.noise_generator, whole=bool(extra), **options)

    def _observations(self, message: Mapping[str, object], leading: tuple[int, ...]) -> dict[str, np.ndarray]:
        obs = {}
        for key, spec in self._spec.observations.items():
            said = message.get(key, message.get(PROMPT, ""))
            if spec.text is not None and isinstance(said, str):
                told = replace(self._words, instruction=said or self._words.instruction)
                obs[key] = np.broadcast_to(told.vectors()[key], (*leading, *spec.shape))
                continue
            if key not in message:
                got = shortened(", ".join(name for name in message if name != EXTRA) or "nothing")
                raise InputError(
                    f"observation {key!r} is missing: the policy takes {', '.join(self._spec.observations)}; got {got}"
                )
            value = decode_array(message[key], f"observation {key!r}")
            expected = (*leading, *spec.shape)
            if value.shape != expected:
                raise InputError(
                    f"observation {key!r} has shape {list(value.shape)}, the policy takes {list(expected)}"
                )
            if spec.kind == "image" and value.dtype != np.uint8:
                raise InputError(f"observation {key!r} has dtype {value.dtype}, images are uint8 from 0 to 255")
            obs[key] = value.copy() if spec.kind == "image" else _finite(value, f"observation {key!r}")
        return obs

    def _options(self, extra: Mapping[str, object]) -> dict[str, Any]:
        n_actions, horizon = self._spec.action.shape[0], self._spec.horizon
        options: dict[str, Any] = {}
        if "noise" in extra:
            options["noise"] = _finite(decode_array(extra["noise"], "noise"), "noise")[None]
            if options["noise"].shape[1:] != (expected := self._spec.noise_shape):
                raise InputError(f"noise has shape {list(options['noise'].shape[1:])}, not {list(expected)}")
        if "generator" in extra:
            options["generator"] = _generator(decode_array(extra["generator"], "generator"))
            options["returns_generator"] = True
        if "running" in extra:
            options["running"] = _finite(decode_array(extra["running"], "running"), "running")
            shape = options["running"].shape
            if len(shape) != 2 or shape[0] > horizon or shape[1] != n_actions:
                raise InputError(f"running has shape {list(shape)}, not [at most {horizon}, {n_actions}]")
        if "delay" in extra:
            options["delay"] = _whole(extra["delay"], "delay", horizon)
        if "guidance" in extra:
            options["guidance"] = _guidance(extra["guidance"], horizon)
        return options


def _extra(value: object) -> Mapping[str, object]:
    if not isinstance(value, dict):
        raise InputError(f"{EXTRA} is {shortened(value)}, not a map of {', '.join(EXTRAS)}")
    for key in value:
        if key not in EXTRAS:
            raise unknown(f"entry of {EXTRA}", shortened(key), EXTRAS)
    return value


def _flag(extra: Mapping[str, object], name: str) -> bool:
    value = extra.get(name, False)
    if not isinstance(value, bool):
        raise InputError(f"{name} is {shortened(value)}, not true or false")
    return value


def _whole(value: object, what: str, most: int) -> int:
    if type(value) is not int or not 0 <= value <= most:
        raise InputError(f"{what} is {shortened(value)}, not a whole number from 0 to {most}")
    return value


def _finite(value: np.ndarray, what: str) -> np.ndarray:
    """`value` as float32; `InputError` where it then holds NaN or infinity."""
    with np.errstate(over="ignore", invalid="ignore"):
        value = value.astype(np.float32)
    if not np.isfinite(value).all():
        raise InputError(f"{what} holds NaN or infinite values")
    return value


def _generator(state: np.ndarray) -> Any:
    generator = noise.generator()
    try:
        noise.set_state(generator, state)
    except InputError:
        raise InputError("generator is not the state of a torch.Generator on a CPU") from None
    return generator


def _guidance(value: object, horizon: int) -> Guidance:
    """`prediction.Guidance` from a map of its fields, each of which has the default's type."""
    names = [item.name for item in fields(Guidance)]
    if not isinstance(value, dict):
        raise InputError(f"guidance is {shortened(value)}, not a map of {', '.join(names)}")
    kinds: dict[str, tuple[type, ...]] = {
        "method": (str,),
        "mask": (str,),
        "beta": (int, float),
        "rounds": (int,),
        "overlap": (int, type(None)),
        "pin": (bool,),
    }
    choices = {"method": METHODS, "mask": MASKS}
    for key, entry in value.items():
        if key not in names:
            raise unknown("entry of guidance", shortened(key), names)
        if not isinstance(entry, kinds[key]) or isinstance(entry, bool) != (key == "pin"):
            raise InputError(f"guidance {key} is {shortened(entry)}")
        if entry not in choices.get(key, [entry]):
            raise unknown(f"rtc.{key}", shortened(entry), choices[key])
    _whole(value.get("rounds", 0), "guidance rounds", MAX_ROUNDS)
    if value.get("overlap") is not None:
        _whole(value["overlap"], "guidance overlap", horizon)
    if not 0 < value.get("beta", 1) <= MAX_BETA:
        raise InputError(f"guidance beta is {shortened(value['beta'])}, not a number above 0 and at most {MAX_BETA:g}")
    return Guidance(**value)
