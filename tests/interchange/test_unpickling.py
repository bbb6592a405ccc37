"""Files of `torch.save`: what they hold comes out as it is, and whatever else they try does nothing, in one line."""

from __future__ import annotations

import collections
import os
import pickle
import random
import subprocess
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from action_diffusion.errors import InputError
from action_diffusion.policy.interchange.diffusion_policy.form import holds, read
from action_diffusion.policy.interchange.unpickling import MOST_BYTES, Made, StoredTensor, TorchFile


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "latest.ckpt"


def written(path: Path, program: bytes, members: dict[str, bytes] | None = None, **options: Any) -> Path:
    """A file of torch.save with this pickle."""
    with zipfile.ZipFile(path, "w", **options) as archive:
        archive.writestr("archive/data.pkl", program)
        for name, value in (members or {}).items():
            archive.writestr(f"archive/{name}", value)
    return path


def refused(path: Path) -> str:
    with pytest.raises(InputError) as error:
        read(path)
    message = str(error.value)
    assert len(message.splitlines()) == 1
    assert str(path) in message
    return message


def test_plain_values_and_tensors_come_out_as_they_went_in(path: Path) -> None:
    numbers = torch.arange(24.0).reshape(4, 6)
    tensors = {
        "view": numbers[1:, ::2].T,
        "row": numbers[2],
        "empty": torch.zeros(0, 3),
        "one": torch.tensor(3),
        "half": numbers.half(),
        "bf16": numbers.bfloat16(),
        "double": numbers.double(),
        "flags": numbers > 3,
        "parameter": nn.Parameter(numbers),
    }
    values: dict[Any, Any] = {
        "a": [1, -2.5, None, True, "ü", b"\x00\xff", (1, 2, 3, 4)],
        3: {"b": 2**40},
        "c": collections.OrderedDict(d=1),
    }
    torch.save({"tensors": tensors, "values": values}, path)
    file = TorchFile(path)
    values["a"][5] = file.content["values"]["a"][5]
    assert isinstance(values["a"][5], Made)  # bytes, which nothing needs
    assert file.content["values"] == values
    assert all(isinstance(stored, StoredTensor) for stored in file.content["tensors"].values())
    found = dict(file.tensors(file.content["tensors"]))
    assert list(found) == list(tensors)
    for name, value in tensors.items():
        torch.testing.assert_close(found[name], value.detach(), rtol=0, atol=0)


def test_newer_protocols_are_read(path: Path) -> None:
    for protocol in (2, 3, 4, 5):
        torch.save({"a": [1, {"b": torch.ones(2)}], "c": "d" * 300}, path, pickle_protocol=protocol)
        assert TorchFile(path).content["c"] == "d" * 300


class Calls:
    """Something whose pickle calls a function."""

    def __init__(self, function: Any, *arguments: Any):
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


def test_a_file_that_would_run_a_command_runs_nothing(path: Path, tmp_path: Path) -> None:
    touched = tmp_path / "touched"
    calls = [
        Calls(os.system, f"touch {touched}"),
        Calls(subprocess.Popen, ["touch", str(touched)]),
        Calls(eval, f"open({str(touched)!r}, 'w')"),
        Calls(exec, f"open({str(touched)!r}, 'w')"),
        Calls(getattr, os, "system"),
        Calls(open, str(touched), "w"),
        Calls(torch.load, str(touched)),
        Calls(torch.hub.load, str(tmp_path), "model", "local"),
        Calls(__import__, "antigravity"),
        Calls(pickle.loads, pickle.dumps(1)),
    ]
    for call in calls:
        for content in (
            call,
            {"cfg": call},
            {"cfg": {}, "state_dicts": {"ema_model": {}}, "pickles": {"epoch": [call]}},
        ):
            try:
                torch.save(content, path)
            except TypeError:  # a module as an argument
                continue
            message = refused(path)
            assert "its pickle names" in message
            assert "nothing of it was run" in message
            assert not touched.exists()


NAMES = [
    "os system",
    "posix system",
    "builtins eval",
    "builtins getattr",
    "__builtin__ getattr",
    "builtins type",
    "operator attrgetter",
    "functools partial",
    "copyreg _reconstructor",
    "dill._dill _create_function",
    "dill._dill _create_type",
    "dill._dill _import_module",
    "dill._dill _get_attr",
    "torch.hub load",
    "torch load",
    "torch._utils _rebuild_sparse_tensor",
    "torch.storage _load_from_bytes",
    "torch.jit._script load",
    "numpy load",
    "numpy.core.multiarray _reconstruct",
    "omegaconf.omegaconf OmegaConf.load",
    "omegaconf.dictconfig DictConfig.__init__.__globals__",
    "hydra.utils instantiate",
    "diffusion_policy.policy.diffusion_unet_lowdim_policy DiffusionUnetLowdimPolicy",
    "collections OrderedDict.__init__",
    " ",
]


@pytest.mark.parametrize("name", NAMES)
def test_a_name_that_is_not_on_the_list_ends_it(name: str, path: Path) -> None:
    module, _, attribute = name.partition(" ")
    plain = f"c{module}\n{attribute}\n".encode()
    stack = (
        b"\x8c"
        + bytes([len(module)])
        + module.encode()
        + b"\x8c"
        + bytes([len(attribute)])
        + attribute.encode()
        + b"\x93"
    )
    for called in (plain, stack):
        written(path, b"\x80\x04" + called + b"X\x04\x00\x00\x00true\x85R.")
        assert "which no checkpoint of a policy needs" in refused(path)


@pytest.mark.parametrize(
    ("program", "message"),
    [
        (b"", "not a valid pickle"),
        (b"\x80\x02", "not a valid pickle"),
        (b"\x80\x02.", "not a valid pickle"),
        (b"\x80\x02}}.", "not a valid pickle"),
        (b"\x80\x02R.", "it takes what is not there"),
        (b"\x80\x02u.", "not a valid pickle"),
        (b"\x80\x02h\x05.", "not a valid pickle"),
        (b"\x80\x02X\xff\xff\xff\x7fab.", "not a valid pickle"),
        (b"\x80\x04\x8d\xff\xff\xff\xff\xff\xff\xff\x7fab.", "not a valid pickle"),
        (b"\xff\x00.", "not a valid pickle"),
        (b"\x80\x02K\x01)R.", "it calls what is no name"),
        (b"\x80\x02}K\x01a.", "it adds to what is no list"),
        (b"\x80\x02]K\x01K\x01s.", "it sets items of what is no dict"),
        (b"\x80\x02}]K\x01s.", "a key of a dict is neither a number nor a word"),
        (b"\x80\x02})\x85K\x01s.", "a key of a dict is neither a number nor a word"),
        (b"\x80\x02ccollections\nOrderedDict\n}b.", "it gives a state to what has none"),
        (b"\x80\x02ctyping\nAny\n)\x81)R.", "it calls what is no name"),
        (b"\x80\x02K\x01Q.", "not a valid pickle"),
        (b"\x80\x02(X\x07\x00\x00\x00storageK\x01K\x01K\x01K\x01tQ.", "it refers to what is no storage"),
        (
            b"\x80\x02(X\x07\x00\x00\x00storagectyping\nAny\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x01tQ.",
            "a storage of typing.Any",
        ),
        (b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n)R.", "not a valid pickle"),
        (b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n(K\x01K\x00]]tR.", "is not as torch.save writes one"),
        (b"\x80\x04\x8f.", "EMPTY_SET, which no checkpoint needs"),
        (b"\x80\x02\x82\x01.", "EXT1, which no checkpoint needs"),
        (b"i__main__\nx\n.", "INST, which no checkpoint needs"),
    ],
)
def test_a_broken_program_gets_one_line(program: bytes, message: str, path: Path) -> None:
    assert message in refused(written(path, program))


def storage(count: int, key: str = "0", kind: str = "FloatStorage") -> bytes:
    number = b"\x8a\x08" + count.to_bytes(8, "little", signed=True)
    key_ = b"X" + len(key).to_bytes(4, "little") + key.encode()
    return (
        b"(X\x07\x00\x00\x00storagectorch\n" + kind.encode() + b"\n" + key_ + b"X\x03\x00\x00\x00cpu" + number + b"tQ"
    )


def tensor(count: int, offset: int, size: tuple[int, ...], stride: tuple[int, ...], **options: Any) -> bytes:
    def numbers(values: tuple[int, ...]) -> bytes:
        return b"(" + b"".join(b"\x8a\x08" + value.to_bytes(8, "little", signed=True) for value in values) + b"t"

    made = storage(count, **options) + numbers((offset,))[1:-1] + numbers(size) + numbers(stride) + b"\x89}"
    return b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n(" + made + b"tR."


@pytest.mark.parametrize(
    ("program", "message"),
    [
        (tensor(10**12, 0, (10**12,), (1,)), "storage 0 of 4,000,000,000,000 bytes: the file has 16"),
        (tensor(4, 0, (2,), (1,), key="9"), "storage 9 of 16 bytes: the file has none"),
        (tensor(4, 0, (2,), (1,), key="../../data.pkl"), "the file has none"),
        (tensor(-4, 0, (2,), (1,)), "the file has 16"),
        (tensor(4, 0, (5,), (1,)), "leaves its storage of 4"),
        (tensor(4, 3, (2,), (1,)), "leaves its storage of 4"),
        (tensor(4, -1, (2,), (1,)), "is not as torch.save writes one"),
        (tensor(4, 0, (2,), (-1,)), "is not as torch.save writes one"),
        (tensor(4, 0, (10**9, 10**9), (0, 0)), "leaves its storage of 4"),
        (tensor(4, 0, (2, 2), (1,)), "between neighbours"),
        (tensor(4, 0, (1,) * 9, (1,) * 9), "between neighbours"),
        (tensor(2, 0, (2,), (1,), kind="ComplexFloatStorage"), "names torch.ComplexFloatStorage"),
    ],
)
def test_a_tensor_that_the_file_does_not_hold_is_refused_before_it_is_made(
    program: bytes, message: str, path: Path
) -> None:
    assert message in refused(written(path, program, {"data/0": bytes(16)}))


def test_what_refers_to_itself_or_lies_too_deep_is_refused(path: Path) -> None:
    deep = b"\x80\x02" + b"]" * 100_000 + b"a" * 99_999 + b"."
    itself = b"\x80\x02]q\x00h\x00a."
    key = b"\x80\x02}" + b"(" * 50_000 + b"t" * 50_000 + b"K\x01s."
    for program in (deep, itself, key):
        refused(written(path, program))
    for inside in (deep[2:-1], itself[2:-1]):
        program = b"\x80\x02}(X\x03\x00\x00\x00cfg" + inside + b"X\x0b\x00\x00\x00state_dicts}u."
        assert "cfg has more than" in refused(written(path, program))


def test_what_is_compressed_is_refused(path: Path) -> None:
    written(path, b"\x80\x02}." + bytes(MOST_BYTES), compression=zipfile.ZIP_DEFLATED)
    assert path.stat().st_size < 100_000
    assert "is compressed, which torch.save never does" in refused(path)


def test_a_pickle_of_too_many_bytes_is_refused(path: Path) -> None:
    written(path, b"\x80\x02" + bytes(MOST_BYTES))
    assert f"at most {MOST_BYTES:,} can be" in refused(path)


def test_a_member_that_says_it_is_larger_than_the_file_is_refused(path: Path) -> None:
    written(path, tensor(4, 0, (4,), (1,)), {"data/0": bytes(16)})
    data = path.read_bytes()
    for size in (10**9, 2**32 - 2):
        path.write_bytes(data.replace((16).to_bytes(4, "little") * 2, size.to_bytes(4, "little") * 2))
        refused(path)


@pytest.mark.parametrize("content", [b"", b"a plain text\n", b"PK", b"{}", b"\x89HDF\r\n\x1a\n"])
def test_another_file_is_not_taken_for_one(content: bytes, path: Path) -> None:
    path.write_bytes(content)
    assert not holds(path)
    assert "no file, expected a zip of torch.save" in refused(path)


def test_older_files_of_torch_and_other_pickles_are_named(path: Path) -> None:
    torch.save({"cfg": {}, "state_dicts": {}}, path, _use_new_zipfile_serialization=False)
    assert holds(path)
    assert "a file of torch before 1.6" in refused(path)
    path.write_bytes(pickle.dumps(Calls(os.system, "true")))
    assert holds(path)
    assert "a pickle" in refused(path)


def test_a_zip_of_something_else_is_refused(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme.txt", "hello")
    assert "0 data.pkl in a zip of 1 files" in refused(path)
    written(path, b"\x80\x02}.", {"byteorder": b"big"})
    assert "not little-endian" in refused(path)


def test_whatever_is_cut_or_changed_gives_one_line(path: Path) -> None:
    torch.save({"cfg": {"policy": {"_target_": "a.B"}}, "state_dicts": {"model": {"a": torch.ones(3)}}}, path)
    data, generator = path.read_bytes(), random.Random(0)
    for _ in range(200):
        path.write_bytes(data[: generator.randrange(4, len(data))])
        refused(path)
    for _ in range(300):
        changed = bytearray(data)
        for _ in range(generator.randint(1, 4)):
            changed[generator.randrange(4, len(data))] = generator.randrange(256)
        path.write_bytes(changed)
        refused(path)
    program = pickle.dumps({"cfg": collections.OrderedDict(policy={"_target_": "a.B"}), "b": [1, (2.5, None)]}, 2)
    for _ in range(500):  # with checksums that fit
        changed = bytearray(program)
        for _ in range(generator.randint(1, 3)):
            changed[generator.randrange(len(program))] = generator.randrange(256)
        refused(written(path, bytes(changed), {"data/0": bytes(12)}))
