"""Policies as ONNX files: the same chunks by ONNX Runtime, and nothing read or run that a hostile file asks for."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx as onnx_library
import onnxruntime
import pytest
import safetensors.numpy
import torch
from onnx import TensorProto, helper, numpy_helper
from tiny import TINY, demonstrations, tiny_policy

from action_diffusion import cli
from action_diffusion.errors import InputError
from action_diffusion.policy import bundle as bundles
from action_diffusion.policy.build import build_policy
from action_diffusion.policy.inference import choose_threads
from action_diffusion.policy.interchange import onnx as exporter
from action_diffusion.policy.model.normalizer import fit
from action_diffusion.policy.noise import NumpyGenerator
from action_diffusion.policy.opening import load
from action_diffusion.policy.policy import DiffusionPolicy
from action_diffusion.policy.runtime.onnx_file import ABOUT, GOLDEN, STEP_NOISE, read
from action_diffusion.policy.runtime.onnx_policy import OnnxPolicy
from action_diffusion.policy.spec import ActionSpec, ObservationSpec
from action_diffusion.rotations import RotationColumns

UNET = {"name": "unet1d", "channels": [8], "time_dim": 16}
POLICIES: dict[str, dict[str, Any]] = {  # each part of policies once, since tracing takes seconds
    "ddim that draws noise, prefix steps": {
        "sampler": {"scheduler": "ddim", "num_inference_steps": 5, "eta": 1.0},
        "objective": {"loss": "mse", "max_delay": 2},
        "denoiser": UNET,
    },
    "ddpm, object's frame": {
        "sampler": {"scheduler": "ddpm", "num_inference_steps": 10},
        "action_frame": {"name": "planar_object", "observation": "state", "pose": [2, 3, 4]},
        "denoiser": UNET,
    },
    "ddim that keeps noise": {
        "sampler": {"scheduler": "ddim", "num_inference_steps": 5, "use_clipped_model_output": False},
        "denoiser": UNET,
    },
    "dpm_solver++, mish": {
        "sampler": {"scheduler": "dpm_solver++", "num_inference_steps": 6},
        "denoiser": UNET | {"activation": "mish"},
    },
    "v prediction, clipped samples, gaussian normaliser": {
        "process": {"name": "diffusion", "prediction": "v_prediction"},
        "sampler": {"scheduler": "ddim", "num_inference_steps": 4, "clip": "x"},
        "normalizer": {"default": "gaussian"},
        "denoiser": UNET,
    },
    "flow, two times": {
        "objective": {"name": "shortcut"},
        "process": {"name": "flow"},
        "sampler": {"scheduler": "flow", "num_inference_steps": 4, "clip": None},
        "denoiser": UNET,
    },
    "mip": {  # begins with zeros: norms of one channel would then divide nothing by nothing
        "process": {"name": "mip"},
        "sampler": {"scheduler": "mip", "num_inference_steps": 2},
        "denoiser": {"name": "unet1d", "channels": [16, 32], "time_dim": 16},
    },
    "transformer, position frame": {
        "denoiser": {"name": "transformer"},
        "action_frame": {"name": "position", "observation": "state", "columns": [0, 1], "action_columns": [0, 1]},
    },
    "dit": {"denoiser": {"name": "dit"}},
}


def windows(policy: DiffusionPolicy, rows: int) -> dict[str, np.ndarray]:
    """Observations [B, To, …]: demonstrated states, and pictures of noise."""
    states, random = demonstrations()["state"][:], np.random.default_rng(rows)
    obs = {}
    for key, value in policy.spec.observations.items():
        if value.kind == "image":
            obs[key] = random.integers(0, 256, (rows, policy.spec.n_obs_steps, *value.shape), dtype=np.uint8)
        else:
            obs[key] = np.stack([states[7 * row : 7 * row + policy.spec.n_obs_steps] for row in range(rows)])
    return obs


def exported(policy: DiffusionPolicy, folder: Path, config: Mapping[str, Any] = TINY) -> OnnxPolicy:
    seen = {key: value[0] for key, value in windows(policy, 1).items()}
    bundles.save(folder / "bundle", policy, {"policy": dict(config)}, golden_obs=seen)
    exporter.write(policy, {"policy": dict(config)}, folder / "policy.onnx", {"in": str(folder / "bundle")})
    return OnnxPolicy.load(folder / "policy.onnx")


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> tuple[DiffusionPolicy, Path]:
    """A policy that draws noise in its steps, and the folder of its bundle and policy.onnx."""
    changes = {"sampler": {"scheduler": "ddim", "num_inference_steps": 4, "eta": 1.0}, "denoiser": UNET}
    policy, folder = tiny_policy(demonstrations(), **changes), tmp_path_factory.mktemp("onnx")
    exported(policy, folder, TINY | changes)
    return policy, folder


@pytest.fixture
def policy(small) -> DiffusionPolicy:
    return small[0]


@pytest.fixture
def file(small) -> Path:
    return small[1] / "policy.onnx"


@pytest.fixture
def onnx(file: Path) -> OnnxPolicy:
    return OnnxPolicy.load(file, threads=1)


def difference(policy: DiffusionPolicy, onnx: OnnxPolicy, rows: int) -> float:
    """The largest between both policies' chunks, over the action's range."""
    spec, random = policy.spec, np.random.default_rng(rows)
    obs = windows(policy, rows)
    noise = random.standard_normal((rows, spec.horizon, *spec.action.shape)).astype(np.float32)
    generators = [[torch.Generator().manual_seed(seed) for seed in range(rows)] for _ in range(2)]
    expected = policy.predict(obs, noise=noise, generator=generators[0])
    found = onnx.predict(obs, noise=noise, generator=generators[1])
    statistics = spec.normalizer["action"]
    span = np.subtract(statistics["max"], statistics["min"])
    assert found["action"].shape == expected["action"].shape
    return float((np.abs(found["action_pred"] - expected["action_pred"]) / span).max())


@pytest.mark.slow
@pytest.mark.parametrize("name", POLICIES)
def test_chunks_are_those_of_torch(name: str, tmp_path: Path) -> None:
    policy = tiny_policy(demonstrations(), **POLICIES[name])
    onnx = exported(policy, tmp_path)
    assert [difference(policy, onnx, rows) < 1e-4 for rows in (1, 3)] == [True, True]
    draws = policy.sampler.draw_step_noise(torch.zeros(1, 8, 2), None) is not None
    assert (STEP_NOISE in onnx._file.inputs) == draws


@pytest.mark.slow
def test_pictures_with_a_crop_and_a_state_of_two_keys(tmp_path: Path) -> None:
    corners = np.array([[100.0, 100, 100, 100, 100], [130.0, 130, 130, 130, 130]])
    shape = ObservationSpec(shape=(20, 24, 3), dtype="uint8", kind="image")
    spec = replace(
        tiny_policy(demonstrations()).spec,
        observations={"camera.top": shape, "state": ObservationSpec(shape=(5,), source="state")},
        normalizer={"state": fit(corners), "action": fit(corners[:, :2])},
    )
    encoder = {"name": "observation", "width": 0.25, "stages": 1, "crop": [16, 16], "feature_dim": 8, "keypoints": 4}
    policy = build_policy(TINY | {"features": {}, "encoder": encoder, "denoiser": UNET}, spec).eval()
    onnx = exported(policy, tmp_path)
    assert [difference(policy, onnx, rows) < 1e-4 for rows in (1, 3)] == [True, True]


@pytest.mark.slow
def test_rotations_are_valid_ones(tmp_path: Path) -> None:
    """Quaternions [x, y, and four values]: of length 1 in the chunk, whatever the network says."""
    ends, rotation = np.array([[-2.0] * 6, [2.0] * 6]), (RotationColumns(2, "quaternion_xyzw"),)
    spec = replace(
        tiny_policy(demonstrations()).spec,
        observations={"state": ObservationSpec(shape=(6,), rotations=rotation)},
        action=ActionSpec(shape=(6,), rotations=rotation),
        normalizer={"state": fit(ends), "action": fit(ends)},
    )
    policy = build_policy(TINY | {"features": {}, "denoiser": UNET}, spec).eval()
    exporter.write(policy, {"policy": TINY}, tmp_path / "policy.onnx", {"in": str(tmp_path / "nowhere")})
    obs = {"state": np.random.default_rng(0).uniform(-1, 1, (3, 2, 6)).astype(np.float32)}
    noise = np.random.default_rng(1).standard_normal((3, 8, 6)).astype(np.float32)
    made = OnnxPolicy.load(tmp_path / "policy.onnx").predict(obs, noise=noise)["action_pred"]
    np.testing.assert_allclose(np.linalg.norm(made[..., 2:], axis=-1), 1, atol=1e-5)
    np.testing.assert_allclose(made, policy.predict(obs, noise=noise)["action_pred"], atol=1e-4)


def test_a_single_observation_has_a_single_chunk(onnx: OnnxPolicy, policy: DiffusionPolicy) -> None:
    obs = {key: value[0] for key, value in windows(policy, 1).items()}
    noise = np.zeros((1, 8, 2), np.float32)
    made = onnx.predict(obs, noise=noise)
    assert made["action_pred"].shape == (8, 2)
    assert made["action_pred"].dtype == np.float32
    np.testing.assert_array_equal(made["action"], made["action_pred"][1:5])


def test_the_golden_pair_is_the_bundles_own(file: Path) -> None:
    """Another program that computes the file finds in it what it has to come to."""
    model = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    golden = read(file).golden
    given = {name: value if value.ndim != 2 else value[None] for name, value in golden.items() if name != "action_pred"}
    (made,) = model.run(None, given)
    saved = safetensors.numpy.load_file(file.parent / "bundle" / "golden.safetensors")
    np.testing.assert_allclose(made[0], saved["action_pred"], atol=1e-3)  # px, of 20
    assert OnnxPolicy.load(file).verify(1e-4) < 1e-4


@pytest.mark.parametrize("threads", [None, 1])
def test_policy_load_takes_the_file(file: Path, policy: DiffusionPolicy, threads: int | None) -> None:
    opened = load(file, runtime="onnx", threads=threads, verify=True)
    assert isinstance(opened, OnnxPolicy)
    assert opened.spec == policy.spec
    assert choose_threads(opened) in (1, opened.threads)
    assert isinstance(load(file.parent / "bundle"), DiffusionPolicy)


@pytest.mark.parametrize(
    ("path", "options", "message"),
    [
        ("policy.onnx", {"runtime": "torch"}, "is an ONNX file"),
        ("policy.onnx", {"runtime": "tensorrt"}, "unknown runtime 'tensorrt'"),
        ("policy.onnx", {"device": "mps"}, "device=mps is none of this ONNX Runtime"),
        ("policy.onnx", {"sampler": {"num_inference_steps": 2}}, "sampler.num_inference_steps"),
        ("policy.onnx", {"precision": "fp16"}, "precision"),
        ("policy.onnx", {"extensions": ["guard"]}, "extensions"),
        ("bundle", {"runtime": "onnx"}, "bundle export"),
        ("bundle", {"threads": 2}, "threads is for ONNX files"),
        ("nowhere.onnx", {}, "nowhere.onnx: No such file"),
    ],
)
def test_what_cannot_be_is_one_line(file: Path, path: str, options: dict, message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)) as caught:
        load(file.parent / path, **options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"noise": np.zeros((2, 8, 2))}, "noise has shape"),
        ({"step_noise": np.zeros((1, 3, 8, 2))}, "step_noise has shape"),
        ({"hooks": [object()]}, "hooks and prefix"),
        ({"generator": [NumpyGenerator(0)] * 2}, "2 generators for 1 rows"),
    ],
)
def test_what_a_prediction_cannot_take_is_one_line(onnx: OnnxPolicy, policy, options: dict, message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        onnx.predict(windows(policy, 1), **options)


def test_observations_of_another_shape_are_refused(onnx: OnnxPolicy) -> None:
    with pytest.raises(InputError, match="observation 'state' has shape"):
        onnx.predict({"state": np.zeros((3, 5))})


def external(model: Any, folder: Path) -> None:
    secret = folder / "secret"
    secret.write_bytes(bytes(4 * 1000))
    tensor = model.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in (("location", str(secret)), ("length", "4000")):
        entry = tensor.external_data.add()
        entry.key, entry.value = key, value


def in_a_constant(model: Any, folder: Path) -> None:
    constant = helper.make_node("Constant", [], ["more"], value=helper.make_tensor("t", TensorProto.FLOAT, [1], [0]))
    constant.attribute[0].t.data_location = TensorProto.EXTERNAL
    model.graph.node.insert(0, constant)


def in_the_loop(model: Any, folder: Path) -> None:
    (body,) = (node.attribute[0].g for node in model.graph.node if node.op_type == "Loop")
    in_a_constant(helper.make_model(body), folder)
    body.node.insert(0, helper.make_node("Mine", ["loop/x"], ["nothing"], domain="evil"))


def own_operator(model: Any, folder: Path) -> None:
    model.graph.node.append(helper.make_node("PyOp", ["noise"], ["nothing"], domain="ai.onnx.contrib"))


def own_domain(model: Any, folder: Path) -> None:
    model.opset_import.append(helper.make_opsetid("com.microsoft", 1))


def function(model: Any, folder: Path) -> None:
    model.functions.append(helper.make_function("mine", "f", ["x"], ["x"], [], model.opset_import))


def endless(model: Any, folder: Path) -> None:
    (steps,) = (tensor for tensor in model.graph.initializer if tensor.name == "sampler/n_steps")
    steps.CopyFrom(numpy_helper.from_array(np.array(2**62), "sampler/n_steps"))


def endless_by_an_input(model: Any, folder: Path) -> None:
    (loop,) = (node for node in model.graph.node if node.op_type == "Loop")
    loop.input[0] = ""


def branch(model: Any, folder: Path) -> None:
    graph = helper.make_graph([], "b", [], [])
    model.graph.node.append(helper.make_node("If", ["noise"], ["b"], then_branch=graph, else_branch=graph))


def future(model: Any, folder: Path) -> None:
    model.opset_import[0].version = 99


def other_input(model: Any, folder: Path) -> None:
    model.graph.input[0].type.tensor_type.shape.dim[1].dim_value = 9


def other_output(model: Any, folder: Path) -> None:
    model.graph.output[0].name = "action"


def unknown_operator(model: Any, folder: Path) -> None:
    model.graph.node.append(helper.make_node("NoSuch", ["noise"], ["b"]))


def more_memory_than_there_is(model: Any, folder: Path) -> None:
    size = numpy_helper.from_array(np.array([2**45]), "size")
    model.graph.initializer.append(size)
    model.graph.node.insert(0, helper.make_node("ConstantOfShape", ["size"], ["huge"]))
    model.graph.node.insert(1, helper.make_node("ReduceSum", ["huge"], ["sum"], keepdims=0))
    for node in model.graph.node:
        if node.op_type == "Loop":
            node.input[2] = "more"
    loop = next(i for i, node in enumerate(model.graph.node) if node.op_type == "Loop")
    model.graph.node.insert(loop, helper.make_node("Add", ["noise", "sum"], ["more"]))


def cut_weights(model: Any, folder: Path) -> None:
    model.graph.initializer[0].raw_data = b"123"


def about(change: Callable[[dict], None]) -> Callable[[Any, Path], None]:
    def changed(model: Any, folder: Path) -> None:
        (entry,) = (entry for entry in model.metadata_props if entry.key == ABOUT)
        data = json.loads(entry.value)
        change(data)
        entry.value = json.dumps(data)

    return changed


def metadata(name: str, value: str) -> Callable[[Any, Path], None]:
    def changed(model: Any, folder: Path) -> None:
        for entry in model.metadata_props:
            if entry.key == name:
                entry.value = value

    return changed


def without_metadata(model: Any, folder: Path) -> None:
    del model.metadata_props[:]


HOSTILE = {
    "weights in another file": (external, "lies in another file"),
    "a constant in another file": (in_a_constant, "lies in another file"),
    "somebody's operator in the loop": (in_the_loop, "operator 'Mine' of 'evil'"),
    "Python as an operator": (own_operator, "operator 'PyOp' of 'ai.onnx.contrib'"),
    "another domain": (own_domain, "com.microsoft"),
    "a function": (function, "functions"),
    "a loop of years": (endless, "not one loop over 1 to"),
    "a loop without an end": (endless_by_an_input, "not one loop over 1 to"),
    "a branch": (branch, "operator 'If', which is not one loop"),
    "an opset of the future": (future, "opset 99"),
    "another input": (other_input, "its input 'noise'"),
    "another output": (other_output, "its outputs are action"),
    "an operator that there is not": (unknown_operator, "ONNX Runtime cannot compute it"),
    "more memory than there is": (more_memory_than_there_is, "ONNX Runtime"),
    "weights that are cut": (cut_weights, "ONNX Runtime cannot compute it"),
    "no metadata": (without_metadata, "was not made by"),
    "metadata that is no JSON": (metadata(ABOUT, "{"), "not valid JSON"),
    "metadata of lists in lists": (metadata(ABOUT, "[" * 100_000), "not valid JSON"),
    "another format": (about(lambda data: data.update(format=2)), "format 2"),
    "no specification": (about(lambda data: data.pop("spec")), "expected format, spec and config"),
    "a target": (about(lambda data: data["config"].update(_target_="os.system")), "_target_"),
    "a horizon of nothing": (about(lambda data: data["spec"].update(horizon=0)), "horizon"),
    "statistics that are none": (about(lambda data: data["spec"].update(normalizer={})), "normaliser"),
    "a golden pair that is none": (metadata(GOLDEN, "????"), "not readable"),
    "another golden pair": (metadata(GOLDEN, ""), "not readable"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files_are_one_line(name: str, file: Path, tmp_path: Path) -> None:
    change, message = HOSTILE[name]
    model = onnx_library.load(file)
    change(model, tmp_path)
    (tmp_path / "p.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(InputError, match=re.escape(message)) as caught:
        OnnxPolicy.load(tmp_path / "p.onnx").verify(1.0)
    assert "\n" not in str(caught.value)
    assert "p.onnx" in str(caught.value)


@pytest.mark.parametrize("share", [0.0, 0.001, 0.3, 0.9])
def test_a_file_that_is_cut_or_none_is_one_line(share: float, file: Path, tmp_path: Path) -> None:
    data = file.read_bytes()
    (tmp_path / "p.onnx").write_bytes(data[: int(share * len(data))])
    with pytest.raises(InputError, match=r"p\.onnx"):
        OnnxPolicy.load(tmp_path / "p.onnx")
    (tmp_path / "p.onnx").write_bytes(np.random.default_rng(0).bytes(5000))
    with pytest.raises(InputError, match=r"p\.onnx: not a readable ONNX file"):
        OnnxPolicy.load(tmp_path / "p.onnx")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["export", "in=bundle", "out=policy", "format=onnx"], "the name of an ONNX file ends in .onnx"),
        (["export", "in=bundle", "out=new.onnx", "format=onnx", "opset=9"], "opset"),
        (["export", "in=bundle", "out=policy.onnx", "format=onnx"], "is there already"),
    ],
)
def test_the_command_says_what_is_wrong(words, message, file: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(file.parent)
    assert cli.main(["bundle", *words]) == 2
    assert message in capsys.readouterr().err
    assert not (file.parent / "new.onnx").exists()


def test_inspect_says_what_the_file_sees_and_does(file: Path, capsys) -> None:
    assert cli.main(["bundle", "inspect", str(file)]) == 0
    assert "state [5] state, px" in capsys.readouterr().out


def test_a_chunk_that_differs_is_never_left_behind(policy: DiffusionPolicy, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(exporter, "TOLERANCE", -1.0)
    with pytest.raises(InputError, match="ONNX Runtime's chunk for the golden input differs"):
        exported(policy, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


def test_steps_that_are_not_linear_are_refused(tmp_path: Path) -> None:
    sampler = {"scheduler": "masked", "num_inference_steps": 4, "clip": None}
    masked = tiny_policy(demonstrations(), process={"name": "masked"}, sampler=sampler)
    with pytest.raises(InputError, match="scheduler=masked"):
        exporter.model_of(masked, 18)


def test_layers_that_cannot_be_traced_are_one_line(policy: DiffusionPolicy) -> None:
    class Odd(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x if x.sum().item() > 0 else -x

    with pytest.raises(InputError, match="torch's exporter cannot take the policy's odd") as caught:
        exporter._traced(Odd(), (torch.ones(3, 2),), ["x"], ["y"], 18)
    assert "\n" not in str(caught.value)
