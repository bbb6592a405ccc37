"""HDF5 files that name other files, claim more than they hold, or are damaged: one line, before anything is read."""

from __future__ import annotations

import base64
import json
import lzma
import os
import random
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from robomimic_files import ENV_ARGS, h5py, rows, write_robomimic

from action_diffusion.datasets import ReplayBuffer
from action_diffusion.datasets.formats import aloha, robomimic
from action_diffusion.datasets.hdf5 import reading
from action_diffusion.datasets.robomimic import attributes as demos
from action_diffusion.datasets.robomimic.attributes import attributes, demo_names, subset, task_words
from action_diffusion.datasets.robomimic.conversion import convert
from action_diffusion.datasets.robomimic.demo import read_rows
from action_diffusion.datasets.robomimic.export import export
from action_diffusion.datasets.robomimic.file import describe
from action_diffusion.errors import InputError

Change = Callable[[Any], None]
OBJECT = "data/demo_0/obs/object"
SECRET = b"the secret "


@pytest.fixture(autouse=True)
def no_probe(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the process that goes first, which takes a second a file; the test of it is marked."""
    if "probe" not in request.node.name:
        monkeypatch.setattr(reading, "_probe", lambda files: None)


def edited(path: Path, change: Change) -> Path:
    write_robomimic(path)
    with h5py.File(path, "a") as file:
        change(file)
    return path


def instead(place: str, **create: Any) -> Change:
    """Another dataset in its place; `data` is what its values are, if they are written."""

    def change(file: Any) -> None:
        if place in file:
            del file[place]
        file.create_dataset(place, **create)

    return change


def everywhere(values: Callable[[int], Any], place: str) -> Change:
    def change(file: Any) -> None:
        for demo in file["data"].values():
            demo[place] = values(len(demo["actions"]))

    return change


# What lies outside the file.


def external(file: Any) -> None:
    secret = str(Path(file.filename).with_name("secret"))
    instead(OBJECT, shape=(5, 10), dtype="f8", external=[(secret, 0, h5py.h5f.UNLIMITED)])(file)


def external_pipe(file: Any) -> None:
    pipe = str(Path(file.filename).with_name("pipe"))
    instead(OBJECT, shape=(5, 10), dtype="f8", external=[(pipe, 0, h5py.h5f.UNLIMITED)])(file)


def linked(place: str, link: Callable[[str], Any]) -> Change:
    def change(file: Any) -> None:
        if place in file:
            del file[place]
        file[place] = link(str(Path(file.filename).with_name("other.hdf5")))

    return change


def virtual(of: str) -> Change:
    def change(file: Any) -> None:
        other = of or str(Path(file.filename).with_name("other.hdf5"))
        layout = h5py.VirtualLayout((5, 10), "f8")
        layout[:] = h5py.VirtualSource(other, "data/demo_1/states", (5, 10))
        del file[OBJECT]
        file["data/demo_0/obs"].create_virtual_dataset("object", layout)

    return change


OUTSIDE = {
    "external storage": (external, "obs/object has its values in another file"),
    "external storage in a pipe": (external_pipe, "obs/object has its values in another file"),
    "external demo": (
        linked("data/demo_1", lambda other: h5py.ExternalLink(other, "/data/demo_1")),
        r"data/demo_1 is a link to /data/demo_1 in .*other\.hdf5",
    ),
    "external data": (linked("data", lambda other: h5py.ExternalLink(other, "/data")), "/data is a link to /data in"),
    "external mask": (linked("mask", lambda other: h5py.ExternalLink(other, "/mask")), "/mask is a link to /mask in"),
    "external observation": (linked(OBJECT, lambda other: h5py.ExternalLink(other, OBJECT)), "obs/object is a link"),
    "external next_obs": (
        linked("data/demo_0/next_obs", lambda other: h5py.ExternalLink(other, "/data/demo_0/obs")),
        "next_obs is a link",
    ),
    "soft": (linked(OBJECT, lambda _: h5py.SoftLink("/data/demo_0/states")), "object is a link to /data/demo_0/states"),
    "soft to nothing": (linked(OBJECT, lambda _: h5py.SoftLink("/none")), "object is a link to /none"),
    "soft to itself": (linked(OBJECT, lambda _: h5py.SoftLink(f"/{OBJECT}")), "object is a link to"),
    "soft data": (linked("data", lambda _: h5py.SoftLink("/else")), "/data is a link to /else"),
    "virtual": (virtual(""), "obs/object has its values in another file"),
    "virtual of itself": (virtual("."), "obs/object has its values in another file"),
    "external notes": (linked("action_diffusion", lambda other: h5py.ExternalLink(other, "/x")), "is a link to /x"),
}


@pytest.mark.parametrize(("change", "message"), OUTSIDE.values(), ids=OUTSIDE)
def test_nothing_outside_the_file_is_read(tmp_path: Path, change: Change, message: str) -> None:
    (tmp_path / "secret").write_bytes(SECRET * 100)
    os.mkfifo(tmp_path / "pipe")  # who opens it waits for ever
    write_robomimic(tmp_path / "other.hdf5")
    source = edited(tmp_path / "a.hdf5", change)
    with pytest.raises(InputError, match=message) as caught:
        convert(source, tmp_path / "a.zarr")
    assert "\n" not in str(caught.value)
    assert not any(tmp_path.glob("*.zarr"))
    if "action_diffusion" in message or "/x" in message:
        with pytest.raises(InputError, match=message):
            robomimic.is_ours(source)


def test_groups_with_two_names_are_not_walked_for_ever(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is the same group as another"):
        describe(edited(tmp_path / "a.hdf5", lambda file: file.__setitem__("data/demo_0/obs/all", file["data"])))


def test_filters_that_hdf5_would_load_are_refused(tmp_path: Path) -> None:
    def change(file: Any) -> None:
        settings = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        settings.set_chunk((1, 10))
        settings.set_filter(32015, h5py.h5z.FLAG_OPTIONAL, (3,))
        del file[OBJECT]
        space = h5py.h5s.create_simple((5, 10))
        h5py.h5d.create(file["data/demo_0/obs"].id, b"object", h5py.h5t.NATIVE_DOUBLE, space, dcpl=settings)

    with pytest.raises(InputError, match=r"obs/object needs HDF5's filter 32015; gzip, .*h5repack"):
        describe(edited(tmp_path / "a.hdf5", change))


# Sizes that are only claimed.

LARGE = {
    "rows": (instead(OBJECT, shape=(10**12, 10), chunks=(100, 10), dtype="f8"), "more than the .* can hold"),
    "contiguous": (instead(OBJECT, shape=(5, 10**12), dtype="f8"), "more than the .* can hold"),
    "actions": (instead("data/demo_0/actions", shape=(10**12, 7), chunks=(9, 7), dtype="f8"), "more than the"),
    "next_obs": (instead("data/demo_0/next_obs/object", shape=(5, 10**11), chunks=(1, 99), dtype="f8"), "more than"),
    "a chunk": (
        instead(OBJECT, shape=(5, 10), maxshape=(None, None), chunks=(5, 800_000_000), dtype="u1", compression="gzip"),
        "a chunk of 4,000,000,000 bytes",
    ),
    "chunks": (instead(OBJECT, shape=(5, 10**7), chunks=(1, 1), dtype="u1"), "cut into 50,000,000 chunks of 1 bytes"),
    "text": (instead("data/demo_0/lang", shape=(10**11,), chunks=(10**6,), dtype="S9"), "more than the"),
    "mask": (instead("mask/x", shape=(10**11,), chunks=(10,), dtype="S7", fillvalue=b"demo_0"), "names more demos"),
    "long names": (instead("mask/x", shape=(3,), dtype="S1000000"), "must hold names of demos"),
    "levels": (instead("data/demo_0/obs/" + "/".join("x" * 200), data=np.zeros((5, 1))), "groups more than 32 deep"),
    "one array twice": (
        lambda file: [file.__setitem__(f"{OBJECT}{n}", file["data/demo_0/obs/agentview_image"]) for n in range(300)],
        "claims more bytes than it has: is something there twice",
    ),
}


@pytest.mark.parametrize(("change", "message"), LARGE.values(), ids=LARGE)
def test_claims_are_refused_before_anything_is_allocated(tmp_path: Path, change: Change, message: str) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(InputError, match=message) as caught:
        convert(edited(tmp_path / "a.hdf5", change), tmp_path / "a.zarr")
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200 << 10  # KiB


def test_attributes_have_limits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_robomimic(tmp_path / "a.hdf5")  # 60 kB of MJCF a demo
    monkeypatch.setattr(reading, "ATTRIBUTES_BYTES", 100_000)
    with pytest.raises(InputError, match=r"attribute 'model_file': attributes may have .* 100,000 together"):
        describe(source)
    monkeypatch.setattr(reading, "ATTRIBUTE_BYTES", 1000)
    with pytest.raises(InputError, match="demo_0: attribute 'model_file': attributes may have 1,000 bytes each"):
        describe(source)
    with pytest.raises(InputError, match="attribute 'numbers' claims 8,000 bytes, 1,000 are the most"):
        describe(edited(source, lambda file: file.attrs.__setitem__("numbers", np.zeros(1000))))


def test_deep_json_is_no_json(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="env_args is no JSON"):
        describe(edited(tmp_path / "a.hdf5", lambda file: file["data"].attrs.__setitem__("env_args", "[" * 100_000)))


# Names.


@pytest.mark.parametrize("name", ["zarr.json", ".zarray", "a\nb", "a\\b", "x" * 300, "/".join(["long" * 12] * 6)])
def test_names_that_are_no_names_for_files_are_refused(tmp_path: Path, name: str) -> None:
    change = everywhere(lambda length: np.zeros((length, 2)), f"obs/{name}")
    with pytest.raises(InputError, match=r"is no name for data|would become column"):
        describe(edited(tmp_path / "a.hdf5", change))


@pytest.mark.parametrize("name", ["..", ".", "a/b", "../../x", ""])
def test_names_that_lead_elsewhere_are_refused(name: str) -> None:
    with pytest.raises(InputError, match="is no name for data"):
        reading.check_name(name, "a.hdf5")


def test_a_link_called_up_is_refused(tmp_path: Path) -> None:
    source = edited(tmp_path / "a.hdf5", everywhere(lambda length: np.zeros((length, 2)), "obs/!!"))
    source.write_bytes(source.read_bytes().replace(b"!!\0", b"..\0"))
    with pytest.raises(InputError, match=r"data/demo_0/obs holds '\.\.'"):
        convert(source, tmp_path / "a.zarr")


# Damage.


def small(path: Path, version: str, **create: Any) -> bytes:
    """Some kilobytes of which much is structure."""
    with h5py.File(path, "w", libver=version) as file:
        file.create_group("data").attrs["env_args"] = json.dumps(ENV_ARGS)
        for number, length in enumerate((3, 2)):
            demo = file.create_group(f"data/demo_{number}")
            demo.attrs["num_samples"] = length
            demo.create_dataset("actions", data=rows(length, number)["actions"], **create)
            demo.create_dataset("obs/x", data=np.ones((length, 2), np.float32))
            demo.create_dataset("next_obs/x", data=np.ones((length, 2), np.float32))
            demo.create_dataset("lang", data=np.bytes_(b"pick"))
        file["mask/train"] = np.array([b"demo_0"])
    return path.read_bytes()


def alone(path: Path) -> bytes:
    with h5py.File(path, "w") as file:
        file["action"] = np.zeros((3, 2))
        file.create_dataset("observations/images/cam", data=np.zeros((3, 4, 4, 3), np.uint8), compression="lzf")
    return path.read_bytes()


def read_all(path: Path) -> dict[str, tuple[int, ...]]:
    """Shapes of everything that is read. Raises `InputError`."""
    if aloha.is_aloha(path):
        buffer = aloha.opened(path).buffer
        return {key: np.asarray(buffer[key][:]).shape for key in buffer.keys}
    layout = describe(path)
    with reading.open_hdf5(path) as file, reading.reading_hdf5(str(path)):
        return {
            f"{demo}/{column}": read_rows(file[f"data/{demo}"], stored, 0, 1000, demo).shape
            for demo in layout.demos
            for column, stored in layout.columns.items()
        }


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["earliest", "latest", "gzip", "aloha"])
def test_flipped_bytes_raise_one_line_or_change_no_shape(tmp_path: Path, kind: str) -> None:
    options = {"compression": "gzip", "shuffle": True, "fletcher32": True} if kind == "gzip" else {}
    path = tmp_path / "a.hdf5"
    content = alone(path) if kind == "aloha" else small(path, "latest" if kind == "latest" else "earliest", **options)
    whole, refused = read_all(path), 0
    for seed in range(100):
        source, damaged = random.Random(seed), bytearray(content)
        for _ in range(source.choice([1, 2, 8, 32])):
            damaged[source.randrange(len(damaged))] ^= 1 << source.randrange(8)
        path.write_bytes(damaged)
        try:
            assert read_all(path).items() <= whole.items(), seed
        except InputError:
            refused += 1
    assert 10 < refused < 100


@pytest.mark.slow
@pytest.mark.parametrize(
    ("program", "message"),
    [
        ("import time; print('.', flush=True); time.sleep(60)", "HDF5's library says nothing for 1 s when it looks"),
        ("import os; os.kill(os.getpid(), 11)", "HDF5's library crashes when it looks at it"),
    ],
)
def test_a_probe_that_hangs_or_crashes_is_a_damaged_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, program: str, message: str
) -> None:
    source = write_robomimic(tmp_path / "a.hdf5")
    reading.check_sound(source)
    source.touch()  # so that it is asked again
    (tmp_path / "probe.py").write_text(program)
    monkeypatch.setattr(reading, "PROBE", tmp_path / "probe.py")
    monkeypatch.setattr(reading, "STALL_S", 1)
    with pytest.raises(InputError, match=message):
        describe(source)


# Buffers whose attributes lie.


def saved(path: Path, attrs: dict[str, Any], demo: Any = (0, 0, 0)) -> ReplayBuffer:
    ReplayBuffer.from_arrays({"action": np.zeros((3, 2)), "demo": np.array(demo)}, [3], attrs).save(path)
    return ReplayBuffer.open(path)


def packed(text: bytes) -> str:
    return base64.b64encode(lzma.compress(text, preset=1)).decode()


@pytest.mark.slow
@pytest.mark.parametrize(
    "kept",
    [
        packed(b'["/", {"a": "xxxxxxxx"}]\n' * 100_000),
        packed(b"x" * (2 << 20)),
        packed(b"[" * 100_000 + b"\n"),
        packed(b'["/", {"a": {"dtype": "O", "value": [1]}}]\n'),
        packed(b'["/", {"a": {"dtype": "f8"}}]\n'),
        packed(b'["/", {}]'),
        packed(b'["/", {}]\n')[:-8],
        7,
    ],
    ids=["many", "long", "deep", "objects", "no value", "no end", "cut off", "a number"],
)
def test_packed_attributes_are_unpacked_within_limits(kept: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demos, "LINE_BYTES", 1 << 20)
    monkeypatch.setattr(demos, "TOTAL_BYTES", 2 << 20)
    buffer = ReplayBuffer.from_arrays({"action": np.zeros((3, 2))}, [3], {"hdf5_attributes": kept})
    with pytest.raises(InputError, match=r"'hdf5_attributes'.*(damaged|attributes may have)"):
        list(attributes(buffer))


@pytest.mark.parametrize(
    ("attrs", "demo"),
    [
        ({"demos": ["../x"]}, (0, 0, 0)),
        ({"demos": "demo_0"}, (0, 0, 0)),
        ({"demos": ["demo_0"]}, (7, 7, 7)),
        ({"demos": ["demo_0"]}, (-1, -1, -1)),
        ({"demos": ["demo_0"]}, (0.5, 0.5, 0.5)),
        ({"columns": {"action": "../../x"}}, (0, 0, 0)),
        ({"columns": {"action": "obs/action"}}, (0, 0, 0)),
        ({"columns": ["actions"]}, (0, 0, 0)),
        ({"subsets": {"..": ["demo_0"]}}, (0, 0, 0)),
        ({"subsets": {"train": 3}}, (0, 0, 0)),
        ({"subsets": ["train"]}, (0, 0, 0)),
        ({"tasks": 3}, (0, 0, 0)),
    ],
)
def test_attributes_that_lie_are_refused(tmp_path: Path, attrs: dict[str, Any], demo: Any) -> None:
    saved(tmp_path / "a.zarr", {"env_args": ENV_ARGS, **attrs}, demo)
    with pytest.raises(InputError) as caught:
        export(tmp_path / "a.zarr", tmp_path / "a.hdf5")
    assert "\n" not in str(caught.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.zarr"]


def test_names_of_episodes_and_tasks_are_checked(tmp_path: Path) -> None:
    buffer = saved(tmp_path / "a.zarr", {"demos": ["demo_3"], "tasks": ["a", "b"], "subsets": {"few": ["demo_3"]}})
    assert demo_names(buffer) == ["demo_3"]
    assert subset(buffer, "few").tolist() == [0]
    assert task_words(buffer) == [""]
