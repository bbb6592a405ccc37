"""Between people's words and a policy's numbers.

    words of the data's episodes ─▶ describe ─▶ TextSpec, in the bundle
    instruction=, a simulator's, a client's words ─▶ Words.vectors ─▶ observation key → float32 [E]

A vector is made once a sentence: it is kept in memory, and in CACHE/text/<version>/ where an encoder has one.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from action_diffusion.errors import InputError
from action_diffusion.files import atomic_path, cache_folder
from action_diffusion.options import Sentence
from action_diffusion.policy.spec import MOST_SENTENCES, ObservationSpec, PolicySpec, TextSpec
from action_diffusion.policy.text.encoders import TextEncoder
from action_diffusion.registry import TEXT_ENCODERS, check_arguments
from action_diffusion.schema import check, shown

DEFAULT = "minilm"
MOST_KEPT = 10_000
"""Sentences of an encoder, in memory and on disk: whoever talks to a server may say many."""


def describe(
    encoder: Mapping[str, Any] | None, sentences: Sequence[str], model: str | None = None, where: str = "the data"
) -> ObservationSpec:
    """The observation that an `encoder` {name, …} makes of sentences, of which `sentences` are to be learnt.

    model: the folder of an encoder that comes as one. Raises `InputError` for an encoder that is not here, and for
    sentences that are none.
    """
    for sentence in sentences:
        check_sentence(sentence, where)
    options = {"name": DEFAULT, **(encoder or {})}
    if "tasks" in inspect.signature(TEXT_ENCODERS.load(options["name"], "text encoder")).parameters:
        options["tasks"] = options.get("tasks") or list(sentences)
    made = _opened(json.dumps(options), model)
    text = TextSpec(options, made.encoder.version, tuple(sentences[:MOST_SENTENCES]))
    for sentence in text.sentences:  # what cannot be told is said before it is trained on
        made(sentence)
    return ObservationSpec(shape=(made.encoder.size,), kind="text", text=text)


def embed(text: TextSpec, sentences: Sequence[str], model: str | None = None) -> np.ndarray:
    """Vectors, float32 [n, E]. Raises `InputError` where the bundle's encoder is not here, or is another one, and for
    words that it does not take."""
    made = _checked(text, model)
    return np.stack([made(sentence) for sentence in sentences])


def _checked(text: TextSpec, model: str | None) -> _Embedding:
    """The encoder that makes the vectors of a bundle."""
    made = _opened(json.dumps(text.encoder), model)
    if made.encoder.version != text.version:
        raise InputError(
            f"the policy was trained with the text encoder {text.encoder['name']} ({text.version}), the one here is "
            f"({made.encoder.version}): its words would mean something else"
        )
    return made


def check_sentence(sentence: object, where: str) -> str:
    """Raises `InputError` for what is no sentence: words of at most 1000 letters, in one line."""
    said: str = check(sentence, Sentence, where)
    return said


@dataclass(frozen=True)
class Words:
    """What a policy with `texts` (observation → how its words become a vector) is told.

    instruction: for all of an episode; None: what the simulator says, or else the only sentence that was trained on.
    model: the folder of an encoder that comes as one, `text_model=DIR`.
    """

    texts: Mapping[str, TextSpec]
    instruction: str | None = None
    model: str | None = None

    @classmethod
    def of(cls, spec: PolicySpec, instruction: str | None = None, model: str | None = None) -> Words:
        """Of a policy; one that is told nothing has no use for an instruction."""
        return cls(spec.texts, instruction, model)

    @property
    def only(self) -> str | None:
        """What there is to say where nobody says anything: the one sentence that all texts were trained on."""
        said = {sentence for text in self.texts.values() for sentence in text.sentences}
        return said.pop() if len(said) == 1 else None

    def said(self, theirs: str | None = None) -> str:
        """What is told, where a simulator says `theirs`. Raises `InputError` where nobody says anything."""
        words = next((one for one in (self.instruction, theirs, self.only) if one is not None), None)
        if words is None:
            known = ", ".join(repr(one) for text in self.texts.values() for one in text.sentences[:5])
            raise InputError(f"the policy does what it is told: give instruction=…, such as {known}")
        return check_sentence(words, "instruction")

    def vectors(self, theirs: str | None = None) -> dict[str, np.ndarray]:
        """Observation → float32 [E] of what is `said`; nothing for a policy that is told nothing."""
        if not self.texts:
            return {}
        words = self.said(theirs)
        return {key: embed(text, [words], self.model)[0] for key, text in self.texts.items()}

    def ready(self) -> None:
        """Load what makes vectors, so that nobody waits for it later. Raises `InputError` where it is not here, or is
        another one."""
        for text in self.texts.values():
            _checked(text, self.model).encoder.encode(text.sentences[0])


def check_told(specs: Iterable[PolicySpec], instruction: str | None, model: str | None, *, asks: bool = True) -> None:
    """Raises `InputError` for an instruction or a folder that none of the policies has a use for, and, where nobody but
    the user says what to do (asks), for one that is missing."""
    texts = [spec.texts for spec in specs if spec.texts]
    for name, value in {"instruction": instruction, "text_model": model}.items():
        if value is not None and not texts:
            raise InputError(f"{name}= is for a policy that is told in words what to do, and this one is not")
    for some in texts if asks else ():
        Words(some, instruction, model).said()


class _Embedding:
    """An encoder, and the vectors that it has made."""

    def __init__(self, encoder: TextEncoder) -> None:
        self.encoder = encoder
        self._known: dict[str, np.ndarray] = {}

    def __call__(self, sentence: str) -> np.ndarray:
        if sentence not in self._known:
            while len(self._known) >= MOST_KEPT:
                del self._known[next(iter(self._known))]
            self._known[sentence] = self._kept(sentence)
        return self._known[sentence]

    def _kept(self, sentence: str) -> np.ndarray:
        if self.encoder.version is None:
            return self._encoded(sentence)
        version, words = (hashlib.sha256(part.encode()).hexdigest() for part in (self.encoder.version, sentence))
        file = cache_folder() / "text" / version[:16] / f"{words[:32]}.npy"
        try:
            there = np.load(file, allow_pickle=False)
        except (OSError, ValueError, EOFError):
            there = np.zeros(0)
        if there.shape == (self.encoder.size,) and there.dtype == np.float32 and np.isfinite(there).all():
            return np.array(there)
        vector = self._encoded(sentence)
        if file.parent.is_dir() and len(os.listdir(file.parent)) >= MOST_KEPT:
            return vector
        with atomic_path(file) as temporary:
            np.save(temporary, vector, allow_pickle=False)
        return vector

    def _encoded(self, sentence: str) -> np.ndarray:
        vector = np.asarray(self.encoder.encode(sentence))
        if vector.shape != (self.encoder.size,) or not np.isfinite(vector).all():
            raise InputError(
                f"the text encoder made {list(vector.shape)} numbers of {shown(sentence)}, expected "
                f"{self.encoder.size} that are finite"
            )
        return vector.astype(np.float32)


@lru_cache(maxsize=8)
def _opened(options: str, model: str | None) -> _Embedding:
    """options: of an encoder, {name, …} as JSON."""
    given = json.loads(options)
    name = given.pop("name", DEFAULT)
    part = TEXT_ENCODERS.load(name, "text encoder")
    takes_folder = "model" in inspect.signature(part).parameters
    if takes_folder and model is None:
        raise InputError(f"the text encoder {name} comes as a folder: give text_model=DIR")
    if model is not None and not takes_folder:
        raise InputError(f"text_model= is for encoders that come as a folder, and {name} does not")
    given |= {"model": model} if takes_folder else {}
    check_arguments(part, given, f"text encoder {name}")
    return _Embedding(part(**given))
