"""A file of `torch.save`, read without running anything: numbers and plain containers come out, whatever goes in.

    FILE, a zip that is not compressed:
      NAME/data.pkl   a pickle, a program for a stack machine ─▶ here: dict, list, tuple, numbers, str, bytes,
      NAME/data/0     the numbers of a storage, one after the other    `StoredTensor` (a tensor), `Made` (anything else)
      NAME/data/1     …

Python's unpickler imports what a pickle names, and calls it. This one has nothing to call: of the few names that a
checkpoint needs, which are listed here, it notes down the name, the arguments and the state; any other name ends it.
Sizes are compared with what the file holds before anything is allocated, and tensors are read when they are asked for.
"""

from __future__ import annotations

import math
import pickletools
import struct
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from action_diffusion.errors import InputError
from action_diffusion.schema import shown

MOST_BYTES = 8 * 2**20
"""Of the pickle: names, shapes and a configuration. Those of the largest policies take a few hundred kB."""
MOST_MEMBERS = 100_000
"""Of the zip, each a storage."""
ZIP, PICKLE = b"PK\x03\x04", b"\x80"
"""What files of `torch.save` begin with; the second, which is also any other pickle's, up to torch 1.5."""
DTYPES = {
    "torch.BFloat16Storage": torch.bfloat16,
    "torch.BoolStorage": torch.bool,
    "torch.ByteStorage": torch.uint8,
    "torch.CharStorage": torch.int8,
    "torch.DoubleStorage": torch.float64,
    "torch.FloatStorage": torch.float32,
    "torch.HalfStorage": torch.float16,
    "torch.IntStorage": torch.int32,
    "torch.LongStorage": torch.int64,
    "torch.ShortStorage": torch.int16,
}
DICTS = ("collections.OrderedDict", "collections.defaultdict")
TENSOR, PARAMETER = "torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_parameter"
NODES = (
    *("AnyNode", "BooleanNode", "BytesNode", "EnumNode", "FloatNode", "IntegerNode", "PathNode", "StringNode"),
    "InterpolationResultNode",
)
BUILTINS = ("bool", "bytes", "dict", "float", "int", "list", "long", "object", "str", "tuple", "unicode")
NAMES = {
    *DTYPES,
    *DICTS,
    TENSOR,
    PARAMETER,
    "_codecs.encode",  # how old pickles have bytes
    "dill._dill._load_type",  # how dill names built-in types
    "dill.dill._load_type",
    "typing.Any",
    *("numpy.dtype", "numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar"),
    "omegaconf.base.ContainerMetadata",
    "omegaconf.base.Metadata",
    "omegaconf.dictconfig.DictConfig",
    "omegaconf.listconfig.ListConfig",
    *(f"omegaconf.nodes.{node}" for node in NODES),
    *(f"{module}.{name}" for module in ("builtins", "__builtin__") for name in BUILTINS),
}
"""What a checkpoint may name. None of it is imported."""


@dataclass(frozen=True)
class Storage:
    """So many numbers of the file's member NAME/data/`key`."""

    key: str
    dtype: torch.dtype
    count: int


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a storage: where it begins, its sizes, and how many numbers lie between neighbours."""

    storage: Storage
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]


@dataclass(eq=False)
class Made:
    """What the pickle would make by a name from the list: with which arguments, and the state that it would give it."""

    name: str
    arguments: tuple[Any, ...] | None = None
    state: Any = None


class TorchFile:
    """content: of the file at `path`. Raises `InputError` for anything that is not as `torch.save` writes it."""

    def __init__(self, path: Path):
        self.path = path
        with path.open("rb") as file:
            start = file.read(len(ZIP))
        if start != ZIP:
            what = "a pickle, or a file of torch before 1.6" if start.startswith(PICKLE) else "no file"
            raise InputError(f"{path}: {what}, expected a zip of torch.save: load and save it with torch 1.6 or later")
        with _opened(path) as archive:
            self._members = {member.filename: member for member in archive.infolist()}
            found = [name for name in self._members if name.endswith("/data.pkl") and name.count("/") == 1]
            if len(found) != 1 or len(self._members) > MOST_MEMBERS:
                raise InputError(f"{path}: {len(found)} data.pkl in a zip of {len(self._members):,} files, expected 1")
            self._root = found[0].removesuffix("data.pkl")
            order = self._root + "byteorder"
            if order in self._members and self._read(archive, order, most=64) != b"little":
                raise InputError(f"{path}: its numbers are not little-endian")
            program = self._read(archive, found[0], most=MOST_BYTES)
        try:
            self.content = _Machine(self._check_storage).run(program)
        except InputError as error:
            raise InputError(f"{path}: {error}; nothing of it was run") from None

    def tensors(self, wanted: Mapping[str, StoredTensor]) -> Iterator[tuple[str, Tensor]]:
        """The numbers of tensors, by name, each contiguous and by itself."""
        with _opened(self.path) as archive:
            for name, stored in wanted.items():
                data = self._read(archive, f"{self._root}data/{stored.storage.key}")
                if data:
                    numbers = torch.frombuffer(bytearray(data), dtype=stored.storage.dtype)
                    yield name, numbers.as_strided(stored.size, stored.stride, stored.offset).contiguous()
                else:
                    yield name, torch.empty(stored.size, dtype=stored.storage.dtype)

    def _read(self, archive: zipfile.ZipFile, name: str, most: int | None = None) -> bytes:
        member = self._members[name]
        if member.compress_type != zipfile.ZIP_STORED or member.file_size != member.compress_size:
            raise InputError(f"{self.path}: {shown(name)} is compressed, which torch.save never does")
        most = self.path.stat().st_size if most is None else most
        if member.file_size > most:
            raise InputError(f"{self.path}: {shown(name)} has {member.file_size:,} bytes, at most {most:,} can be")
        return archive.read(member)

    def _check_storage(self, storage: Storage) -> None:
        member = self._members.get(f"{self._root}data/{storage.key}")
        needed = storage.count * storage.dtype.itemsize
        if member is None or member.file_size != needed:
            there = "none" if member is None else f"{member.file_size:,}"
            raise InputError(f"storage {shown(storage.key)} of {needed:,} bytes: the file has {there}")


@contextmanager
def _opened(path: Path) -> Iterator[zipfile.ZipFile]:
    """A zip file to read, and one line for whatever is wrong with it."""
    try:
        with zipfile.ZipFile(path) as archive:
            yield archive
    except InputError:
        raise
    except (zipfile.BadZipFile, OSError, ValueError, RuntimeError, EOFError, OverflowError, struct.error) as error:
        why = shown(str(error) or type(error).__name__)
        raise InputError(f"{path}: not a whole zip of torch.save: {why}") from None


class _Machine:
    """The stack machine that a pickle is a program for, without anything that could be called."""

    def __init__(self, check_storage: Callable[[Storage], None]):
        self._check_storage = check_storage
        self._stack: list[Any] = []
        self._marks: list[int] = []
        self._memo: dict[int, Any] = {}

    def run(self, program: bytes) -> Any:
        """What the program leaves. Raises `InputError` for one that is no pickle, or that a checkpoint is not."""
        try:
            for instruction, argument in _instructions(program):
                if instruction in _VALUES:
                    self._stack.append(argument)
                elif instruction in _CONSTANTS:
                    self._stack.append(_CONSTANTS[instruction]())
                elif instruction in _STEPS:
                    _STEPS[instruction](self, argument)
                elif instruction not in ("PROTO", "FRAME", "STOP"):
                    raise InputError(f"its pickle has {instruction}, which no checkpoint needs")
            (result,) = self._stack
        except (IndexError, KeyError, TypeError, ValueError) as error:
            if isinstance(error, InputError):
                raise
            raise InputError(f"not a valid pickle: {shown(str(error) or type(error).__name__)}") from None
        return result

    def _pop(self, count: int) -> list[Any]:
        if count > len(self._stack):
            raise IndexError("it takes what is not there")
        taken = self._stack[len(self._stack) - count :]
        del self._stack[len(self._stack) - count :]
        return taken

    def _since_mark(self) -> list[Any]:
        return self._pop(len(self._stack) - self._marks.pop())

    def mark(self, _: Any) -> None:
        self._marks.append(len(self._stack))

    def pop(self, _: Any) -> None:
        self._pop(1)

    def put(self, index: int | None) -> None:
        self._memo[len(self._memo) if index is None else index] = self._stack[-1]

    def get(self, index: int) -> None:
        self._stack.append(self._memo[index])

    def tuple_(self, _: Any) -> None:
        self._stack.append(tuple(self._since_mark()))

    def append(self, _: Any) -> None:
        self._extend(self._pop(1))

    def appends(self, _: Any) -> None:
        self._extend(self._since_mark())

    def _extend(self, values: list[Any]) -> None:
        if not isinstance(self._stack[-1], list):
            raise TypeError("it adds to what is no list")
        self._stack[-1].extend(values)

    def set_item(self, _: Any) -> None:
        self._update(self._pop(2))

    def set_items(self, _: Any) -> None:
        self._update(self._since_mark())

    def _update(self, pairs: list[Any]) -> None:
        target = self._stack[-1]
        if not isinstance(target, dict):
            raise TypeError("it sets items of what is no dict")
        for key, value in zip(pairs[::2], pairs[1::2], strict=True):
            if not all(isinstance(part, _SCALARS) for part in (key if isinstance(key, tuple) else (key,))):
                raise TypeError("a key of a dict is neither a number nor a word")
            target[key] = value

    def name(self, argument: str | None) -> None:
        """A name is taken only from the list."""
        name = ".".join(self._pop(2) if argument is None else argument.split(" ", 1))
        if name not in NAMES:
            raise InputError(f"its pickle names {shown(name)}, which no checkpoint of a policy needs: refused")
        self._stack.append(Made(name))

    def made(self, _: Any) -> None:
        """What would be a call, or a new object."""
        made, arguments = self._pop(2)
        if not isinstance(made, Made) or made.arguments is not None or not isinstance(arguments, tuple):
            raise TypeError("it calls what is no name")
        if made.name in DICTS:
            self._stack.append({})
        elif made.name == TENSOR:
            self._stack.append(_stored(*arguments[:4]))
        elif made.name == PARAMETER:
            self._stack.append(arguments[0])
        else:
            self._stack.append(Made(made.name, arguments))

    def build(self, _: Any) -> None:
        (state,) = self._pop(1)
        if isinstance(self._stack[-1], Made) and self._stack[-1].arguments is not None:
            self._stack[-1].state = state
        elif not isinstance(self._stack[-1], dict):  # of one, torch's version numbers, which say nothing here
            raise TypeError("it gives a state to what has none")

    def persistent(self, _: Any) -> None:
        """A storage: ("storage", its type, its key, where it was, how many numbers)."""
        (identity,) = self._pop(1)
        kind, made, key, _, count = identity
        if kind != "storage" or not isinstance(made, Made) or not isinstance(key, str) or not isinstance(count, int):
            raise TypeError("it refers to what is no storage")
        if made.name not in DTYPES:
            raise InputError(f"a storage of {shown(made.name)}: expected one of {', '.join(DTYPES)}")
        storage = Storage(key, DTYPES[made.name], count)
        self._check_storage(storage)
        self._stack.append(storage)


_SCALARS = (str, bytes, int, float, type(None))
_VALUES = {
    *("BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"),
    *("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT"),
}
_CONSTANTS: dict[str, Callable[[], Any]] = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_DICT": dict,
    "EMPTY_LIST": list,
    "EMPTY_TUPLE": tuple,
}
_STEPS: dict[str, Callable[[_Machine, Any], None]] = {
    "MARK": _Machine.mark,
    "POP": _Machine.pop,
    **dict.fromkeys(("BINPUT", "LONG_BINPUT", "MEMOIZE"), _Machine.put),
    **dict.fromkeys(("BINGET", "LONG_BINGET"), _Machine.get),
    "TUPLE": _Machine.tuple_,
    "TUPLE1": lambda machine, _: machine._stack.append(tuple(machine._pop(1))),
    "TUPLE2": lambda machine, _: machine._stack.append(tuple(machine._pop(2))),
    "TUPLE3": lambda machine, _: machine._stack.append(tuple(machine._pop(3))),
    "APPEND": _Machine.append,
    "APPENDS": _Machine.appends,
    "SETITEM": _Machine.set_item,
    "SETITEMS": _Machine.set_items,
    **dict.fromkeys(("GLOBAL", "STACK_GLOBAL"), _Machine.name),
    **dict.fromkeys(("REDUCE", "NEWOBJ"), _Machine.made),
    "BUILD": _Machine.build,
    "BINPERSID": _Machine.persistent,
}


def _instructions(program: bytes) -> Iterator[tuple[str, Any]]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for opcode, argument, _ in pickletools.genops(program):
            yield opcode.name, argument


def _stored(storage: Any, offset: Any, size: Any, stride: Any) -> StoredTensor:
    """Raises `InputError` for a tensor that leaves its storage, or has more numbers than it."""
    numbers = (offset, *size, *stride)
    if not isinstance(storage, Storage) or not all(type(number) is int and number >= 0 for number in numbers):
        raise InputError("a tensor is not as torch.save writes one")
    if len(size) != len(stride) or len(size) > 8:
        raise InputError(f"a tensor of {shown(size)} numbers with {shown(stride)} between neighbours")
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    if math.prod(size) > storage.count or (math.prod(size) and last >= storage.count):
        raise InputError(f"a tensor of {shown(size)} numbers leaves its storage of {storage.count:,}")
    return StoredTensor(storage, offset, tuple(size), tuple(stride))
