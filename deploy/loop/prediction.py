"""The one call of a policy that deployment makes: chunks that, where asked to, continue those that run already."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, runtime_checkable

import numpy as np

from action_diffusion.deploy.loop.inference_worker import Unavailable
from action_diffusion.envs.rollout import Policy, generators
from action_diffusion.errors import InputError, unknown
from action_diffusion.policy.action_queue import BETA, MASKS, Request
from action_diffusion.policy.runtime.onnx_policy import OnnxPolicy
from action_diffusion.policy.spec import PolicySpec

if TYPE_CHECKING:
    from action_diffusion.policy.extensions.shared import SharedControl
    from action_diffusion.policy.policy import DiffusionPolicy

METHODS = ("auto", "guidance", "trained", "both")
SHARED_ROUNDS, SHARED_FADING = 1, 1
"""See `SharedControl`: what a person does now says where they go, and little of what they do next."""


@runtime_checkable
class PolicyElsewhere(Policy, Protocol):
    """A policy whose network is elsewhere: it is told what a chunk continues, and continues it there."""

    @property
    def spec(self) -> PolicySpec: ...

    def continuing(
        self, running: Sequence[np.ndarray | None], delay: Sequence[int], guidance: Mapping[str, object]
    ) -> dict[str, Any]:
        """Options of its `predict`, with which chunks continue the `running` ones [n, A] after `delay` steps."""
        ...

    def close(self) -> None:
        """Let go of the connection."""


@dataclass(frozen=True, kw_only=True)
class Guidance:
    """How a chunk is made to continue the running one, for real-time chunking: see `policy.rtc`.

    method: "guidance"; "trained", by a policy that was trained to go on from prefix steps; "both"; or "auto": trained,
    where the policy is and the delay is one that it was trained for, else guidance. The rest says how guidance is done.
    """

    method: str = "auto"
    mask: str = "exponential"
    beta: float = BETA
    rounds: int = 0
    overlap: int | None = None
    pin: bool = True

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise unknown("rtc.method", self.method, METHODS)
        if self.mask not in MASKS:
            raise unknown("rtc.mask", self.mask, MASKS)
        if not 0 < self.beta < math.inf:
            raise InputError(f"rtc.beta={self.beta} must be above 0, and finite")
        if self.rounds < 0:
            raise InputError(f"rtc.rounds={self.rounds} must be at least 0")
        if self.overlap is not None and self.overlap < 0:
            raise InputError(f"rtc.overlap={self.overlap} must be at least 0")


class Predictions(NamedTuple):
    """Chunks [B, H, A] in the data's units, and what extensions say of them, name → [B]."""

    chunks: np.ndarray
    notes: Mapping[str, np.ndarray]


class Prediction(NamedTuple):
    """A chunk [H, A] in the data's units, and what extensions say of it, by name (`sample.Sample.notes`)."""

    chunk: np.ndarray
    notes: Mapping[str, float]


def predict(
    policy: Policy,
    obs: Mapping[str, np.ndarray],
    requests: Sequence[Request | None],
    *,
    noise_generator: list[Any],
    generator: list[Any],
    guidance: Guidance,
) -> Predictions:
    """Chunks for histories `obs`, key → [B, To, …].

    requests: of each row what was asked for; None for a row whose chunk nobody will use. Raises
    `Unavailable` where the policy is behind a server that does not answer, and `InputError` where the policy fails, or
    answers anything but numbers.
    """
    running = [None if request is None else request.running for request in requests]
    delay = [0 if request is None else request.delay for request in requests]
    options: dict[str, Any] = {}
    shared = _shared(policy, requests)
    if isinstance(policy, PolicyElsewhere):
        options = policy.continuing(running, delay, asdict(guidance))
    elif any(rest is not None for rest in running):
        ours = _with_network(
            policy, "scheduling=rtc differentiates through the policy's network, which this policy hides"
        )
        options = continued(ours, obs, running, delay, guidance)
    try:
        predicted = policy.predict(obs, noise_generator=noise_generator, generator=generator, **options)
    except (InputError, Unavailable):
        raise
    except Exception as error:  # whatever a policy can fail with: the robot stops, and one line says why
        raise InputError(f"the policy failed: {type(error).__name__}: {error}".strip()[:500]) from error
    finally:
        if shared is not None:
            shared.own(None)
    return Predictions(_chunks(predicted, len(requests)), _notes(predicted, len(requests)))


def _with_network(policy: Policy, why_not: str) -> DiffusionPolicy:
    """The policy, if hooks can look at its denoising. Raises `InputError`."""
    if not isinstance(policy, OnnxPolicy):
        from action_diffusion.policy.policy import DiffusionPolicy

        if isinstance(policy, DiffusionPolicy):
            return policy
    raise InputError(why_not)


def _shared(policy: Policy, requests: Sequence[Request | None]) -> SharedControl | None:
    """Lets the policy know what of its chunks is a person's; None where nothing is."""
    given = [request.person for request in requests if request is not None and request.owned is not None]
    longest = max((person for person in given if person is not None), key=len, default=None)
    if longest is None:
        return None
    ours = _with_network(
        policy, "a person can own a part of the action only where the policy is on this machine, by torch"
    )
    from action_diffusion.policy.extensions.shared import SharedControl

    nobody = np.zeros(longest.shape[1], bool), longest[:1]
    pairs = [nobody if r is None or r.owned is None or r.person is None else (r.owned, r.person) for r in requests]
    shared = SharedControl(ours, rounds=SHARED_ROUNDS, fading=SHARED_FADING)
    filled = [np.pad(person, ((0, len(longest) - len(person)), (0, 0)), mode="edge") for _, person in pairs]
    shared.own(np.stack([owned for owned, _ in pairs]), np.stack(filled))
    return shared


def _chunks(predicted: Any, n: int) -> np.ndarray:
    """What a policy answered for `n` rows. Raises `InputError` for what is no chunk; whether it fits is for others."""
    try:
        chunks = np.asarray(predicted["action_pred"])
    except (TypeError, KeyError, IndexError, ValueError):
        raise InputError(
            f"the policy answered {type(predicted).__name__}, not {{'action_pred': [B, H, A], …}}"
        ) from None
    if chunks.dtype.kind not in "iuf" or chunks.ndim < 1 or len(chunks) != n:
        given = f"{chunks.dtype} {list(chunks.shape)}"
        raise InputError(f"the policy's action_pred is {given}, not numbers [{n}, H, A]")
    return chunks


def _notes(predicted: Mapping[str, Any], n: int) -> dict[str, np.ndarray]:
    """Whatever else a policy answered that is a number for each of `n` rows."""
    others = {name: value for name, value in dict(predicted).items() if name not in ("action", "action_pred")}
    return {
        name: value
        for name, value in others.items()
        if isinstance(value, np.ndarray) and value.shape == (n,) and value.dtype.kind in "iuf"
    }


def continued(
    policy: DiffusionPolicy,
    obs: Mapping[str, np.ndarray],
    chunks: Sequence[np.ndarray | None],
    delays: Sequence[int],
    guidance: Guidance,
) -> dict[str, Any]:
    """Options of `predict` for `obs` with which each row's chunk continues its running one, see `running_chunks`."""
    from action_diffusion.policy.rtc import continuing, running_chunks

    running = running_chunks(policy, obs, chunks, delays)
    how = asdict(resolved(policy, max(delays), guidance))
    method = how.pop("method")
    if method != "guidance" and not policy.max_delay:
        raise InputError(f"rtc.method={method} needs a policy that was trained with policy.objective.max_delay above 0")
    options: dict[str, Any] = {} if method == "guidance" else {"prefix": running.prefix()}
    return options if method == "trained" else options | {"hooks": [continuing(policy, running, **how)]}


def resolved(policy: DiffusionPolicy, delay: int, guidance: Guidance) -> Guidance:
    """What `guidance` comes to for a chunk that is expected after `delay` steps: its method is not "auto"."""
    if guidance.method != "auto":
        return guidance
    return replace(guidance, method="trained" if 1 <= delay <= policy.max_delay else "guidance")


def predict_one(
    request: Request,
    history: Mapping[str, np.ndarray],
    *,
    policy: Policy,
    noise_generator: Any,
    generator: Any,
    guidance: Guidance,
) -> Prediction:
    """For one history, key → [To, …], by a call with a batch of one."""
    obs = {key: value[None] for key, value in history.items()}
    noise: dict[str, Any] = {"noise_generator": [noise_generator], "generator": [generator]}
    chunks, notes = predict(policy, obs, [request], guidance=guidance, **noise)
    return Prediction(chunks[0], {name: float(note[0]) for name, note in notes.items()})


def rehearse(
    policy: DiffusionPolicy | OnnxPolicy | PolicyElsewhere, guidance: Guidance, running: int | None
) -> Prediction:
    """A prediction from observations of zeros, which takes as long as any other, once the first is over.

    running: of how many steps the chunk is that it has to continue; None: of none. Raises `Unavailable`.
    """
    spec = policy.spec
    rest = None if running is None else np.zeros((running, *spec.action.shape))
    request = Request(step=0, running=rest, delay=1)
    history = {
        key: np.zeros((spec.n_obs_steps, *value.shape), dtype=value.dtype) for key, value in spec.observations.items()
    }
    noise_generator, generator = generators(0)
    noise: dict[str, Any] = {"noise_generator": noise_generator, "generator": generator}
    return predict_one(request, history, policy=policy, guidance=guidance, **noise)
