"""What a policy says to questions of several clients, in one call, a row for each.

A row's noise comes from its own generators, so its neighbours change no more of its answer than the order in which
sums are rounded: matrix products give other last bits for other numbers of rows. A question that is answered alone gets
the local policy's chunk to the last bit.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from action_diffusion.deploy.loop.prediction import continued, resolved
from action_diffusion.deploy.serve.session import Question
from action_diffusion.errors import InputError
from action_diffusion.policy import noise
from action_diffusion.policy.runtime.onnx_policy import OnnxPolicy

if TYPE_CHECKING:
    from action_diffusion.policy.policy import DiffusionPolicy

Policy: TypeAlias = "DiffusionPolicy | OnnxPolicy"
Outcome: TypeAlias = "dict[str, Any] | Exception"
"""An answer, or why there is none."""


def kind(policy: Policy, question: Question) -> Hashable:
    """Questions of one kind can be answered together: none then is answered in another way than it would be alone."""
    guidance = question.guidance
    if question.running is not None and not isinstance(policy, OnnxPolicy):
        guidance = resolved(policy, question.delay, guidance)
    return question.noise is None, question.running is None, guidance


def answers(policy: Policy, questions: Sequence[Question]) -> list[Outcome]:
    """To questions of one kind, in their order.

    An answer is float32 `actions` [Ta, A] in the data's units; where `whole` is asked for, `action_pred` [H, A] too,
    and `notes` of extensions, name → number. Where the call fails each is asked alone, with the noise that it would
    have had: a question that a policy fails at is nothing to the others.
    """
    before = [[noise.state_of(one) for one in question.generators] for question in questions]
    try:
        return _together(policy, questions)
    except Exception as error:  # whatever a policy can fail with
        if len(questions) == 1:
            return [error]
    for question, states in zip(questions, before, strict=True):
        for generator, state in zip(question.generators, states, strict=True):
            noise.set_state(generator, state)
    return [answers(policy, [question])[0] for question in questions]


def warm_up(policy: Policy, rows: int) -> frozenset[str]:
    """A call with so many rows of zeros, so that memory and kernels are there when clients ask; what it answered, by
    name. What is met afterwards is measured for as long again."""
    shapes = {key: (rows, policy.spec.n_obs_steps, *value.shape) for key, value in policy.spec.observations.items()}
    zeros = {key: np.zeros(shape, policy.spec.observations[key].dtype) for key, shape in shapes.items()}
    answered = frozenset(policy.predict(zeros))
    if not isinstance(policy, OnnxPolicy):
        from action_diffusion import choice

        choice.forget()
    return answered


def _together(policy: Policy, questions: Sequence[Question]) -> list[Outcome]:
    first = questions[0]
    obs = {key: np.concatenate([question.obs[key] for question in questions]) for key in first.obs}
    options: dict[str, Any] = {}
    if first.running is not None:
        if isinstance(policy, OnnxPolicy):
            raise InputError("this server's policy is an ONNX file, which cannot continue a running chunk")
        running, delays = [one.running for one in questions], [one.delay for one in questions]
        options = continued(policy, obs, running, delays, resolved(policy, first.delay, first.guidance))
    predicted = policy.predict(
        obs,
        noise=None if first.noise is None else np.concatenate([question.noise for question in questions]),
        noise_generator=[question.noise_generator for question in questions],
        generator=[question.generator for question in questions],
        **options,
    )
    if len(predicted["action_pred"]) != len(questions):
        raise ValueError(f"{len(predicted['action_pred'])} chunks for {len(questions)} questions")
    return [_row(predicted, row, question) for row, question in enumerate(questions)]


def _row(predicted: Mapping[str, np.ndarray], row: int, question: Question) -> Outcome:
    if not np.isfinite(predicted["action_pred"][row]).all():
        return FloatingPointError("the predicted chunk holds NaN or infinity")
    answer: dict[str, Any] = {"actions": predicted["action"][row]}
    if question.whole:
        answer["action_pred"] = predicted["action_pred"][row]
        notes = {name: value for name, value in predicted.items() if name not in ("action", "action_pred")}
        answer["notes"] = {name: float(note[row]) for name, note in notes.items()}
    if question.returns_generator:
        answer["generator"] = noise.state_of(question.generator)
    return answer
