"""ONNX Runtime and OpenVINO on our networks. Its argument is the folder of packages that has them.

Each network is exported once, as `policy.interchange.plain` lays it out, and kept in the folder that the settings name.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from action_diffusion.options.bundle import OPSET
from action_diffusion.policy.interchange.onnx import model_of
from action_diffusion.policy.interchange.plain import PlainUnet
from action_diffusion.policy.model.denoisers.unet import ConditionalUnet1d
from benchmarks.peer import ours
from benchmarks.peer.peers.serving import Say, Work, serve

Run = Callable[[], np.ndarray]


class Network(Work):
    """The network of a row by one of the runtimes, in fp32, with as many threads as this process may use.

    settings: as `ours.Network`'s; models: the folder of exported networks; runtime: onnxruntime or openvino.
    """

    clock = ours.Network.clock

    def __init__(self, settings: dict[str, Any], folder: Path, say: Say) -> None:
        path, inputs = export(settings, say)
        self._run, self.note = MAKERS[settings["runtime"]](path, inputs, ours.THREADS)

    def outputs(self) -> dict[str, Tensor]:
        return {"output": torch.from_numpy(self._run())}

    def call(self) -> None:
        self._run()


def export(settings: dict[str, Any], say: Say) -> tuple[Path, dict[str, np.ndarray]]:
    """The network as an ONNX file, and its inputs by name."""
    layers, inputs = ours.network(settings)
    kind = f"{settings['part']}-{'image' if settings.get('image', True) else 'states'}"
    path = Path(settings["models"]) / f"{kind}-{'-'.join(map(str, settings['channels']))}.onnx"
    if not path.exists() and isinstance(layers, ours.WholeChunk):
        say("exporting")
        path.write_bytes(model_of(layers.policy, OPSET).SerializeToString())
    elif not path.exists():
        say("exporting")
        plain = PlainUnet(layers) if isinstance(layers, ConditionalUnet1d) else layers
        with torch.no_grad():
            torch.onnx.export(
                plain.eval(), tuple(inputs.values()), path, input_names=list(inputs), output_names=["output"]
            )
    return path, {name: value.contiguous().numpy() for name, value in inputs.items()}


def _onnxruntime(path: Path, inputs: dict[str, np.ndarray], threads: int) -> tuple[Run, str]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return lambda: session.run(None, inputs)[0], ""


def _openvino(path: Path, inputs: dict[str, np.ndarray], threads: int) -> tuple[Run, str]:
    """Without a hint it computes in bfloat16 where the processor can."""
    import openvino

    hints = {"INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": threads}
    compiled = openvino.Core().compile_model(str(path), "CPU", hints)
    request = compiled.create_infer_request()
    output = compiled.output(0)
    return lambda: request.infer(inputs)[output], ", ".join(sorted(_kernels(compiled)))


def _kernels(compiled: Any) -> set[str]:
    """What its convolutions and products run by, which says for which instructions."""
    kinds = set()
    for node in compiled.get_runtime_model().get_ordered_ops():
        told = {
            key: str(value.astype(str) if hasattr(value, "astype") else value) for key, value in node.rt_info.items()
        }
        if told.get("layerType") in ("Convolution", "Deconvolution", "FullyConnected", "MatMul"):
            kinds.add(told.get("primitiveType", "?"))
    return kinds


MAKERS = {"onnxruntime": _onnxruntime, "openvino": _openvino}


def about() -> dict[str, Any]:
    """Versions, threads, device, and the instructions that torch may use."""
    names = ("onnxruntime", "openvino", "onnx", "onnxscript")
    return {**ours.about(), **{name: metadata.version(name) for name in names}}


if __name__ == "__main__":
    sys.path.append(sys.argv[1])
    serve({"network": Network}, about)
