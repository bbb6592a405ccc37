"""The one training loop.

    batch at (seed, step) ─▶ loss ─▶ optimiser ─▶ EMA      every step
                              └─▶ metrics.jsonl             every `log_every`
    EMA policy ─▶ validation, rollouts, checkpoint          now and then

All randomness of a step (sample order, crops, times, noise) is a function of the seed, the step and the process, so
a checkpoint needs no random states: resuming at step n does what an uninterrupted run does at step n. Several processes
share what one would draw for their batch together.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast
from diffusers.training_utils import EMAModel

from action_diffusion.errors import InputError
from action_diffusion.options import TrainSettings
from action_diffusion.policy import kernels
from action_diffusion.policy.model.shares import Share
from action_diffusion.policy.policy import DiffusionPolicy
from action_diffusion.training import checkpoints
from action_diffusion.training.capture import CapturedGradient, check_capturable
from action_diffusion.training.metrics import MetricsLog
from action_diffusion.training.progress import TrainingBar
from action_diffusion.training.signals import Interrupted, stop_signals


class StepSource(Protocol):
    """Training data: `len()` windows, and the batch [B] of a step of this process."""

    def __len__(self) -> int: ...

    def batch(self, step: int, batch_size: int, generator: torch.Generator) -> Any:
        """A `datasets.batches.Batch`: obs, action [B, H, A], mask [B, H]."""


class Average(EMAModel):
    """diffusers' average of the weights, taken in one pass over them instead of two; the same within rounding."""

    @torch.no_grad()
    def step(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        self.optimization_step += 1
        decay = self.get_decay(self.optimization_step)
        torch._foreach_lerp_(self.shadow_params, list(parameters), 1 - decay)


@dataclass
class Progress:
    """Where a run stands. Everything here is in a checkpoint."""

    step: int = 0
    seconds: float = 0.0
    merit: float | None = None


class Trainer:
    """Trains a policy from parts. `validate(step) -> metrics` and `rollout(step) -> metrics` see the EMA weights.

    write_bundle(path, weights): writes a policy bundle of the given (EMA) weights.
    """

    def __init__(
        self,
        *,
        policy: DiffusionPolicy,
        source: StepSource,
        settings: TrainSettings,
        accelerator: Accelerator,
        output_dir: Path,
        seed: int,
        metrics: MetricsLog | None,
        write_bundle: Callable[[Path, dict[str, torch.Tensor]], None],
        validate: Callable[[], dict[str, float]] | None = None,
        rollout: Callable[[], dict[str, float]] | None = None,
        show_progress: bool = True,
    ):
        self.accelerator = accelerator
        self.settings = settings
        self.source = source
        self.output_dir = output_dir
        self.seed = seed
        self.metrics = metrics
        self.write_bundle = write_bundle
        self.validate = validate
        self.rollout = rollout
        self.show_progress = show_progress and accelerator.is_main_process
        self.progress = Progress()
        self.policy = policy.to(accelerator.device)
        if not settings.compile:
            kernels.for_training(self.policy)
        self.optimizer = make_optimizer(policy, settings)
        self.acting = policy.acting()
        """What is averaged, and what a bundle holds."""
        self.ema = Average(
            self.acting.values(),
            decay=settings.ema_max_decay,
            use_ema_warmup=True,
            power=settings.ema_power,
            foreach=True,
        )
        self.ema.to(accelerator.device)
        self.model, self.prepared_optimizer = accelerator.prepare(policy, self.optimizer)
        if settings.compile:
            self.model = torch.compile(self.model)
        self.captured = self._capture() if settings.cuda_graph else None
        # `steps_per_epoch` needs the global batch
        self.steps_per_epoch = max(
            1,
            len(source) // (settings.batch_size * accelerator.num_processes * settings.gradient_accumulation_steps),
        )

    # -- the loop ---------------------------------------------------------------------------------------------

    def run(self) -> Progress:
        """Train until the budget is spent. Raises `Interrupted` after saving, on Ctrl-C."""
        self._started = time.monotonic() - self.progress.seconds
        with stop_signals() as self._stop_requested, TrainingBar(enabled=self.show_progress) as bar:
            losses: list[torch.Tensor] = []
            last_log = (time.monotonic(), self.progress.step)
            while not self._spent():
                losses.append(self._step())
                step = self.progress.step
                if step % self.settings.log_every == 0 or self._spent():
                    now = time.monotonic()
                    rate = (step - last_log[1]) * self._samples_per_step / max(now - last_log[0], 1e-9)
                    last_log = (now, step)
                    self._log(losses, rate, bar)
                    losses.clear()
                self._every_so_often(bar)
                if self._stop_together():
                    self.save()
                    raise Interrupted(step)
        self.save()
        return self.progress

    def _step(self) -> torch.Tensor:
        settings, step = self.settings, self.progress.step
        for group in self.optimizer.param_groups:
            group["lr"] = settings.lr * lr_factor(step, self.share, settings)
        if not self.policy.training:
            self.model.train()
        loss = self._gradient(step) if self.captured is None else self._replayed_gradient(step, self.captured)
        self.ema.step(self.acting.values())
        self.progress.step += 1
        self.progress.seconds = self._clock()
        return loss

    def _gradient(self, step: int) -> torch.Tensor:
        """Loss, gradient and the optimiser's step, over as many batches as are accumulated."""
        settings, loss = self.settings, torch.zeros((), device=self.accelerator.device)
        for part in range(settings.gradient_accumulation_steps):
            index = step * settings.gradient_accumulation_steps + part
            generator = self._random(index)
            batch = self.source.batch(index, settings.batch_size, generator)
            with self.accelerator.accumulate(self.model):
                part_loss = self._backward(batch, generator)
                self._clip()
                self.prepared_optimizer.step()
                self.prepared_optimizer.zero_grad()
            loss += part_loss / settings.gradient_accumulation_steps
        return loss

    def _replayed_gradient(self, step: int, captured: CapturedGradient) -> torch.Tensor:
        """`_gradient` of one batch, by a CUDA graph."""
        batch = self.source.batch(step, self.settings.batch_size, self._random(step))
        loss = captured(batch, self._seed(step))
        self._clip()
        self.prepared_optimizer.step()
        return loss

    def _backward(self, batch: Any, generator: torch.Generator) -> torch.Tensor:
        with self.accelerator.autocast():
            loss = self.model(batch.obs, batch.action, batch.mask, generator=generator, **batch.beside)
            self.accelerator.backward(loss)
        result: torch.Tensor = loss.detach()
        return result

    def _clip(self) -> None:
        if self.accelerator.sync_gradients and self.settings.max_grad_norm > 0:
            self.accelerator.unscale_gradients()
            critics = [] if self.policy.critics is None else list(self.policy.critics.parameters())
            for weights in (list(self.acting.values()), critics):  # apart: neither makes the other's steps small
                torch.nn.utils.clip_grad_norm_(weights, self.settings.max_grad_norm)

    def _capture(self) -> CapturedGradient:
        settings, accelerator = self.settings, self.accelerator
        if self.policy.critics is not None:
            raise InputError("train.cuda_graph=true does not go with policy.objective=diffusion_ql")
        check_capturable(
            device=accelerator.device,
            processes=accelerator.num_processes,
            accumulation=settings.gradient_accumulation_steps,
            mixed_precision=accelerator.mixed_precision,
        )
        return CapturedGradient(self._backward, list(self.policy.parameters()), accelerator.device)

    def _random(self, index: int) -> torch.Generator:
        """Of batch `index`; torch's own random numbers, which dropout draws, follow from it as well."""
        rank, world, device = self.accelerator.process_index, self.accelerator.num_processes, self.accelerator.device
        own = self._seed(index, rank)
        torch.manual_seed(own)
        if world == 1:
            return torch.Generator(device).manual_seed(own)
        together, rows = self._seed(index), self.settings.batch_size
        return Share(device, own=own, together=together, rows=rows, rank=rank, world=world)

    def _seed(self, index: int, rank: int = 0) -> int:
        """Of the random numbers of batch `index`."""
        words = np.random.SeedSequence([self.seed, index, rank]).generate_state(2)
        return (int(words[0]) << 31) ^ int(words[1])

    @property
    def _samples_per_step(self) -> int:
        settings = self.settings
        result: int = settings.batch_size * settings.gradient_accumulation_steps * self.accelerator.num_processes
        return result

    # -- budget -----------------------------------------------------------------------------------------------

    @property
    def share(self) -> float:
        """The share of the budget that is spent, 0 to 1; of several budgets, the one nearest to its end."""
        settings, progress = self.settings, self.progress
        shares = []
        if settings.max_steps is not None:
            shares.append(progress.step / settings.max_steps)
        if settings.max_epochs is not None:
            shares.append(progress.step / max(1, round(settings.max_epochs * self.steps_per_epoch)))
        if settings.max_minutes is not None:
            shares.append(progress.seconds / (60.0 * settings.max_minutes))
        return min(max(shares), 1.0)

    def _spent(self) -> bool:
        return self.share >= 1.0

    def _clock(self) -> float:
        """Seconds since the run began, of process 0 where they count: all then have one learning rate and one end."""
        seconds = time.monotonic() - self._started
        if self.accelerator.num_processes == 1 or self.settings.max_minutes is None:
            return seconds
        return float(broadcast(torch.tensor(seconds, device=self.accelerator.device)).item())

    def _stop_together(self) -> bool:
        return self._any_process(self._stop_requested())

    def _any_process(self, flag: bool) -> bool:
        if self.accelerator.num_processes == 1:
            return flag
        return bool(self.accelerator.reduce(torch.tensor(float(flag), device=self.accelerator.device)).item() > 0)

    # -- now and then -----------------------------------------------------------------------------------------

    def _log(self, losses: list[torch.Tensor], rate: float, bar: TrainingBar) -> None:
        mean = torch.stack(losses).mean()
        loss = float(self.accelerator.reduce(mean, "mean") if self.accelerator.num_processes > 1 else mean)
        if not math.isfinite(loss):
            raise FloatingPointError(
                f"the loss became {loss} at step {self.progress.step}: lower train.lr, or use mixed_precision=no"
            )
        lr = self.optimizer.param_groups[0]["lr"]
        per_step = self._samples_per_step / rate
        bar.update(share=self.share, step=self.progress.step, loss=loss, rate=rate, step_seconds=per_step)
        if self.metrics is not None:
            self.metrics.write(
                self.progress.step,
                loss=loss,
                lr=lr,
                samples_per_second=round(rate, 1),
                epoch=round(self.progress.step / self.steps_per_epoch, 3),
                seconds=round(self.progress.seconds, 3),
            )

    def _every_so_often(self, bar: TrainingBar) -> None:
        step, settings, done = self.progress.step, self.settings, self._spent()
        if self.validate is not None and _due(step, settings.validate_every, done):
            self._measure("validation", self.validate, bar)
        if self.rollout is not None and not done and _due(step, settings.rollout_every, False):
            self._measure("rollout", self.rollout, bar)
        if not done and _due(step, settings.checkpoint_every, False):
            self.save()

    def _measure(self, name: str, measure: Callable[[], dict[str, float]], bar: TrainingBar) -> None:
        if self.accelerator.is_main_process:
            bar.status(name)
            with self.ema_weights():
                values = measure()
            self.progress.merit = _merit(values, self.progress.merit, has_rollouts=self.rollout is not None)
            if self.metrics is not None:
                self.metrics.write(self.progress.step, **values)
            bar.status("")
        self.accelerator.wait_for_everyone()
        self.progress.seconds = self._clock()

    @contextlib.contextmanager
    def ema_weights(self) -> Iterator[None]:
        """The policy with the EMA weights, in evaluation mode, for as long as the context lasts."""
        self.ema.store(self.acting.values())
        self.ema.copy_to(self.acting.values())
        self.policy.eval()
        try:
            yield
        finally:
            self.ema.restore(self.acting.values())
            self.policy.train()

    # -- saving and resuming ----------------------------------------------------------------------------------

    def save(self) -> None:
        """Write a checkpoint of this step; only the newest and the best stay."""
        if self.accelerator.is_main_process:
            state = {
                "seconds": self.progress.seconds,
                "merit": self.progress.merit,
                "processes": self.accelerator.num_processes,
                "batch": self._samples_per_step,
                "ema_step": self.ema.optimization_step,
                "scaler": self.accelerator.scaler.state_dict() if self.accelerator.scaler is not None else None,
            }
            checkpoints.save_checkpoint(
                self.output_dir,
                step=self.progress.step,
                weights=self.policy.state_dict(),
                optimizer=self.optimizer,
                state=state,
                write_bundle=lambda path: self.write_bundle(path, self.ema_state()),
            )
            checkpoints.prune(self.output_dir, keep_best=self.settings.keep_best)
        self.accelerator.wait_for_everyone()

    def ema_state(self) -> dict[str, torch.Tensor]:
        """The policy's state with EMA weights, by name."""
        shadows = dict(zip(self.acting, self.ema.shadow_params, strict=True))
        return {name: shadows.get(name, value).detach() for name, value in self.policy.state_dict().items()}

    def resume(self, folder: Path) -> str | None:
        """Continue from a checkpoint as if it had never stopped; a line where that is not so to the bit."""
        weights, tensors, state = checkpoints.load_checkpoint(folder)
        self.policy.load_state_dict(weights)
        checkpoints.restore_optimizer(self.optimizer, tensors, state["optimizer"])
        ema = checkpoints.load_weights(folder / "bundle" / "model.safetensors")
        with torch.no_grad():
            for name, shadow in zip(self.acting, self.ema.shadow_params, strict=True):
                shadow.copy_(ema[name])
        self.ema.optimization_step = state["ema_step"]
        if self.accelerator.scaler is not None and state["scaler"] is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        self.progress = Progress(step=state["step"], seconds=state["seconds"], merit=state["merit"])
        before, now = state.get("processes", 1), self.accelerator.num_processes
        if before == now:
            return None
        batch, whole = state.get("batch"), self._samples_per_step
        same = f"{whole} samples a step as before" if batch == whole else f"{whole} samples a step instead of {batch}"
        return f"in {now} processes instead of {before}, {same}: not to the bit what {before} would have done"


def make_optimizer(policy: DiffusionPolicy, settings: TrainSettings) -> torch.optim.AdamW:
    """AdamW (Loshchilov and Hutter 2019), with weight decay on matrices and kernels only: not on biases, norms and
    embeddings."""
    embeddings = {layer.weight for layer in policy.modules() if isinstance(layer, torch.nn.Embedding)}
    trained = [p for p in policy.parameters() if p.requires_grad]
    decay = [p for p in trained if p.ndim > 1 and p not in embeddings]
    rest = [p for p in trained if p.ndim <= 1 or p in embeddings]
    groups = [{"params": decay, "weight_decay": settings.weight_decay}, {"params": rest, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=settings.lr, betas=(settings.betas[0], settings.betas[1]), fused=True)


def lr_factor(step: int, share: float, settings: TrainSettings) -> float:
    """Learning rate over its peak: linear warm-up over `warmup` steps, then a cosine over the share of the budget."""
    ramp = min(1.0, (step + 1) / settings.warmup) if settings.warmup else 1.0
    if settings.lr_schedule == "constant":
        return ramp
    cosine = 0.5 * (1.0 + math.cos(math.pi * share))
    return ramp * (settings.lr_final + (1.0 - settings.lr_final) * cosine)


def _due(step: int, every: int, last: bool) -> bool:
    return bool(every) and (last or step % every == 0)


def _merit(values: dict[str, float], before: float | None, *, has_rollouts: bool) -> float | None:
    """What checkpoints are ranked by: the rollout score where there is a simulator, else minus the action error."""
    if "rollout_score" in values:
        return values["rollout_score"]
    if not has_rollouts and "action_error" in values:
        return -values["action_error"]
    return before
