"""A policy as one ONNX file: the whole chunk, from observations in the data's units to actions in them.

    obs.KEY [B, To, …] ─▶ begin: features, normaliser, encoder ─▶ condition [B, F] ──────┐
    noise [B, H, A] ──────────────────────────────▶ Loop over the denoising steps: step ─┴─ clip, scheduler ─▶ end
    step_noise [B, K, H, A], where K steps draw some ───────▶ ┘                             action_pred [B, H, A] ◀┘

`begin`, `step` and `end` are traced once each by torch; the scheduler's steps are linear (`diffusion.solver`), so that
their numbers are tables that the loop looks up. What a caller must know of the policy, its configuration and its golden
pair are in the file's metadata, see `runtime.onnx_file`. B is free.
"""

from __future__ import annotations

import contextlib
import io
import logging
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
import torch
from torch import Tensor, nn

from action_diffusion.errors import InputError
from action_diffusion.files import atomic_path
from action_diffusion.options.bundle import OPSET
from action_diffusion.policy import bundle as bundles
from action_diffusion.policy.diffusion.solver import Solver
from action_diffusion.policy.interchange.contract import PolicyFormat, made_up
from action_diffusion.policy.interchange.plain import PlainUnet
from action_diffusion.policy.kernels import accelerate
from action_diffusion.policy.model.denoisers.unet import ConditionalUnet1d
from action_diffusion.policy.policy import DiffusionPolicy
from action_diffusion.policy.runtime import onnx_file
from action_diffusion.policy.runtime.onnx_file import ACTION, MOST_BYTES, NOISE, STEP_NOISE, observation_name, require
from action_diffusion.policy.runtime.onnx_policy import OnnxPolicy
from action_diffusion.policy.sample import Prefix

TOLERANCE = 1e-4
"""How far, as a share of the action's range, what ONNX Runtime says may be from what torch says."""
BATCH = 3
"""Rows that are traced with: neither 1, which tracing takes for a fixed size, nor the size of something else."""


def _words(value: Any) -> str:
    """An input or the output: its name, and what it is."""
    sizes = [size.dim_param or size.dim_value for size in value.type.tensor_type.shape.dim]
    return f"{value.name} [{', '.join(map(str, sizes))}]"


def write(policy: DiffusionPolicy, config: Mapping[str, Any], path: Path, options: Mapping[str, Any]) -> dict[str, Any]:
    """Write `path`, which takes its name once ONNX Runtime says what torch does, and returns what to tell about it.

    options: opset. Raises `InputError` for a policy that has no such form, and where the two differ.
    """
    if path.suffix != ".onnx":
        raise InputError(f"out={path}: the name of an ONNX file ends in .onnx")
    opset = int(options.get("opset") or OPSET)
    for library in ("onnx", "onnxscript", "onnxruntime"):
        require(library)
    accelerate(policy)  # plain layers
    model = model_of(policy, opset)
    asked = vars(options["sampler"]) if "sampler" in options else {}
    golden = golden_pair(policy, Path(options["in"]), own=all(value is None for value in asked.values()))
    spec = replace(policy.spec, requires={part: by for part, by in policy.spec.requires.items() if part[:4] == "env "})
    kept = {name: value for name, value in config.items() if name != "extensions"}
    onnx_file.describe(model, spec, kept, golden)
    with atomic_path(path) as temporary:
        temporary.write_bytes(model.SerializeToString())
        difference = OnnxPolicy.load(temporary, threads=1).verify(TOLERANCE)
        size = temporary.stat().st_size
    told = {
        "format": "onnx",
        "file": path,
        "opset": opset,
        "size": f"{size / 1e6:.1f} MB",
        "inputs": ", ".join(_words(value) for value in model.graph.input),
        "output": _words(model.graph.output[0]),
        "difference": f"{difference:.1e} of the action's range, by ONNX Runtime",
    }
    if config.get("extensions"):
        told["note"] = f"extensions act in torch's policies alone: {', '.join(config['extensions'])} is left out"
    return told


def golden_pair(policy: DiffusionPolicy, bundle: Path, *, own: bool = True) -> dict[str, np.ndarray]:
    """The input of a bundle's golden pair by the names in the file, with the noise of the steps, and the chunk that
    torch makes of it here. own: by the bundle's own sampler; raises `InputError` where it is not the bundle's chunk."""
    file, golden = bundle / "golden.safetensors", {}
    if file.is_file():
        if own:
            bundles.verify_golden(policy, bundle)
        golden = safetensors.numpy.load_file(file)
    else:
        random, shape = np.random.default_rng(0), (1, policy.spec.horizon, *policy.spec.action.shape)
        golden = {observation_name(key): value for key, value in made_up(policy.spec).items()}
        golden[NOISE] = random.standard_normal(shape).astype(np.float32)
    drawn = policy.sampler.draw_step_noise(torch.from_numpy(golden[NOISE]), torch.Generator().manual_seed(0))
    if drawn is not None:
        golden[STEP_NOISE] = drawn.transpose(0, 1).numpy()
    obs = {key: golden[observation_name(key)] for key in policy.spec.observations}
    chunk = policy.predict(obs, noise=golden[NOISE], generator=torch.Generator().manual_seed(0))[ACTION]
    return {name: np.ascontiguousarray(value) for name, value in (golden | {ACTION: chunk[None]}).items()}


def model_of(policy: DiffusionPolicy, opset: int) -> Any:
    """The `onnx.ModelProto`, without metadata. Raises `InputError` for what has no such form."""
    import onnx
    from onnx import TensorProto, helper

    spec, solver = policy.spec, policy.sampler.solver
    if type(solver) is not Solver:
        raise InputError(
            f"format=onnx: the steps of sampler.scheduler={policy.sampler.scheduler} are not linear, and have no form"
        )
    if spec.noise_shape != (spec.horizon, *spec.action.shape):
        raise InputError("format=onnx: policy.action_frame has other numbers than the action, and no form yet")
    n_bytes = sum(weight.numel() * weight.element_size() for weight in policy.parameters())
    if n_bytes > 0.95 * MOST_BYTES:
        raise InputError(f"format=onnx: weights of {n_bytes / 1e9:.1f} GB, a file holds {MOST_BYTES / 1e9:.1f} at most")
    chunk = [spec.horizon, *spec.action.shape]
    obs, names = _example(policy), [observation_name(key) for key in spec.observations]
    with torch.no_grad():
        condition, *now = _Begin(policy)(obs)
    begin = _traced(_Begin(policy), (obs,), names, ["condition", "now"][: 1 + len(now)], opset)
    x = torch.zeros(BATCH, *chunk)
    step = _traced(
        _ExportedStep(policy), (x, torch.zeros_like(condition)), ["loop/x", "loop/film"], ["loop/output"], opset
    )
    end = _traced(_End(policy), (x, *now), ["normalized", "now"][: 1 + len(now)], [ACTION], opset)
    draws = sum(move.draws for move in solver.moves)
    inputs = [helper.make_tensor_value_info(NOISE, TensorProto.FLOAT, ["batch", *chunk])]
    if draws:
        inputs.append(helper.make_tensor_value_info(STEP_NOISE, TensorProto.FLOAT, ["batch", draws, *chunk]))
    loop = _loop(policy, step, chunk, bool(draws))
    used = {name for node in (*loop, *loop[-1].attribute[0].g.node) for name in node.input}
    tables = [table for table in _tables(policy) if table.name in used]
    parts = [_prefixed(graph, name) for graph, name in ((begin, "begin/"), (end, "end/"))]
    graph = helper.make_graph(
        [*parts[0].node, *loop, *parts[1].node],
        "chunk",
        [*inputs, *begin.input],
        [helper.make_tensor_value_info(ACTION, TensorProto.FLOAT, ["batch", *chunk])],
        [*parts[0].initializer, *step.initializer, *parts[1].initializer, *tables],
    )
    for value in graph.input:
        value.type.tensor_type.shape.dim[0].dim_param = "batch"
    return helper.make_model(
        graph,
        opset_imports=[helper.make_opsetid("", opset)],
        ir_version=min(onnx.IR_VERSION, 10),
        producer_name="action-diffusion",
    )


class _Begin(nn.Module):
    """Observations, in order, each [B, To, …] → condition [B, F] of the denoiser, and where the action's frame is."""

    def __init__(self, policy: DiffusionPolicy) -> None:
        super().__init__()
        self.policy, self.times = policy, policy.sampler.times(policy.device)

    def forward(self, obs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        seen = self.policy.see(dict(zip(self.policy.spec.observations, obs, strict=True)))
        condition = self.policy.denoiser.prepare(seen.condition, self.times).condition
        frame = self.policy.action_frame
        if frame is None:
            return (condition,)
        return condition, torch.cat([seen.obs[key][:, -1].float().flatten(1) for key in frame.observations], dim=1)


class _ExportedStep(nn.Module):
    """x [B, H, A], film [B, F] → what the denoiser says, [B, H, A]; no step of the chunk is fixed."""

    def __init__(self, policy: DiffusionPolicy) -> None:
        super().__init__()
        denoiser, self.marked = policy.denoiser, policy.max_delay > 0
        self.denoiser = PlainUnet(denoiser) if isinstance(denoiser, ConditionalUnet1d) else denoiser

    def forward(self, x: Tensor, film: Tensor) -> Tensor:
        result: Tensor = self.denoiser(Prefix.none(x).mark(x) if self.marked else x, film)
        return result


class _End(nn.Module):
    """Normalised chunks [B, H, A], and where the action's frame is [B, n], if there is one → the data's units."""

    def __init__(self, policy: DiffusionPolicy) -> None:
        super().__init__()
        self.policy = policy

    def forward(self, normalized: Tensor, now: Tensor | None = None) -> Tensor:
        frame = self.policy.action_frame
        if frame is None or now is None:
            return self.policy.unnormalize_action(normalized, {})
        sizes = [math.prod(self.policy.spec.states[key].shape) for key in frame.observations]
        parts = now.unsqueeze(1).split(sizes, dim=-1)
        return self.policy.unnormalize_action(normalized, dict(zip(frame.observations, parts, strict=True)))


def _example(policy: DiffusionPolicy) -> tuple[Tensor, ...]:
    obs = made_up(policy.spec)
    rows = [np.stack([obs[key]] * BATCH) for key in policy.spec.observations]
    return tuple(torch.from_numpy(row if row.dtype == np.uint8 else row.astype(np.float32)) for row in rows)


def _traced(module: nn.Module, given: tuple[Any, ...], inputs: list[str], outputs: list[str], opset: int) -> Any:
    """The graph of a part with any batch. Raises `InputError` naming the part that torch's exporter cannot take."""
    batch = torch.export.Dim("batch", min=1)

    def free(part: Any) -> Any:
        return {0: batch} if isinstance(part, Tensor) else tuple(free(inner) for inner in part)

    part = type(module).__name__.strip("_").lower()
    said = io.StringIO()
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            warnings.simplefilter("ignore")
            logging.disable(logging.ERROR)
            program = torch.onnx.export(
                module.eval(),
                given,
                dynamo=True,
                optimize=True,
                verbose=False,
                opset_version=opset,
                input_names=inputs,
                output_names=outputs,
                dynamic_shapes=tuple(free(one) for one in given),
            )
            assert program is not None
            model = program.model_proto
    except Exception as error:  # whatever tracing meets in layers, of other people's as well
        causes: list[BaseException] = [error]
        while causes[-1].__cause__ is not None:
            causes.append(causes[-1].__cause__)
        reason = " ".join(str(causes[-1]).split())[:300] or type(causes[-1]).__name__
        raise InputError(f"format=onnx: torch's exporter cannot take the policy's {part}: {reason}") from None
    finally:
        logging.disable(logging.NOTSET)
    if model.functions or any(found.domain for found in model.opset_import) or model.opset_import[0].version != opset:
        raise InputError(f"format=onnx: the policy's {part} needs more than ONNX's operators of opset {opset}")
    if [value.name for value in model.graph.input] != inputs:
        raise InputError(f"format=onnx: the policy's {part} does not look at all of {', '.join(inputs)}")
    return model.graph


def _prefixed(graph: Any, prefix: str) -> Any:
    """The graph, with a prefix before all names but those of its inputs and outputs, and without remarks."""
    kept = {value.name for value in (*graph.input, *graph.output)} | {""}

    def name(old: str) -> str:
        return old if old in kept else prefix + old

    for node in graph.node:
        node.name, node.doc_string = prefix + node.name, ""
        del node.metadata_props[:]
        for names in (node.input, node.output):
            names[:] = [name(old) for old in names]
    for value in graph.initializer:
        value.name, value.doc_string = name(value.name), ""
        del value.metadata_props[:]
    return graph


def _tables(policy: DiffusionPolicy) -> list[Any]:
    """The numbers of the K denoising steps: what the network is told [K, F], and of every linear map [K]."""
    from onnx import numpy_helper

    sampler, solver = policy.sampler, policy.sampler.solver
    with torch.no_grad():
        condition = policy.see(dict(zip(policy.spec.observations, _example(policy), strict=True))).condition
        film = policy.denoiser.prepare(condition, sampler.times(policy.device)).steps
    one, zero = torch.ones(1, 1, 1, dtype=torch.float64), torch.zeros(1, 1, 1, dtype=torch.float64)
    x0 = policy.process.x0_from_output  # linear in both
    drawn = np.cumsum([move.draws for move in solver.moves]) - 1
    low, high = sampler.bounds or (torch.tensor(-sampler.clip_range), torch.tensor(sampler.clip_range))
    tables: dict[str, Any] = {
        "film": film.numpy(),
        "of_x": [float(x0(zero, one, step)) for step in solver.steps],
        "of_output": [float(x0(one, zero, step)) for step in solver.steps],
        "keep": [move.keep for move in solver.moves],
        "kept": [move.keep * step.a for move, step in zip(solver.moves, solver.steps, strict=True)],
        "spread": [move.spread for move in solver.moves],
        "low": low.numpy(),
        "high": high.numpy(),
        "start": solver.start,
    }
    for back in range(solver.memory):
        tables[f"blend{back}"] = [move.blend[back] if back < len(move.blend) else 0.0 for move in solver.moves]
    arrays = {name: np.asarray(value, np.float32) for name, value in tables.items()}
    arrays |= {"drawn": np.maximum(drawn, 0).astype(np.int64), "n_steps": np.array(len(solver.steps), np.int64)}
    return [numpy_helper.from_array(array, f"sampler/{name}") for name, array in arrays.items()]


def _loop(policy: DiffusionPolicy, step: Any, chunk: list[int], draws: bool) -> list[Any]:
    """Nodes from "noise", "condition" and "step_noise" to "normalized"; `step`: graph from loop/x, loop/film to
    loop/output, whose weights are the file's."""
    from onnx import TensorProto, helper

    memory, start, clip = policy.sampler.solver.memory, policy.sampler.solver.start, policy.sampler.clip
    nodes = []

    def add(operator: str, inputs: Sequence[str], output: str, **options: Any) -> str:
        nodes.append(helper.make_node(operator, list(inputs), [output], name=output, **options))
        return output

    def number(table: str) -> str:
        return add("Gather", [f"sampler/{table}", "loop/i"], f"loop/table_{table}", axis=0)

    def clipped(value: str, target: str) -> str:
        if clip != target:
            return value
        above = add("Max", [value, "sampler/low"], f"{value}_above")
        return add("Min", [above, "sampler/high"], f"{value}_clipped")

    add("Add", ["condition", number("film")], "loop/film")
    nodes += _prefixed(step, "step/").node
    kept = add("Mul", ["loop/x", number("of_x")], "loop/x_part")
    said = add("Mul", ["loop/output", number("of_output")], "loop/output_part")
    estimate = clipped(add("Add", [kept, said], "loop/x0"), "x0")
    following = add("Mul", ["loop/x", number("keep")], "loop/kept")
    older = [f"loop/x0_{back}" for back in range(1, memory)]
    for back, said_before in enumerate([estimate, *older]):
        part = add("Mul", [said_before, number(f"blend{back}")], f"loop/blended{back}")
        following = add("Add", [following, part], f"loop/sum{back}")
    if policy.sampler.solver.keeps_noise:
        cut = add("Sub", [estimate, "loop/x0"], "loop/cut")
        following = add("Add", [following, add("Mul", [cut, number("kept")], "loop/cut_part")], "loop/with_noise")
    if draws:
        z = add("Gather", [STEP_NOISE, number("drawn")], "loop/z", axis=1)
        following = add("Add", [following, add("Mul", [z, number("spread")], "loop/spread_z")], "loop/noisy")
    following = clipped(following, "x")
    add("Identity", [following], "loop/x_next")
    add("Identity", ["loop/going"], "loop/going_on")
    newer = [add("Identity", [one], f"loop/next{i}") for i, one in enumerate([estimate, *older][: memory - 1])]
    describe = helper.make_tensor_value_info
    i, going = describe("loop/i", TensorProto.INT64, []), describe("loop/going", TensorProto.BOOL, [])
    carried, carried_on = (
        [describe(name, TensorProto.FLOAT, ["batch", *chunk]) for name in names]
        for names in (["loop/x", *older], ["loop/x_next", *newer])
    )
    going_on = describe("loop/going_on", TensorProto.BOOL, [])
    body = helper.make_graph(nodes, "denoise", [i, going, *carried], [going_on, *carried_on])
    begun = [] if start == 1.0 else [helper.make_node("Mul", [NOISE, "sampler/start"], ["begun"], name="begun")]
    first = "begun" if begun else NOISE
    nothing = [helper.make_node("Sub", [first, first], [f"none{i}"], name=f"none{i}") for i in range(1, memory)]
    loop = helper.make_node(
        "Loop",
        ["sampler/n_steps", "", first, *(f"none{i}" for i in range(1, memory))],
        ["normalized", *(f"left{i}" for i in range(1, memory))],
        name="denoise",
        body=body,
    )
    return [*begun, *nothing, loop]


def holds(path: Path) -> bool:
    """Whether it is an ONNX file, by its name."""
    return onnx_file.is_onnx(path)


ONNX = PolicyFormat("onnx", holds, None, write)
