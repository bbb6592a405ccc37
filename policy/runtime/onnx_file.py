"""A policy in an ONNX file (`policy.interchange.onnx`): what is in it, and what is refused before anything computes.

    graph       obs.KEY [B, To, …], noise [B, H, A], step_noise [B, K, H, A] ─▶ action_pred [B, H, A]
    metadata    action_diffusion          {"format": 1, "spec": spec.json, "config": config.yaml}, as JSON
                action_diffusion.golden   inputs and the chunk that torch made of them: safetensors, in base 64

The file is all that is read: tensors that lie in others are refused, as are operators that are not ONNX's own,
functions, branches, and loops that do not say how often they go round.
"""

from __future__ import annotations

import base64
import binascii
import functools
import importlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import safetensors.numpy
from safetensors import SafetensorError

from action_diffusion.errors import InputError
from action_diffusion.options.bundle import OPSETS
from action_diffusion.options.words import MOST_STEPS
from action_diffusion.policy.spec import PolicySpec

ABOUT, GOLDEN = "action_diffusion", "action_diffusion.golden"
FORMAT = 1
NOISE, STEP_NOISE, ACTION = "noise", "step_noise", "action_pred"
MOST_BYTES = 2**31 - 1
"""Of a file: what its format can hold."""


class Input(NamedTuple):
    """kind: an `onnx.TensorProto` type. shape: without the batch."""

    kind: int
    shape: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class OnnxFile:
    """data: the file's bytes, which were looked through. inputs: by name. opset: of its operators."""

    spec: PolicySpec
    config: Mapping[str, Any]
    inputs: Mapping[str, Input]
    opset: int
    data: bytes = field(repr=False)
    golden: Mapping[str, np.ndarray] | None = field(repr=False)


def is_onnx(path: str | Path) -> bool:
    """Whether a path means an ONNX file, by its name."""
    return Path(path).suffix == ".onnx"


def observation_name(key: str) -> str:
    """What an observation is called in the file."""
    return f"obs.{key}"


def require(library: str) -> ModuleType:
    """A module of the extra `[onnx]`, or an `InputError` that says how to get it."""
    try:
        return importlib.import_module(library)
    except ImportError:
        raise InputError(f"{library} is not installed: pip install 'action-diffusion[onnx]'") from None


def describe(model: Any, spec: PolicySpec, config: Mapping[str, Any], golden: Mapping[str, np.ndarray]) -> None:
    """Write the metadata into an `onnx.ModelProto`."""
    about = json.dumps({"format": FORMAT, "spec": spec.to_json(), "config": dict(config)})
    packed = base64.b64encode(safetensors.numpy.save(dict(golden))).decode()
    for name, value in ((ABOUT, about), (GOLDEN, packed)):
        entry = model.metadata_props.add()
        entry.key, entry.value = name, value


def read(path: Path) -> OnnxFile:
    """The file's content. Raises `InputError` for one that is no policy of ours, or that asks for anything else."""
    path = Path(path)
    try:
        stamp = path.stat()
    except OSError as error:
        raise InputError(f"{path}: {error.strerror or error}") from None
    return _read(path, stamp.st_mtime_ns, stamp.st_size)


@functools.lru_cache(maxsize=1)  # it is asked for several times, before anything computes and then for that
def _read(path: Path, changed: int, size: int) -> OnnxFile:
    if not path.is_file():
        raise InputError(f"{path}: not a file")
    if size > MOST_BYTES:
        raise InputError(f"{path} has {size / 1e9:.1f} GB, an ONNX file at most {MOST_BYTES / 1e9:.1f}")
    onnx, message = require("onnx"), importlib.import_module("google.protobuf.message")
    data = path.read_bytes()
    try:
        model = onnx.ModelProto.FromString(data)
    except (message.DecodeError, ValueError, RecursionError):
        raise InputError(f"{path}: not a readable ONNX file") from None
    metadata = {entry.key: entry.value for entry in model.metadata_props}
    if ABOUT not in metadata:
        raise InputError(
            f"{path} was not made by action-diffusion bundle export format=onnx: it has no metadata {ABOUT!r}"
        )
    try:
        opset = _check(model, onnx)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    spec, config = _about(metadata[ABOUT], path)
    inputs = {value.name: _input(value) for value in model.graph.input}
    _check_interface(inputs, [value.name for value in model.graph.output], spec, onnx, path)
    golden = _golden(metadata[GOLDEN], inputs, spec, path) if GOLDEN in metadata else None
    return OnnxFile(spec, config, inputs, opset, data, golden)


def _about(text: str, path: Path) -> tuple[PolicySpec, dict[str, Any]]:
    """Specification and configuration, with the checks that a bundle's have."""
    from action_diffusion.policy.reading import parsed, refuse_targets

    where = f"{path}: metadata {ABOUT!r}"
    about = parsed(text, where, "JSON", json.loads)
    if not isinstance(about, dict) or about.keys() != {"format", "spec", "config"}:
        raise InputError(f"{where}: expected format, spec and config")
    if about["format"] != FORMAT:
        raise InputError(f"{where}: format {about['format']!r}, this version reads format {FORMAT}")
    for part in ("spec", "config"):
        if not isinstance(about[part], dict):
            raise InputError(f"{where}: {part} is {type(about[part]).__name__}, expected an object")
    refuse_targets(about["config"], where)
    return PolicySpec.from_json(about["spec"], where), about["config"]


def _golden(text: str, inputs: Mapping[str, Input], spec: PolicySpec, path: Path) -> dict[str, np.ndarray]:
    """Inputs and the chunk [1, H, A]; an observation [To, …]."""
    where = f"{path}: metadata {GOLDEN!r}"
    try:
        golden: dict[str, np.ndarray] = safetensors.numpy.load(base64.b64decode(text, validate=True))
    except (binascii.Error, ValueError, SafetensorError) as error:
        raise InputError(f"{where}: not readable: {error}") from None
    seen = {observation_name(key): (spec.n_obs_steps, *value.shape) for key, value in spec.observations.items()}
    shapes = {name: (1, *value.shape) for name, value in inputs.items()} | seen
    shapes[ACTION] = (1, spec.horizon, *spec.action.shape)
    for name in shapes.keys() | golden.keys():
        if name not in shapes or name not in golden or golden[name].shape != shapes[name]:
            raise InputError(f"{where}: no {name!r} of shape {list(shapes.get(name, ()))}, or one too many")
    return golden


def _input(value: Any) -> Input:
    kind = value.type.tensor_type
    return Input(kind.elem_type, tuple(size.dim_value for size in kind.shape.dim[1:]))


def _check_interface(
    inputs: Mapping[str, Input], outputs: list[str], spec: PolicySpec, onnx: ModuleType, path: Path
) -> None:
    """`InputError` where the graph takes or gives something else than `spec` says."""
    floats, chunk = onnx.TensorProto.FLOAT, (spec.horizon, *spec.action.shape)
    expected = {
        observation_name(key): Input(
            onnx.TensorProto.UINT8 if value.kind == "image" else floats, (spec.n_obs_steps, *value.shape)
        )
        for key, value in spec.observations.items()
    } | {NOISE: Input(floats, chunk)}
    if STEP_NOISE in inputs:
        draws = inputs[STEP_NOISE].shape[0] if inputs[STEP_NOISE].shape else 0
        if not 0 < draws <= MOST_STEPS:
            raise InputError(f"{path}: {STEP_NOISE} is of {draws} steps, at most {MOST_STEPS} can be")
        expected[STEP_NOISE] = Input(floats, (draws, *chunk))
    for name in inputs.keys() | expected.keys():
        if inputs.get(name) != expected.get(name):
            raise InputError(f"{path}: its input {name!r} is not what its specification says")
    if outputs != [ACTION]:
        raise InputError(f"{path}: its outputs are {', '.join(outputs) or 'none'}, expected {ACTION}")


def _check(model: Any, onnx: ModuleType) -> int:
    """The opset. `InputError` for what a chunk needs not, and a file of somebody else may have in it."""
    opsets = {entry.domain or "ai.onnx": entry.version for entry in model.opset_import}
    low, high = OPSETS
    if opsets.keys() != {"ai.onnx"}:
        raise InputError(f"operators of {', '.join(sorted(opsets)) or 'nobody'}: only ONNX's own are taken")
    if not low <= opsets["ai.onnx"] <= high:
        raise InputError(f"opset {opsets['ai.onnx']}, this version reads {low} to {high}")
    if model.functions or model.training_info:
        raise InputError("functions or training information, which no policy has")
    _check_graph(model.graph, onnx, depth=0)
    opset: int = opsets["ai.onnx"]
    return opset


def _check_graph(graph: Any, onnx: ModuleType, depth: int) -> None:
    whole = {tensor.name: tensor for tensor in graph.initializer}
    for tensor in _tensors(graph):
        if tensor.data_location == onnx.TensorProto.EXTERNAL or tensor.external_data:
            raise InputError(f"tensor {tensor.name!r} lies in another file: only what is in the file itself is read")
    for node in graph.node:
        if node.domain not in ("", "ai.onnx"):
            raise InputError(f"operator {node.op_type!r} of {node.domain!r}: only ONNX's own are taken")
        inner = [attribute.g for attribute in node.attribute if attribute.HasField("g")]
        inner += [one for attribute in node.attribute for one in attribute.graphs]
        if not inner:
            continue
        times = whole.get(node.input[0]) if node.op_type == "Loop" and node.input else None
        if times is None or depth or len(inner) != 1 or not 1 <= _number(times, onnx) <= MOST_STEPS:
            raise InputError(f"operator {node.op_type!r}, which is not one loop over 1 to {MOST_STEPS} denoising steps")
        _check_graph(inner[0], onnx, depth + 1)


def _tensors(graph: Any) -> Iterator[Any]:
    """All of a graph, but for those in graphs inside."""
    yield from graph.initializer
    sparse = list(graph.sparse_initializer)
    for node in graph.node:
        for attribute in node.attribute:
            yield from ([attribute.t] if attribute.HasField("t") else [])
            yield from attribute.tensors
            sparse += [attribute.sparse_tensor] if attribute.HasField("sparse_tensor") else []
            sparse += list(attribute.sparse_tensors)
    for tensor in sparse:
        yield from (tensor.values, tensor.indices)


def _number(tensor: Any, onnx: ModuleType) -> int:
    """The one whole number that it is; 0 where it is none."""
    if tensor.data_type != onnx.TensorProto.INT64 or len(tensor.dims) or len(tensor.raw_data) > 8:
        return 0
    try:
        return int(onnx.numpy_helper.to_array(tensor))
    except (ValueError, TypeError):
        return 0
