"""Intents: ways in which a task was demonstrated, of which each has a name and a learnt token (after DIAL, 2026).

    demonstrations ─▶ clusters of motion, or a column's values ─▶ intent i of each episode (or window)
    token_i [S], condition [B, C] ─▶ MLP ─▶ δ [B, F],    film ← film + δ

The denoiser's weights stay as they are; δ, which is 0 at first, is added to what all of its blocks are told of the
observations, and is trained by the policy's own loss with what the demonstration's intent is. So the policy goes on to
do all that it learnt to do, and the token chooses among it.

An episode has one intent from its beginning to its end: the one that is named, or one that is drawn with the
probabilities of `preference` by the seed of the episode's noise: the same one in all its chunks, and whenever it is run
again. A chunk that nobody says a seed of has the most preferred one.

DIAL trains the whole policy with its tokens, of intents by rules of the road; here a trained policy gets them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
import torch
from torch import Tensor, nn

from action_diffusion.datasets.batches.loader import BatchSource
from action_diffusion.datasets.storage.tasks import episode_tasks
from action_diffusion.errors import InputError, unknown
from action_diffusion.options.extensions import IntentsOptions as Options
from action_diffusion.policy.extensions.extension import Extension, Fitted
from action_diffusion.policy.extensions.motion import clusters, motions, nearest, separation
from action_diffusion.policy.model.denoisers.denoiser import Film
from action_diffusion.policy.policy import DiffusionPolicy
from action_diffusion.policy.sample import Encoded, Prefix
from action_diffusion.progress import progress
from action_diffusion.schema import Above, Sized, check, hints

BATCH = 256
STREAM = 15
"""Of the random numbers of an episode that draw its intent."""
TASK = "task"
"""As `labels`: the words of an episode's task."""
MOST = 64
"""Intents."""
OPTIONS = hints(Options)


class IntentTokens(nn.Module):
    """A token for each of `count` intents, and what it makes of a condition. `film`: F, see `denoiser.Film`."""

    def __init__(self, *, count: int, size: int, hidden: int, condition_dim: int, film: int) -> None:
        super().__init__()
        self.token = nn.Embedding(count, size)
        self.inside, self.out = nn.Linear(condition_dim + size, hidden), nn.Linear(hidden, film)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, condition: Tensor, intent: Tensor) -> Tensor:
        """condition [B, C], intent int64 [B] → δ [B, F]."""
        seen = torch.cat([condition, self.token(intent)], dim=1)
        result: Tensor = self.out(nn.functional.silu(self.inside(seen)))
        return result


class Intents(Extension):
    """Notes: "intents.intent" [B], the place in `names` of the one that the chunk has.

    names: of all intents. name: of the one that every episode has; None: drawn. probabilities: of a draw, [K].
    """

    def __init__(self, policy: DiffusionPolicy, fitted: Fitted) -> None:
        super().__init__(policy, fitted)
        options = fitted.options
        try:
            for option in ("size", "hidden"):
                check(options[option], OPTIONS[option], option)
            self.names = [str(name) for name in check(options["names"], Annotated[list[str], Sized(2, MOST)], "names")]
            shares = check(options["shares"], Annotated[list[Annotated[float, Above(0, 1)]], Sized(2, MOST)], "shares")
            self.tokens = _tokens(policy, len(self.names), options)
            self.tokens.load_state_dict({name: torch.from_numpy(value) for name, value in fitted.arrays.items()})
            if len(shares) != len(self.names):
                raise InputError(f"{len(shares)} shares for {len(self.names)} intents")
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise InputError(f"extension intents does not belong to this policy: {str(error)[:200]}") from None
        self.tokens = self.tokens.to(policy.device).eval().requires_grad_(False)
        preference = options.get("preference")
        self.probabilities = _probabilities(self.names, shares if preference is None else preference)
        self.name = options.get("name")
        if self.name is not None and str(self.name) not in self.names:
            raise unknown("intents.name", str(self.name), self.names)
        self._chosen: Tensor | None = None

    @classmethod
    def fit(
        cls, policy: DiffusionPolicy, train: BatchSource, held_out: BatchSource, options: Mapping[str, Any]
    ) -> Fitted:
        """Find the intents and learn their tokens; `Fitted.options` then has `names`, their `shares` of what was
        demonstrated, and the loss of held-out windows without and with them."""
        if policy.objective.taught:
            raise InputError("intents are learnt by the policy's own loss, and this policy learnt from another one")
        torch.manual_seed(options["seed"])
        found = intents_of(train, held_out, options)
        names = [str(name) for name in options["names"] or found.names]
        if len(names) != len(found.names) or len(set(names)) < len(names):
            raise InputError(f"names={names}: expected {len(found.names)} different ones, for {', '.join(found.names)}")
        shares = np.bincount(found.train, minlength=len(names)) / len(found.train)
        if options["preference"] is not None:
            _probabilities(names, options["preference"])
        policy.requires_grad_(False)
        tokens = _tokens(policy, len(names), options).to(policy.device)
        _train(policy, tokens, train, torch.from_numpy(found.train).to(policy.device), options)
        said: dict[str, Any] = _losses(policy, tokens, held_out, torch.from_numpy(found.held_out).to(policy.device))
        described = [
            f"{name} ({share:.2f}, such as episode {episode})"
            for name, share, episode in zip(names, shares, found.examples, strict=True)
        ]
        said |= {"intents": ", ".join(described)}
        said |= {} if found.separation is None else {"separation": found.separation}
        arrays = {name: value.detach().cpu().numpy() for name, value in tokens.state_dict().items()}
        return Fitted({**options, "names": names, "shares": shares.tolist(), **said}, arrays)

    def modulate(self, seen: Encoded, film: Film) -> Film:
        self._chosen = torch.tensor(self.drawn(seen.episodes, len(seen.condition)), device=film.condition.device)
        changed = self.tokens(seen.condition.float(), self._chosen)
        return Film(film.steps, film.condition + changed.to(film.condition.dtype))

    def drawn(self, episodes: Sequence[int] | None, rows: int) -> list[int]:
        """The intent of each row, see above."""
        if self.name is not None:
            return [self.names.index(str(self.name))] * rows
        if episodes is None:
            return [int(np.argmax(self.probabilities))] * rows
        ends = np.cumsum(self.probabilities)
        draws = [np.random.default_rng([STREAM, episode]).random() * ends[-1] for episode in episodes]
        return [int(np.searchsorted(ends, draw, side="right")) for draw in draws]

    def finish(self, seen: Encoded, normalized: Tensor) -> tuple[Tensor, Mapping[str, Tensor]]:
        assert self._chosen is not None
        return normalized, {"intents.intent": self._chosen.float()}


def _tokens(policy: DiffusionPolicy, count: int, options: Mapping[str, Any]) -> IntentTokens:
    """Untrained, of the sizes that the policy's networks have."""
    spec, device = policy.spec, policy.device
    obs = {key: np.zeros((1, spec.n_obs_steps, *one.shape), one.dtype) for key, one in spec.observations.items()}
    with torch.no_grad():
        condition = policy.encode({key: torch.from_numpy(value).to(device) for key, value in obs.items()})
        film = policy.denoiser.prepare(condition, policy.sampler.times(device)).condition
    sizes = {"condition_dim": condition.shape[1], "film": film.shape[1]}
    return IntentTokens(count=count, size=options["size"], hidden=options["hidden"], **sizes)


def _probabilities(names: Sequence[str], preference: Any) -> np.ndarray:
    """[K], of a list of as many numbers, or of name → number. Raises `InputError`."""
    given = preference if isinstance(preference, Mapping) else dict(zip(names, preference, strict=True))
    for name in given:
        if str(name) not in names:
            raise unknown("intent in preference", str(name), names)
    by_name = {str(name): float(number) for name, number in given.items()}
    numbers = np.array([by_name.get(name, 0.0) for name in names])
    if not numbers.sum() > 0:
        raise InputError("intents.preference prefers none: give one of them a number above 0")
    result: np.ndarray = numbers / numbers.sum()
    return result


@dataclass(frozen=True)
class FoundIntents:
    """The intent of each window, int64, of those to learn from and of those held out; what intents are called.

    examples: of each intent an episode's place in the buffer, of clusters the one that is nearest to the centre.
    separation: of clusters, see `motion`.
    """

    train: np.ndarray
    held_out: np.ndarray
    names: list[str]
    examples: list[int]
    separation: float | None = None


def intents_of(train: BatchSource, held_out: BatchSource, options: Mapping[str, Any]) -> FoundIntents:
    """The intents of demonstrations, by labels or by clusters; options: of `options.extensions.IntentsOptions`.

    Raises `InputError` for labels that are no intents, and where there is nothing to cluster.
    """
    sources, column = (train, held_out), options["labels"]
    if column is not None:
        words = [_labels(source, column) for source in sources]
        names = sorted(set(words[0]))
        if not 2 <= len(names) <= MOST:
            raise InputError(f"labels={column} has {len(names)} values, expected 2 to {MOST} different ones")
        if unseen := sorted(set(words[1]) - set(names)):
            raise InputError(
                f"labels={column}: {unseen[0]!r} is only among what is held out: there is no intent to learn"
            )
        placed = [np.array([names.index(word) for word in some], np.int64) for some in words]
        return FoundIntents(placed[0], placed[1], names, [_episode(train, words[0].index(name)) for name in names])
    paths = [_paths(source, options["by"]) for source in sources]
    points = motions([*paths[0], *paths[1]], options["columns"], aligned=options["aligned"])
    points, others = points[: len(paths[0])], points[len(paths[0]) :]
    found, centres = clusters(points, options["count"], options["seed"])
    belongs = [found, nearest(others, centres)]
    windows = nearest(centres, points)
    if options["by"] == "episode":
        places = [np.unique(source.windows.first, return_inverse=True) for source in sources]
        belongs = [of[place] for of, (_, place) in zip(belongs, places, strict=True)]
        windows = np.array([np.flatnonzero(places[0][1] == episode)[0] for episode in windows])
    names = [f"way_{number}" for number in range(1, options["count"] + 1)]
    examples = [_episode(train, int(window)) for window in windows]
    return FoundIntents(belongs[0], belongs[1], names, examples, separation(points, centres))


def _episode(source: BatchSource, window: int) -> int:
    """The place in the buffer of a window's episode."""
    return int(np.searchsorted(source.buffer.episode_ends, source.windows.first[window], side="right"))


def _labels(source: BatchSource, column: str) -> list[str]:
    """Of each window what `column` says of its episode. Raises `InputError` where that is not one thing."""
    buffer, windows = source.buffer, source.windows
    if column == TASK:
        words = episode_tasks(buffer)
        return [words[_episode(source, window)] for window in range(len(windows))]
    values = np.asarray(buffer[column][:])
    values = values.reshape(len(values), -1)
    if values.shape[1] != 1:
        raise InputError(f"{buffer.name}: labels={column} has {values.shape[1]} values a row, one is a label")
    said = {}
    for first, end in sorted(set(zip(windows.first.tolist(), windows.end.tolist(), strict=True))):
        if len(np.unique(values[first:end])) > 1:
            episode = int(np.searchsorted(buffer.episode_ends, first, side="right"))
            raise InputError(f"{buffer.name}: labels={column} changes within episode {episode}: an intent does not")
        value = values[first, 0].item()
        said[first] = f"{value:g}" if isinstance(value, float) else str(value)
    return [said[first] for first in windows.first.tolist()]


def _paths(source: BatchSource, by: str) -> list[np.ndarray]:
    """What is done in each episode, or from now on in each window's chunk: [L, A] each, in the data's units."""
    actions, windows = source.values("action"), source.windows
    actions = actions.reshape(len(actions), -1)
    if by == "chunk":
        return list(actions[windows.rows(np.arange(len(windows)))[:, windows.n_obs_steps - 1 :]])
    return [actions[first:end] for first, end in sorted(set(zip(windows.first, windows.end, strict=True)))]


def _train(
    policy: DiffusionPolicy, tokens: IntentTokens, train: BatchSource, intent: Tensor, options: Mapping[str, Any]
) -> None:
    optimizer = torch.optim.AdamW(tokens.parameters(), lr=options["lr"], weight_decay=1e-6)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, options["steps"])
    random = np.random.default_rng(options["seed"])
    with progress("intents", options["steps"]) as advance:
        for _ in range(options["steps"]):
            chosen = random.integers(len(train), size=BATCH)
            loss = _loss(policy, tokens, train, chosen, intent)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            advance(1)


def _loss(
    policy: DiffusionPolicy,
    tokens: IntentTokens | None,
    source: BatchSource,
    indices: np.ndarray,
    intent: Tensor,
    generator: torch.Generator | None = None,
) -> Tensor:
    """The policy's loss of windows whose intents are `intent` [of all windows]; tokens: None for the policy alone."""
    condition, x0, mask = _examples(policy, source, indices)
    changed = None if tokens is None else tokens(condition, intent[torch.from_numpy(indices).to(intent.device)])
    prefix = Prefix.none(x0) if policy.max_delay else None

    def network(x: Tensor, times: Tensor, rows: Tensor | None = None) -> Tensor:
        film = policy.denoiser.prepare(condition if rows is None else condition[rows], times)
        told = film.steps + film.condition
        if changed is not None:
            told = told + (changed if rows is None else changed[rows])
        result: Tensor = policy.denoiser(x if prefix is None else prefix.mark(x, rows), told)
        return result

    counts = None if policy.objective.loss_on_padding else mask
    pairs = policy.objective.pairs(network, policy.process, x0, generator)
    return policy.objective.reduced(pairs, policy.process, counts, len(x0))


@torch.no_grad()
def _losses(policy: DiffusionPolicy, tokens: IntentTokens, source: BatchSource, intent: Tensor) -> dict[str, float]:
    """Of windows, spread evenly, without and with the intents, for the same noise."""
    spread = np.unique(np.linspace(0, len(source) - 1, min(len(source), 8 * BATCH)).round().astype(np.int64))
    found: dict[str, float] = {}
    for name, used in (("loss without", None), ("loss with", tokens)):
        generator = torch.Generator(policy.device).manual_seed(0)
        losses = [
            _loss(policy, used, source, spread[first : first + BATCH], intent, generator).item()
            for first in range(0, len(spread), BATCH)
        ]
        found[name] = float(np.mean(losses))
    return found


def _examples(policy: DiffusionPolicy, source: BatchSource, indices: np.ndarray) -> tuple[Tensor, Tensor, Tensor]:
    """Conditions [B, C], normalised chunks [B, H, A] and masks [B, H] of windows."""
    batch = source.gather(indices)
    with torch.no_grad():
        seen = policy.see(batch.obs)
        return seen.condition, policy.normalize_action(batch.action, seen.obs), batch.mask
