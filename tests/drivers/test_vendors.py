"""The stand-ins are like the libraries: every class, method, parameter and type, compared with what is installed."""

from __future__ import annotations

import enum
import importlib
import inspect
import re
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import vendors

CLASSES = [
    (module, given)
    for modules in (vendors.UR, vendors.FRANKA, vendors.REALSENSE)
    for module, classes in modules.items()
    for given in classes
]
TYPES = [
    (r"typing\.SupportsFloat \| typing\.SupportsIndex", "float"),
    (r"typing\.SupportsInt \| typing\.SupportsIndex", "int"),
    (r"typing\.Annotated\[numpy[^\"]*\"[^\"]*\"\]", "ndarray"),
    (r"typing\.Annotated\[(list\[float\]), \"[^\"]*\"\]", r"\1"),
    (r"\b(?:\w+\.)+(\w+)", r"\1"),  # module.Class
    (r"\brs2::", ""),
    (r"\bBufData\b", "ndarray"),  # the buffer of a frame, which numpy reads
]
"""How pybind11 writes types, and how we do."""


def parts(text: str) -> Iterator[str]:
    """`text` split at commas that are in no bracket and no string."""
    depth, start, quoted = 0, 0, ""
    for i, letter in enumerate(text):
        if quoted:
            quoted = "" if letter == quoted else quoted
        elif letter in "'\"":
            quoted = letter
        elif letter in "([{<":
            depth += 1
        elif letter in ")]}>":
            depth -= 1
        elif letter == "," and depth == 0:
            yield text[start:i].strip()
            start = i + 1
    if text[start:].strip():
        yield text[start:].strip()


def plain(annotation: str) -> str:
    for pattern, ours in TYPES:
        annotation = re.sub(pattern, ours, annotation)
    return annotation


def signatures(documentation: str) -> list[tuple[list[tuple[str, str, bool]], str]]:
    """Of a function of pybind11, one for each overload: (name, type, has a default) of parameters, and what returns."""
    found = []
    for line in documentation.splitlines():
        match = re.match(r"(?:\d+\. )?\w*\(self: [\w.]+(?:, )?(.*)\) -> (.+)$", line)
        if match:
            parameters = []
            for part in parts(match[1]):
                name, _, rest = part.partition(": ")
                kind, equals, _ = rest.partition(" = ")
                parameters.append((name, plain(kind), bool(equals)))
            found.append((parameters, plain(match[2])))
    return found


def ours(function: Any) -> tuple[list[tuple[str, str, bool]], str]:
    signature = inspect.signature(function)
    parameters = [
        (name, plain(str(value.annotation)), value.default is not inspect.Parameter.empty)
        for name, value in signature.parameters.items()
        if name != "self"
    ]
    return parameters, plain(str(signature.return_annotation))


def same(mine: tuple[list[tuple[str, str, bool]], str], theirs: tuple[list[tuple[str, str, bool]], str]) -> bool:
    """Names count where the library gives any."""
    (my_parameters, my_result), (parameters, result) = mine, theirs
    if len(my_parameters) != len(parameters) or my_result != result:
        return False
    return all(
        (name == my_name or re.fullmatch(r"arg\d+", name) is not None) and (kind, default) == (my_kind, my_default)
        for (my_name, my_kind, my_default), (name, kind, default) in zip(my_parameters, parameters, strict=True)
    )


def members(given: type) -> Iterator[tuple[str, Any, bool]]:
    """Name, function, and whether it is a property, of what a stand-in has."""
    for name, member in vars(given).items():
        if isinstance(member, property):
            yield name, member.fget, True
        elif callable(member) and (name == "__init__" or not name.startswith("_")):
            yield name, member, False


@pytest.mark.parametrize(("module", "given"), CLASSES, ids=lambda value: getattr(value, "__name__", value))
def test_a_stand_in_is_like_its_library(module, given):
    if module.startswith("rtde_") and sys.version_info >= (3, 13):
        pytest.skip("ur-rtde has no wheels for Python 3.13")
    real = getattr(importlib.import_module(module), given.__name__)
    if issubclass(given, enum.Enum):
        assert {member.name for member in given} <= set(real.__members__)
        return
    for name, function, is_property in members(given):
        theirs = getattr(real, name)
        documentation = theirs.fget.__doc__ if is_property else theirs.__doc__
        found = signatures(re.sub(r"^\s*\(self", "x(self", documentation))
        assert found, documentation
        mine = ours(function)
        assert any(same(mine, signature) for signature in found), f"{given.__name__}.{name}: {mine} is none of {found}"


def test_opencvs_capture_is_like_the_stand_in(tmp_path):
    """What the driver calls on a capture, on a film: OpenCV's functions have no signatures to compare."""
    import cv2

    path = str(tmp_path / "film.avi")
    writer = cv2.VideoWriter(path, cv2.VideoWriter.fourcc(*"MJPG"), 30.0, (64, 48))
    writer.write(np.full((48, 64, 3), 128, np.uint8))
    writer.release()
    capture = cv2.VideoCapture(path, cv2.CAP_ANY)
    try:
        assert capture.isOpened() is True
        assert isinstance(capture.set(cv2.CAP_PROP_BUFFERSIZE, 1), bool)
        assert capture.get(cv2.CAP_PROP_FRAME_WIDTH) == 64.0
        taken, image = capture.read()
        assert taken is True
        assert (image.dtype, image.shape) == (np.uint8, (48, 64, 3))
        assert isinstance(capture.get(cv2.CAP_PROP_POS_MSEC), float)
        assert capture.read() == (False, None)
    finally:
        assert capture.release() is None
    for name in ("CAP_V4L2", "CAP_PROP_FOURCC", "CAP_PROP_FPS", "CAP_PROP_AUTO_EXPOSURE", "CAP_PROP_EXPOSURE"):
        assert isinstance(getattr(cv2, name), int)


def test_the_comparison_sees_differences():
    real = signatures("servoStop(self: rtde_control.RTDEControlInterface, a: float = 10.0) -> bool")
    assert same(ours(vendors.RTDEControlInterface.servoStop), real[0])
    for other in ("a: float", "b: float = 1.0", "a: int = 1", "a: float = 1.0, c: int = 0", ""):
        comma = ", " if other else ""
        changed = signatures(f"servoStop(self: rtde_control.RTDEControlInterface{comma}{other}) -> bool")
        assert not same(ours(vendors.RTDEControlInterface.servoStop), changed[0])
    assert not same(ours(vendors.RTDEControlInterface.servoStop), (real[0][0], "None"))
