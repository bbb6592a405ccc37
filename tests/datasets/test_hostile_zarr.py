"""Stores that were made to run code, to hang, to fill memory or to read other files: one line, before anything is."""

from __future__ import annotations

import base64
import bz2
import gzip
import json
import lzma
import os
import pickle
import resource
import shutil
import struct
import time
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import google_crc32c
import numcodecs
import numpy as np
import pytest
import zarr

from action_diffusion.datasets.robomimic.attributes import attributes
from action_diffusion.datasets.storage import zarr_metadata
from action_diffusion.datasets.storage.decoding import check_unpacked
from action_diffusion.datasets.storage.growing import GrowingBuffer
from action_diffusion.datasets.storage.replay_buffer import ReplayBuffer
from action_diffusion.errors import InputError

ROWS = 12


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two sound buffers: of this stack, with a column in a group, and in Zarr v2."""
    rng, folder = np.random.default_rng(0), tmp_path_factory.mktemp("stores")
    arrays = {"action": rng.random((ROWS, 2)), "state": rng.random((ROWS, 3))}
    ReplayBuffer.from_arrays(arrays, [5, ROWS]).save(folder / "v3")
    group = zarr.open_group(folder / "v3", mode="r+")
    group.create_array("data/obs/deep", shape=(ROWS, 4), dtype="f4")[:] = rng.random((ROWS, 4))
    old = zarr.create_group(folder / "v2", zarr_format=2)
    for key, values in (*((f"data/{key}", arrays[key]) for key in arrays), ("meta/episode_ends", np.array([5, ROWS]))):
        old.create_array(key, shape=values.shape, dtype=values.dtype)[:] = values
    return folder


@pytest.fixture
def store(stores: Path, tmp_path: Path) -> Path:
    """A copy of the first."""
    return shutil.copytree(stores / "v3", tmp_path / "store")


@pytest.fixture
def store2(stores: Path, tmp_path: Path) -> Path:
    """A copy of the second."""
    return shutil.copytree(stores / "v2", tmp_path / "store2")


@pytest.fixture(params=["folder", "zip"])
def packed(request: pytest.FixtureRequest, store: Path) -> Callable[..., Path]:
    """Gives a store (that one) as it is then: a folder, or a zip of it."""

    def pack(store: Path = store) -> Path:
        if request.param == "folder":
            return store
        path = store.with_suffix(".zip")
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            for file in sorted(file for file in store.rglob("*") if file.is_file()):
                archive.write(file, file.relative_to(store).as_posix())
        return path

    return pack


@pytest.fixture(autouse=True)
def little_memory() -> Iterator[None]:
    """Whatever is tried may take 3 GB more of addresses than there are already."""
    taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (taken + (3 << 30), before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


def change(path: Path, **fields: Any) -> None:
    metadata = json.loads(path.read_text())
    path.write_text(json.dumps(metadata | fields))


def refuse(path: Path, message: str) -> None:
    began = time.monotonic()
    with pytest.raises(InputError, match=message) as caught:
        list(ReplayBuffer.open(path).episodes())
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600
    assert time.monotonic() - began < 20


class Run:
    """Unpickled, it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def plant_v2(folder: Path, chunk: bytes, **fields: Any) -> None:
    folder.mkdir(parents=True)
    metadata = {
        "zarr_format": 2, "shape": [ROWS], "chunks": [ROWS], "dtype": "|O", "fill_value": 0, "order": "C",
        "filters": None, "compressor": None,
    }  # fmt: skip
    (folder / ".zarray").write_text(json.dumps(metadata | fields))
    (folder / "0").write_bytes(chunk)


@pytest.mark.parametrize("place", ["data/prompt", "data/obs/prompt", "meta/tasks", "elsewhere/x"])
@pytest.mark.parametrize(
    "fields",
    [
        {"filters": [{"id": "pickle", "protocol": 5}]},
        {"filters": [{"id": "vlen-utf8"}, {"id": "pickle"}]},
        {"compressor": {"id": "pickle"}, "dtype": "<f4"},
        {"filters": [{"id": "categorize", "labels": ["a"], "dtype": "O"}]},
        {"filters": [{"id": "msgpack2"}]},
        {"filters": [{"id": "os.system"}]},
        {"filters": ["pickle"]},
        {"filters": [{}]},
    ],
)
def test_codecs_that_might_run_code_are_refused_by_name(
    packed: Callable[..., Path], store: Path, tmp_path: Path, place: str, fields: dict
) -> None:
    planted = tmp_path / "ran"
    plant_v2(store / place, pickle.dumps([Run(planted)] * ROWS), **fields)
    refuse(packed(), f"{place} is packed with '")
    assert not planted.exists()


@pytest.mark.parametrize(
    "codecs",
    [
        [{"name": "bytes"}, {"name": "numcodecs.pickle"}],
        [{"name": "numcodecs.msgpack2", "configuration": {}}],
        [{"name": "sharding_indexed", "configuration": {"codecs": ["bytes", "pickle"], "chunk_shape": [1, 3]}}],
        [{"name": "sharding_indexed", "configuration": {"codecs": ["bytes"], "index_codecs": [{"name": "pickle"}]}}],
        [{"name": "bytes"}, {"name": "zfpy"}],
    ],
)
def test_codecs_of_v3_are_refused_by_name_too(packed: Callable[..., Path], store: Path, codecs: list) -> None:
    change(store / "data/state/zarr.json", codecs=codecs)
    refuse(packed(), "data/state is packed with '(pickle|msgpack2|zfpy)', which is not read")


def test_two_descriptions_of_one_array_are_refused(packed: Callable[..., Path], store: Path) -> None:
    metadata = {"zarr_format": 2, "shape": [1], "chunks": [1], "dtype": "<f4", "filters": None, "compressor": None}
    (store / "data/state/.zarray").write_text(json.dumps(metadata))
    refuse(packed(), "holds arrays of Zarr v2 and of Zarr v3")


@pytest.mark.parametrize(
    "filters", [[{"id": "zlib"}], [{"id": "astype", "encode_dtype": "<f4", "decode_dtype": "S9999999"}]]
)
def test_filters_that_unpack_to_anything_are_refused(store2: Path, filters: list) -> None:
    plant_v2(store2 / "data/more", b"", dtype="<f4", filters=filters)
    refuse(store2, "data/more is packed with ")


LINKS: dict[str, Callable[[Path], None]] = {
    "chunk": lambda path: path.symlink_to("/etc/hostname"),
    "folder": lambda path: path.symlink_to("/etc"),
    "dangling": lambda path: path.symlink_to("/nowhere"),
    "pipe": os.mkfifo,
}


@pytest.mark.parametrize("kind", LINKS)
@pytest.mark.parametrize("place", ["data/state/c/9", "data/obs/link", "meta/more", "zarr.json.link", ".zattrs"])
def test_links_and_pipes_are_refused_and_never_waited_for(store: Path, kind: str, place: str) -> None:
    LINKS[kind](store / place)
    refuse(store, "is no file .a pipe" if kind == "pipe" else "is a link")


def test_a_pipe_in_the_place_of_a_file_is_refused(store: Path, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.zip")
    refuse(tmp_path / "pipe.zip", "neither a Zarr folder nor a zip")
    metadata = store / "data/state/zarr.json"
    metadata.unlink()
    os.mkfifo(metadata)
    refuse(store, "is no file")
    with pytest.raises(InputError, match="is no file"):
        GrowingBuffer.open(store)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"shape": [10**12, 3]}, r"data/state claims 1,000,000,000,000 rows; at most"),
        ({"shape": [10**400, 3]}, "whole numbers of 0 to 10\\^15"),
        ({"shape": [ROWS, 10**12]}, "claims .* chunks; at most"),
        ({"shape": [ROWS, 10**12], "chunk_grid": [ROWS, 10**12]}, r"has chunks of .* are free"),
        ({"shape": [ROWS, 10**9], "chunk_grid": [1, 10**6]}, r"take 9\d\.\d GB of memory"),
        (
            {"shape": [ROWS, 10**5, 10**5, 3], "chunk_grid": [1, 10**4, 10**4, 3], "data_type": "uint8"},
            "claims .* GB and holds",
        ),
        ({"shape": [10**8, 3], "chunk_grid": [1, 3]}, "claims 100,000,000 chunks"),
        ({"shape": [-1, 3]}, "whole numbers of 0 to"),
        ({"shape": [12.0, 3]}, "whole numbers"),
        ({"shape": [True, 3]}, "whole numbers"),
        ({"shape": "12"}, "whole numbers"),
        ({"shape": None}, "whole numbers"),
        ({"shape": [ROWS]}, "its shape is .12., its chunks"),
        ({"shape": [ROWS, 3], "chunk_grid": [0, 3]}, "its chunks"),
        ({"chunk_grid": {"name": "regular"}}, "describes no array"),
        ({"data_type": {"name": "float32", "configuration": 3}}, "cannot be read"),
        ({"data_type": "float1024"}, "no key|unequal|cannot|holds no arrays|float1024"),
        ({"codecs": 3}, "describes no array"),
        ({"codecs": [3]}, "describes no array"),
        ({"attributes": [1]}, "describes no array"),
        ({"fill_value": "x" * 10**6}, "cannot be read"),
    ],
)
def test_sizes_that_are_only_claimed_are_refused(
    packed: Callable[..., Path], store: Path, fields: dict, message: str
) -> None:
    if isinstance(fields.get("chunk_grid"), list):
        fields = fields | {"chunk_grid": {"name": "regular", "configuration": {"chunk_shape": fields["chunk_grid"]}}}
    change(store / "data/state/zarr.json", **fields)
    if fields.get("data_type") == "float1024":
        assert "float1024" in ReplayBuffer.open(packed()).left_out["state"]
        return
    refuse(packed(), message)


def test_episode_ends_that_are_only_claimed_are_refused(packed: Callable[..., Path], store: Path) -> None:
    change(store / "meta/episode_ends/zarr.json", shape=[10**12])
    refuse(packed(), "meta/episode_ends claims .* rows")


ZEROS = bytes(1 << 23)
BOMBS = {
    "zstd": numcodecs.Zstd(9).encode(ZEROS),
    "blosc": numcodecs.Blosc("zstd").encode(ZEROS),
    "lz4": numcodecs.LZ4().encode(ZEROS),
    "zlib": zlib.compress(ZEROS),
    "gzip": gzip.compress(ZEROS) * 2,
    "bz2": bz2.compress(ZEROS),
    "lzma": lzma.compress(ZEROS),
}


@pytest.mark.parametrize("codec", BOMBS)
def test_a_chunk_that_unpacks_to_more_than_belongs_is_refused(
    packed: Callable[..., Path], store2: Path, codec: str
) -> None:
    plant_v2(store2 / "data/more", BOMBS[codec], dtype="<f4", compressor={"id": codec})
    refuse(packed(store2), "data/more cannot be read.* a chunk unpacks to .* where at most")


def claiming(size: int) -> bytes:
    return b"\x28\xb5\x2f\xfd" + bytes([0xE0]) + struct.pack("<Q", size) + BOMBS["zstd"][9:]


def endless(n_blocks: int) -> bytes:
    """A frame without its size, of blocks that repeat one byte 128 kB long."""
    block = lambda last: struct.pack("<I", (1 << 17) << 3 | 1 << 1 | last)[:3] + b"\0"  # noqa: E731
    return b"\x28\xb5\x2f\xfd\x00\x58" + block(0) * n_blocks + block(1)


@pytest.mark.parametrize("packed_bytes", [claiming(3 << 30), claiming(1 << 62), endless(30_000)])
def test_what_a_chunk_claims_is_looked_at_before_there_is_room_for_it(
    packed_bytes: bytes, store: Path, store2: Path
) -> None:
    plant_v2(store2 / "data/more", packed_bytes, dtype="<f4", compressor={"id": "zstd"})
    refuse(store2, "a chunk unpacks to .* where at most")
    shards = zarr.open_group(store, mode="r+").create_array(
        "data/shards", shape=(ROWS, 2), chunks=(4, 2), shards=(12, 2), dtype="f4"
    )
    shards[:] = np.random.default_rng(1).random((ROWS, 2))
    index = np.full((3, 2), 2**64 - 1, "<u8")
    index[0] = 0, len(packed_bytes)
    checksum = struct.pack("<I", google_crc32c.value(index.tobytes()))
    (store / "data/shards/c/0/0").write_bytes(packed_bytes + index.tobytes() + checksum)
    refuse(store, "data/shards cannot be read.* a chunk unpacks to .* where at most")


@pytest.mark.slow
@pytest.mark.parametrize("codec", ["Zstd", "Blosc", "LZ4", "Zlib", "GZip", "BZ2", "LZMA"])
@pytest.mark.parametrize("n_bytes", [1, 255, 256, 100_000, 3_000_000])
def test_what_a_sound_chunk_holds_is_told(codec: str, n_bytes: int) -> None:
    coder = getattr(numcodecs, codec)()
    chunk = bytes(coder.encode(np.random.default_rng(0).integers(0, 9, n_bytes, dtype=np.uint8)))
    check_unpacked(chunk, coder.codec_id, n_bytes)
    with pytest.raises(ValueError, match="unpacks to"):
        check_unpacked(chunk, coder.codec_id, n_bytes - 1)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["jpegxl", "jpeg2k"])
def test_an_image_of_another_size_is_refused_before_it_is_decoded(store2: Path, kind: str) -> None:
    imagecodecs = pytest.importorskip("imagecodecs")
    images = np.random.default_rng(0).integers(0, 256, (ROWS, 16, 20, 3), dtype=np.uint8)
    encode = getattr(imagecodecs, f"{kind}_encode")
    options = {"lossless": True} if kind == "jpegxl" else {"level": 0}
    fields = {"shape": [ROWS, 16, 20, 3], "chunks": [1, 16, 20, 3], "dtype": "|u1"}
    plant_v2(store2 / "data/cam", b"", compressor={"id": f"imagecodecs_{kind}", "level": 50}, **fields)
    for row, image in enumerate(images):
        (store2 / f"data/cam/{row}.0.0.0").write_bytes(encode(image, **options))
    np.testing.assert_array_equal(ReplayBuffer.open(store2)["cam"][:], images)
    (store2 / "data/cam/3.0.0.0").write_bytes(encode(np.zeros((2000, 2000, 3), np.uint8), **options))
    refuse(store2, "data/cam cannot be read.*(invalid out.shape|an image of 2000 × 2000 pixels)")


@pytest.mark.parametrize("place", ["zarr.json", "data/state/zarr.json", "meta/.zattrs"])
def test_metadata_that_unpack_to_gigabytes_are_refused(store: Path, place: str) -> None:
    path = store.with_suffix(".zip")
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for file in sorted(file for file in store.rglob("*") if file.is_file() and file != store / place):
            archive.write(file, file.relative_to(store).as_posix())
        with archive.open(place, "w", force_zip64=True) as bomb:
            for _ in range(20):
                bomb.write(b" " * (1 << 20))
    refuse(path, f"{place} has 21 MB; at most 16 MB of metadata are read")
    with (store / "meta/.zattrs").open("wb") as sparse:
        sparse.truncate(3 << 30)
    refuse(store, "meta/.zattrs has 3,221 MB; at most 16 MB")


def test_chunks_that_are_larger_than_what_belongs_are_not_read(packed: Callable[..., Path], store: Path) -> None:
    with (store / "data/state/c/0/0").open("wb") as sparse:
        sparse.truncate(40 << 20)
    refuse(packed(), r"data/state cannot be read.*c/0/0 has 41.9 MB where at most \d+\.\d MB can belong")


def test_deep_metadata_are_refused(packed: Callable[..., Path], store: Path) -> None:
    (store / "data/state/zarr.json").write_text("[" * 100_000)
    refuse(packed(), "data/state/zarr.json cannot be read")


@pytest.mark.slow
def test_attributes_that_unpack_to_gigabytes_are_refused(store: Path) -> None:
    bomb = base64.b64encode(lzma.compress(bytes(80 << 20), preset=0)).decode()
    change(store / "zarr.json", attributes={"hdf5_attributes": bomb})
    with pytest.raises(
        InputError, match=r"hdf5_attributes.*attributes may have 16,777,216 bytes a place, 536,870,912 together"
    ):
        list(attributes(ReplayBuffer.open(store)))


def test_many_entries_are_read_in_time_and_too_many_refused(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = store.with_suffix(".zip")
    with zipfile.ZipFile(path, "w") as archive:
        for file in sorted(file for file in store.rglob("*") if file.is_file()):
            archive.write(file, file.relative_to(store).as_posix())
        for number in range(20_000):
            archive.writestr(f"x{number}", b"")
    began = time.monotonic()
    assert ReplayBuffer.open(path)["state"][:].shape == (ROWS, 3)
    assert time.monotonic() - began < 5
    monkeypatch.setattr(zarr_metadata, "MAX_FILES", 10_000)
    refuse(path, r"holds 20,0\d\d entries; at most 10,000")
    monkeypatch.setattr(zarr_metadata, "MAX_FILES", 5)
    refuse(store, "holds more than 5 files")


@pytest.mark.parametrize("name", ["../zarr.json", "data/../../x/zarr.json", "/data/x/zarr.json"])
def test_names_that_leave_the_zip_are_refused(store: Path, name: str) -> None:
    path = store.with_suffix(".zip")
    with zipfile.ZipFile(path, "w") as archive:
        for file in sorted(file for file in store.rglob("*") if file.is_file()):
            archive.write(file, file.relative_to(store).as_posix())
        archive.writestr(name, b"{}")
    refuse(path, "is no name of a file in a data set")


def test_what_a_mac_adds_to_a_zip_is_none_of_the_data(store: Path) -> None:
    path = store.with_suffix(".zip")
    with zipfile.ZipFile(path, "w") as archive:
        for file in sorted(file for file in store.rglob("*") if file.is_file()):
            place = file.relative_to(store.parent).as_posix()
            archive.write(file, place)
            archive.writestr(f"__MACOSX/{place}", b"\0\x05\x16\x07")
    assert ReplayBuffer.open(path)["state"][:].shape == (ROWS, 3)


@pytest.mark.parametrize("key", ["", ".", "..", "a/b", "../x", "a\\b", "a\nb", ".hidden", "x" * 300])
def test_keys_that_are_no_names_are_refused(key: str) -> None:
    with pytest.raises(InputError, match="is no key") as caught:
        ReplayBuffer.from_arrays({key: np.zeros((3, 2))}, [3])
    assert "\n" not in str(caught.value)


def test_absent_chunks_are_the_fill_value_and_lost_ones_are_named(store: Path) -> None:
    rng = np.random.default_rng(1)
    values = rng.random((ROWS, 2)).astype(np.float32)
    values[4:8] = 7
    group = zarr.open_group(store, mode="r+")
    group.create_array("data/force", shape=values.shape, chunks=(4, 2), dtype="f4", fill_value=7)[:] = values
    shards = group.create_array("data/shards", shape=(ROWS, 2), chunks=(2, 2), shards=(4, 2), dtype="f4", fill_value=7)
    shards[:] = values
    buffer = ReplayBuffer.open(store)
    for key in ("force", "shards"):
        assert not (store / f"data/{key}/c/1/0").exists()
        np.testing.assert_array_equal(buffer[key][:], values)
        missing, n_chunks = buffer[key].absent()  # type: ignore[attr-defined]
        assert (len(missing), n_chunks) == (1, 3)
    lost = store / "data/state/c/0/0"
    lost.unlink()
    np.testing.assert_array_equal(ReplayBuffer.open(store)["force"][:], values)
    refuse(store, "data/state lacks 1 of 1 chunks, the first is data/state/c/0/0")


def test_absent_chunks_of_v2_without_a_fill_value_are_refused(store2: Path) -> None:
    plant_v2(store2 / "data/more", np.arange(6, dtype="<f4").tobytes(), dtype="<f4", chunks=[6], fill_value=None)
    refuse(store2, "data/more lacks 1 of 2 chunks")
    change(store2 / "data/more/.zarray", fill_value=3)
    assert ReplayBuffer.open(store2)["more"][:].tolist() == [0, 1, 2, 3, 4, 5, *[3] * 6]


def test_a_damaged_shard_is_named(store: Path) -> None:
    group = zarr.open_group(store, mode="r+")
    shards = group.create_array("data/shards", shape=(ROWS, 2), chunks=(2, 2), shards=(12, 2), dtype="f4")
    shards[:] = np.random.default_rng(1).random((ROWS, 2))
    file = store / "data/shards/c/0/0"
    content = bytearray(file.read_bytes())
    content[-20] ^= 1  # in its index, which has a checksum
    file.write_bytes(content)
    refuse(store, "data/shards cannot be read")
