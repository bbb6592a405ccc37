"""Writes ROS 2 bags: MCAP files with joint states, commands, pictures and a mark of when is recorded."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("mcap_ros2", reason="ROS 2 bags need the extra mcap")

from mcap_ros2.writer import Writer

HEADER = """std_msgs/Header header
{fields}
================================================================================
MSG: std_msgs/Header
builtin_interfaces/Time stamp
string frame_id
================================================================================
MSG: builtin_interfaces/Time
int32 sec
uint32 nanosec
"""
DEFINITIONS = {
    "sensor_msgs/msg/JointState": HEADER.format(fields="string[] name\nfloat64[] position\nfloat64[] velocity"),
    "sensor_msgs/msg/Image": HEADER.format(
        fields="uint32 height\nuint32 width\nstring encoding\nuint8 is_bigendian\nuint32 step\nuint8[] data"
    ),
    "sensor_msgs/msg/CompressedImage": HEADER.format(fields="string format\nuint8[] data"),
    "std_msgs/msg/Float64MultiArray": "float64[] data",
    "std_msgs/msg/Bool": "bool data",
    "geometry_msgs/msg/Pose": (
        "geometry_msgs/Point position\ngeometry_msgs/Quaternion orientation\n"
        "================================================================================\n"
        "MSG: geometry_msgs/Point\nfloat64 x\nfloat64 y\nfloat64 z\n"
        "================================================================================\n"
        "MSG: geometry_msgs/Quaternion\nfloat64 x\nfloat64 y\nfloat64 z\nfloat64 w\n"
    ),
}


def stamp(time: float) -> dict[str, Any]:
    return {"stamp": {"sec": int(time), "nanosec": round(time % 1 * 1e9)}, "frame_id": "base"}


def image(pixels: np.ndarray, encoding: str, time: float, padding: int = 0) -> dict[str, Any]:
    """pixels [H, W] or [H, W, C], as the encoding has them; padding: bytes after each row."""
    rows = pixels.reshape(len(pixels), -1).view(np.uint8)
    padded = np.pad(rows, ((0, 0), (0, padding)))
    return {
        "header": stamp(time),
        "height": pixels.shape[0],
        "width": pixels.shape[1],
        "encoding": encoding,
        "is_bigendian": 0,
        "step": padded.shape[1],
        "data": padded.tobytes(),
    }


def png(pixels: np.ndarray, time: float) -> dict[str, Any]:
    from PIL import Image

    content = io.BytesIO()
    Image.fromarray(pixels).save(content, format="PNG")
    return {"header": stamp(time), "format": "png", "data": content.getvalue()}


def write_bag(path: Path, messages: list[tuple[float, str, str, Any]], compression: str = "zstd") -> None:
    """messages: (log time in s, topic, type, content)."""
    from mcap.writer import CompressionType

    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        writer = Writer(file, chunk_size=4096, compression=CompressionType[compression.upper()])
        schemas = {name: writer.register_msgdef(name, text) for name, text in DEFINITIONS.items()}
        for time, topic, kind, content in sorted(messages, key=lambda one: one[0]):
            nanoseconds = round(time * 1e9)
            writer.write_message(topic, schemas[kind], content, log_time=nanoseconds, publish_time=nanoseconds)
        writer.finish()  # type: ignore[no-untyped-call]


def episode(seconds: float = 1.0, begin: float = 100.0, late: float = 0.003) -> list[tuple[float, str, str, Any]]:
    """Joints at 100 Hz whose positions are their time, commands at 50 Hz, pictures at 30 Hz with their number.

    late: how long after its stamp a message is recorded, s.
    """
    told: list[tuple[float, str, str, Any]] = []
    for i in range(round(seconds * 100) + 1):
        t = begin + i / 100
        joints = {"header": stamp(t), "name": ["a", "b"], "position": [t - begin, i], "velocity": [0.0, 1.0]}
        told.append((t + late, "/joint_states", "sensor_msgs/msg/JointState", joints))
        if i % 2 == 0:
            told.append((t + late, "/command", "std_msgs/msg/Float64MultiArray", {"data": [i / 100, -i / 100, 7.0]}))
    for i in range(round(seconds * 30) + 1):
        t = begin + i / 30
        pixels = np.full((6, 8, 3), i, np.uint8)
        pixels[..., 0] = 200
        told.append((t + late, "/front", "sensor_msgs/msg/Image", image(pixels, "bgr8", t, padding=4)))
        told.append((t + late, "/wrist", "sensor_msgs/msg/CompressedImage", png(pixels, t)))
        depth = np.full((6, 8), 1000 + i, np.uint16)
        told.append((t + late, "/depth", "sensor_msgs/msg/Image", image(depth, "16UC1", t)))
    return told
