"""The policy: observation history in, action chunk out.

obs ─▶ features ─▶ normalise ─▶ encoder ─▶ condition ┐
                                      noise ─▶ denoiser × steps ─▶ unnormalise ─▶ chunk [B, H, A]
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from action_diffusion.errors import InputError
from action_diffusion.policy.diffusion.process import Process
from action_diffusion.policy.diffusion.sampler import ChainStep, Generators, Hook, Sampler, draw_noise
from action_diffusion.policy.diffusion.solver import Step
from action_diffusion.policy.model.estimator import PlanarPose
from action_diffusion.policy.model.features import module_name
from action_diffusion.policy.model.frames import ActionFrame
from action_diffusion.policy.model.normalizer import Normalizer
from action_diffusion.policy.model.shares import drawn
from action_diffusion.policy.objectives.objective import Network, Objective, Teacher
from action_diffusion.policy.sample import Acting, Encoded, Prefix, Sample, network_of
from action_diffusion.policy.spec import IN_FRAME, PolicySpec
from action_diffusion.rotations import continuous, valid

CRITICS = "critics."
"""What names of the critics' weights begin with."""


class DiffusionPolicy(nn.Module):
    """A diffusion policy made of parts (Chi et al. 2023).

    features: key → module applied to a state before normalisation. action_frame: that chunks are learnt in; None for
    the data's own. estimator: of a state that is not observed (`policy.estimator`). objective: what the denoiser is
    trained to say.
    """

    def __init__(
        self,
        *,
        spec: PolicySpec,
        features: Mapping[str, nn.Module],
        action_frame: ActionFrame | None = None,
        estimator: PlanarPose | None = None,
        normalizer: Normalizer,
        encoder: nn.Module,
        denoiser: Any,
        process: Process,
        sampler: Sampler,
        objective: Objective,
    ):
        super().__init__()
        objective.check(process)
        objective.check_cameras(spec.camera_order)
        max_delay = objective.max_delay
        if not 0 <= max_delay <= spec.horizon - spec.n_obs_steps:
            raise InputError(
                f"policy.objective.max_delay={max_delay} must be between 0 and {spec.horizon - spec.n_obs_steps}: of "
                f"{spec.horizon} steps {spec.n_obs_steps - 1} are past, and one at least is to be learnt"
            )
        self.spec = spec
        self.features = nn.ModuleDict({module_name(key): feature for key, feature in features.items()})
        self.action_frame = action_frame
        self.estimator = estimator
        self.normalizer = normalizer
        self.encoder = encoder
        self.denoiser = denoiser
        self.process = process
        self.sampler = sampler
        self.objective = objective
        self.critics: nn.Module | None = None
        """Of an objective that learns from rewards, while it does."""
        self.extensions: Sequence[Acting] = ()
        """What acts while chunks are made, in order (`extensions.attach`)."""
        self._teachers: tuple[DiffusionPolicy, ...] = ()  # of a tuple, weights are not this policy's

    @property
    def max_delay(self) -> int:
        """How many steps of a chunk may be fixed before it is made, see `Objective`."""
        return self.objective.max_delay

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def learn_from(self, teacher: DiffusionPolicy) -> None:
        """Train on what `teacher` says, for an objective that is `taught`; it is neither trained nor stored.

        Raises `InputError` for one that says it of other observations or in other terms.
        """
        if not self.objective.taught:
            raise InputError(f"policy.objective: {type(self.objective).__name__} learns from no teacher")
        if teacher.process.family != self.process.family or teacher.process.prediction != self.process.prediction:
            raise InputError(
                f"policy.objective.teacher is a {teacher.process.family} policy that predicts the "
                f"{teacher.process.prediction}: it has to be a {self.process.family} policy that predicts the "
                f"{self.process.prediction}"
            )
        if teacher.objective.two_times or teacher.max_delay != self.max_delay:
            raise InputError(
                "policy.objective.teacher was trained with "
                f"{type(teacher.objective).__name__}, max_delay={teacher.max_delay}: it has to be Denoising, "
                f"max_delay={self.max_delay}"
            )
        shapes = [
            ([(key, value.shape) for key, value in one.spec.observations.items()], one.spec.action.shape)
            for one in (self, teacher)
        ]
        if shapes[0] != shapes[1] or self.spec.normalizer != teacher.spec.normalizer:
            raise InputError("policy.objective.teacher has other observations, actions or statistics than this policy")
        self.objective.check_teacher(teacher.sampler, self.sampler)
        self._teachers = (teacher.eval().requires_grad_(False),)

    def learn_from_rewards(self) -> None:
        """Give the policy the critics of its objective, which is `rewarded`; they are trained with it, and not stored
        in bundles."""
        self.critics = self.objective.critics(self).to(self.device)

    def acting(self) -> dict[str, nn.Parameter]:
        """The weights that chunks are made with, by name: all but the critics'."""
        return {name: weight for name, weight in self.named_parameters() if not name.startswith(CRITICS)}

    def encode(self, obs: Mapping[str, Tensor], generator: torch.Generator | None = None) -> Tensor:
        """Observation history (key → [B, To, …], data's units, images uint8) → condition [B, C]."""
        return self.see(obs, generator).condition

    def see(self, obs: Mapping[str, Tensor], generator: torch.Generator | None = None) -> Encoded:
        """`encode`, and what the rest of the policy takes for the observations: an estimated state is among them."""
        seen = {key: self._written(key, obs[key]) for key in self.spec.states if key in self.spec.observations}
        if self.action_frame is not None:
            seen |= self.action_frame.observe(seen)
        ready = {key: self._ready(key, seen[key]) if key in seen else obs[key] for key in self.spec.observations}
        ready |= {key: self._far(key, obs[key]) for key in self.spec.depths}
        ready |= {key: self.normalizer.normalize(key, obs[key].float()) for key in self.spec.points}
        embedding = self.encoder(ready, generator=generator)
        if self.estimator is None:
            return Encoded(embedding, obs)
        output = self.estimator(embedding)
        key, state = self.estimator.key, self.estimator.estimate(output.detach(), obs).unsqueeze(1)
        condition = torch.cat([embedding, self._ready(key, self._written(key, state)).flatten(1)], dim=1)
        return Encoded(condition, {**obs, key: state}, output)

    def _written(self, key: str, value: Tensor) -> Tensor:
        """A state [B, To, …] as a vector [B, To, n], whose rotations are continuous."""
        return continuous(value.float().flatten(2), self.spec.states[key].rotations)

    def _far(self, key: str, depth: Tensor) -> Tensor:
        """Depth [B, To, H, W] in mm → [B, To, H, W, 2]: normalised, 0 where it is unknown; and 1 where it is known."""
        depth = depth.float()
        known = (depth > 0).float()
        return torch.stack([self.normalizer.normalize(key, depth) * known, known], dim=-1)

    def _ready(self, key: str, value: Tensor) -> Tensor:
        """Such a vector as the encoder takes it."""
        if module_name(key) in self.features:
            value = self.features[module_name(key)](value)
        return self.normalizer.normalize(key, value)

    def normalize_action(self, action: Tensor, obs: Mapping[str, Tensor]) -> Tensor:
        """Chunks [B · n, H, A] in the data's units → what the denoiser works on, [B · n, H, D] of `spec.noise_shape`;
        rows of an observation are neighbours.

        obs: key → [B, To, …], of `see` where a state is estimated; a frame moves with it, so a running chunk has other
        normalised values at every step.
        """
        action = continuous(action, self.spec.action.rotations)
        if self.action_frame is None:
            return self.normalizer.normalize("action", action)
        return self.normalizer.normalize(IN_FRAME, self.action_frame.enter(action, self._now(obs, len(action))))

    def unnormalize_action(self, normalized: Tensor, obs: Mapping[str, Tensor]) -> Tensor:
        """The inverse of `normalize_action`; what is a rotation is a valid one."""
        if self.action_frame is None:
            action = self.normalizer.unnormalize("action", normalized)
        else:
            in_frame = self.normalizer.unnormalize(IN_FRAME, normalized)
            action = self.action_frame.leave(in_frame, self._now(obs, normalized.shape[0]))
        return valid(action, self.spec.action.rotations)

    def _now(self, obs: Mapping[str, Tensor], rows: int) -> Tensor:
        assert self.action_frame is not None
        now = torch.cat([obs[key][:, -1].float().flatten(1) for key in self.action_frame.observations], dim=1)
        return now.repeat_interleave(rows // now.shape[0], dim=0)

    def forward(
        self,
        obs: Mapping[str, Tensor],
        action: Tensor,
        mask: Tensor | None = None,
        *,
        generator: torch.Generator | None = None,
        **beside: Any,
    ) -> Tensor:
        """The training loss, a scalar. action [B, H, A] in the data's units; mask [B, H], False where padded.

        beside: what some objectives need (`Batch.beside`): gain [B, A, D] or [B, A · D] `sobolev`, outcome those that
        are `rewarded`.
        `generator` draws crops, times and noise: the loss is a function of the weights, the batch and its state (and of
        torch's own random numbers where a network has dropout).
        With an estimator, `obs` holds the recorded state as well, and its loss is added.
        """
        seen = self.see(obs, generator)
        loss = self._denoising_loss(seen, obs, action, mask, generator)
        if self.estimator is not None and seen.output is not None:
            loss = loss + self.estimator.loss(seen.output, obs[self.estimator.key][:, -1].float())
        further = self.objective.further_loss(self, obs, action, beside, generator)
        return loss if further is None else loss + further

    def _denoising_loss(
        self,
        seen: Encoded,
        obs: Mapping[str, Tensor],
        action: Tensor,
        mask: Tensor | None,
        generator: torch.Generator | None,
    ) -> Tensor:
        draws, condition = self.objective.noise_draws, seen.condition
        x0 = self.normalize_action(action, seen.obs)
        if draws > 1:
            condition, x0 = condition.repeat(draws, 1), x0.repeat(draws, 1, 1)
        counts = None if self.objective.loss_on_padding or mask is None else mask.repeat(draws, 1)
        prefix = None
        if self.max_delay:
            prefix = Prefix(x0, self._draw_prefix(len(x0), generator, x0.device))
            counts = ~prefix.steps if counts is None else counts & ~prefix.steps

        network = network_of(self.denoiser, condition, prefix)
        taught: dict[str, Any] = {}
        for teacher in self._teachers:
            with torch.no_grad():
                said = network_of(teacher.denoiser, teacher.encode(obs).repeat(draws, 1), prefix)
            taught["teacher"] = Teacher(said, teacher.sampler)
        pairs = self.objective.pairs(network, self.process, x0, generator, **taught)
        weights = self.objective.weights(self, condition, x0)
        return self.objective.reduced(pairs, self.process, counts, len(x0), weights)

    def shown(
        self, obs: Mapping[str, Tensor], action: Tensor, generator: torch.Generator | None
    ) -> tuple[Network, Tensor]:
        """See `objective.Learner`; no step of the chunks is fixed."""
        seen = self.see(obs, generator)
        x0 = self.normalize_action(action, seen.obs)
        return network_of(self.denoiser, seen.condition, self._prefix(None, x0, 1)), x0

    def _draw_prefix(self, n: int, generator: torch.Generator | None, device: torch.device) -> Tensor:
        """Of n training examples, the steps that are given: bool [n, H]; each delay up to `max_delay` as often."""
        most = self.max_delay + 1
        delay = drawn(lambda rows, g: torch.randint(most, (rows, 1), generator=g, device=device), n, generator)
        step = torch.arange(self.spec.horizon, device=device) - (self.spec.n_obs_steps - 1)
        return (step >= 0) & (step < delay)

    def sample(
        self,
        obs: Mapping[str, Tensor],
        *,
        noise: Tensor | None = None,
        n_samples: int = 1,
        noise_generator: Generators = None,
        generator: Generators = None,
        prefix: Prefix | None = None,
        hooks: Sequence[Hook] = (),
        grad: bool = False,
        return_chain: bool = False,
    ) -> Sample:
        """Sample chunks for observations (key → [B, To, …], data's units, on the policy's device).

        The encoder runs once per observation; its embedding is repeated for `n_samples`. noise [B · n, H, A] is the
        initial noise; without it `noise_generator` draws it, and `generator` draws the noise of stochastic steps
        (each one, or a list with one per row, so that a row does not depend on its neighbours). prefix: steps of B
        chunks that the others are to go on from; needs `max_delay` > 0. `hooks`: see `sampler.Hook`. grad=True lets
        gradients flow from the chunk to weights, noise and observations; otherwise only what a hook needs is
        differentiated.
        """
        rows, device = n_samples * len(next(iter(obs.values()))), self.device
        shape = (rows, *self.spec.noise_shape)
        if noise is None:
            noise = draw_noise(shape, noise_generator, device, torch.float32)
        elif noise.shape != shape:
            raise InputError(f"noise has shape {list(noise.shape)}, expected {list(shape)}")
        noises = max((acting.noises for acting in self.extensions), default=1)
        candidates = max((acting.candidates for acting in self.extensions), default=1)
        if candidates > 1 and return_chain:
            raise InputError("return_chain: an extension chooses among several chunks, of which each has its own")
        if noises > 1:  # those after the first as well from each row's own generator
            more = [draw_noise(shape, noise_generator, device, torch.float32) for _ in range(noises - 1)]
            noise = torch.stack([noise, *more], dim=1).flatten(0, 1)
        begun = noise[: rows * candidates]
        drawn = self._step_noise(begun, generator, candidates)
        prefix = self._prefix(prefix, begun, n_samples * candidates)
        chain: list[ChainStep] = []
        notes: dict[str, Tensor] = {}
        extended = bool(hooks or self.extensions)
        if n_samples == 1 and not (extended or grad or return_chain or torch.is_grad_enabled()):
            given = [] if drawn is None else [drawn]
            given += [] if prefix is None else [prefix.action, prefix.steps]
            action, normalized = self.chunk(noise, *given, *(obs[key] for key in self.spec.observations))
        else:
            options: dict[str, Any] = {"hooks": hooks, "grad": grad, "return_chain": return_chain}
            options["episodes"] = _episodes(generator, noise_generator, rows)
            action, normalized, chain, notes = self._sample(obs, noise, drawn, prefix, n_samples, noises, **options)
        if n_samples > 1:
            normalized, action = (t.unflatten(0, (-1, n_samples)) for t in (normalized, action))
        return Sample(action, normalized, chain, notes)

    def _step_noise(self, noise: Tensor, generator: Generators, candidates: int) -> Tensor | None:
        """For the rows of `noise` [B · candidates, H, A], each candidate's after the one before it."""
        drawn = [self.sampler.draw_step_noise(noise[::candidates], generator) for _ in range(candidates)]
        parts = [part for part in drawn if part is not None]
        return torch.stack(parts, dim=2).flatten(1, 2) if len(parts) > 1 else drawn[0]

    def _prefix(self, given: Prefix | None, noise: Tensor, n_samples: int) -> Prefix | None:
        """For the rows of `noise` [B · n, H, A], no step where none is given; None for a denoiser that has no mark."""
        if not self.max_delay:
            if given is not None:
                raise InputError("steps are fixed, but the policy was trained with policy.objective.max_delay=0")
            return None
        if given is None:
            return Prefix.none(noise)
        action, steps = (part.repeat_interleave(n_samples, dim=0) for part in (given.action, given.steps))
        if action.shape != noise.shape or steps.shape != noise.shape[:2]:
            raise InputError(f"prefix steps of shape {list(given.action.shape)} for chunks of {list(noise.shape)}")
        return Prefix(action, steps)

    def _sample(
        self,
        obs: Mapping[str, Tensor],
        noise: Tensor,
        drawn: Tensor | None,
        prefix: Prefix | None,
        n_samples: int = 1,
        noises: int = 1,
        episodes: Sequence[int] | None = None,
        **options: Any,
    ) -> tuple[Tensor, Tensor, list[ChainStep], dict[str, Tensor]]:
        """Chunks [B · n, H, A] in the data's units and normalised, the chain and notes; all noise is given, of which
        there may be several for each chunk."""
        with torch.set_grad_enabled(options["grad"]):
            seen = asked = replace(_repeated(self.see(obs), n_samples), episodes=episodes)
            if self.extensions:
                noise = noise.unflatten(0, (-1, noises))
                for acting in self.extensions:
                    noise = acting.start(asked, noise)
                seen, noise = _repeated(asked, noise.shape[1]), noise.flatten(0, 1)
            film = self.denoiser.prepare(seen.condition, self.sampler.times(seen.condition.device))
            for acting in self.extensions:
                film = acting.modulate(seen, film)

        def denoise(x: Tensor, step: Step, rows: Tensor | None = None) -> Tensor:
            result: Tensor = self.denoiser(x if prefix is None else prefix.mark(x, rows), film.at(step.index, rows))
            return result

        added = [hook for acting in self.extensions for hook in acting.hooks(seen)]
        options["hooks"] = [*options.get("hooks", ()), *added]
        normalized, chain = self.sampler.run(denoise, noise, step_noise=drawn, **options)
        notes: dict[str, Tensor] = {}
        for acting in self.extensions:
            normalized, said = acting.finish(seen, normalized)
            notes.update(said)
        if prefix is not None:
            normalized = torch.where(prefix.steps.unsqueeze(-1), prefix.action, normalized)
        chooser = next((acting for acting in self.extensions if acting.candidates > 1), None)
        if chooser is not None:
            several = normalized.unflatten(0, (-1, chooser.candidates))
            chosen = chooser.choose(asked, several) + chooser.candidates * torch.arange(
                len(several), device=noise.device
            )
            normalized, notes = normalized[chosen], {name: note[chosen] for name, note in notes.items()}
        return self.unnormalize_action(normalized, asked.obs), normalized, chain, notes

    def chunk(self, noise: Tensor, *given: Tensor) -> tuple[Tensor, Tensor]:
        """Chunks [B, H, A] in the data's units and normalised, as a function of nothing but tensors, without gradients.

        given: the noise of steps that draw some (`Sampler.draw_step_noise`), if any do; action and steps of `Prefix`,
        with `max_delay`; the observations, in order.
        """
        count = len(given) - len(self.spec.observations)
        obs, others = dict(zip(self.spec.observations, given[count:], strict=True)), list(given[:count])
        prefix = Prefix(others[-2], others[-1]) if self.max_delay else None
        drawn = others[0] if count % 2 else None
        action, normalized, _, _ = self._sample(obs, noise, drawn, prefix, grad=False)
        return action, normalized

    def predict(
        self,
        obs: Mapping[str, np.ndarray],
        *,
        noise: np.ndarray | None = None,
        noise_generator: Generators = None,
        generator: Generators = None,
        prefix: Prefix | None = None,
        hooks: Sequence[Hook] = (),
    ) -> dict[str, np.ndarray]:
        """Actions for a dictionary of numpy arrays, [To, …] or [B, To, …] each, in the data's own units.

        Returns float32 `action` [(B,) Ta, A], the steps to execute, `action_pred` [(B,) H, A], the whole chunk, and
        what extensions say of it (`Sample.notes`), [(B,)] each.
        Raises `InputError` for observations that differ from `spec`.
        """
        batched = self.spec.check(obs)
        tensors = {}
        for key in self.spec.observations:
            value = np.ascontiguousarray(obs[key] if batched else np.asarray(obs[key])[None])
            tensors[key] = torch.from_numpy(value).to(self.device)
        start = None if noise is None else torch.from_numpy(np.asarray(noise, np.float32)).to(self.device)
        # Nothing here is differentiated later, which inference mode makes use of: a tenth of a small network's step.
        quick = not any(hook.needs_gradient for hook in hooks)
        quick = quick and not any(acting.needs_gradient for acting in self.extensions)
        with torch.inference_mode() if quick else torch.no_grad():
            noises: dict[str, Any] = {"noise": start, "noise_generator": noise_generator, "generator": generator}
            sample = self.sample(tensors, **noises, prefix=prefix, hooks=hooks)
        chunk = sample.action.float().cpu().numpy()
        now = self.spec.n_obs_steps - 1
        action = chunk[:, now : now + self.spec.n_action_steps]
        made = {name: note.float().cpu().numpy() for name, note in sample.notes.items()}
        made |= {"action": action, "action_pred": chunk}
        return made if batched else {name: value[0] for name, value in made.items()}


def _episodes(generator: Generators, noise_generator: Generators, rows: int) -> list[int] | None:
    """See `Encoded.episodes`."""
    drawing = noise_generator if generator is None else generator
    if drawing is None:
        return None
    return [one.initial_seed() for one in (drawing if isinstance(drawing, Sequence) else [drawing] * rows)]


def _repeated(seen: Encoded, times: int) -> Encoded:
    """Each row so many times, one after the other."""
    if times == 1:
        return seen
    episodes = None if seen.episodes is None else [one for one in seen.episodes for _ in range(times)]
    return replace(seen, condition=seen.condition.repeat_interleave(times, dim=0), episodes=episodes)
