"""Buffers in object stores: the same batches as from the folder, a bounded cache, and one line for what goes wrong."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
import torch
import zarr
from object_server import ObjectServer

from action_diffusion import cli
from action_diffusion.datasets import ReplayBuffer
from action_diffusion.datasets.batches.loader import BatchSource, ObsKey
from action_diffusion.datasets.batches.sources import look_at, open_data
from action_diffusion.datasets.batches.windows import make_windows
from action_diffusion.datasets.storage import objects
from action_diffusion.datasets.storage.objects import ObjectCache
from action_diffusion.errors import InputError

pytestmark = pytest.mark.filterwarnings("ignore:Consolidated metadata")
pytest.importorskip("obstore", reason="the extra object-store")
N, SHAPE = 30, (12, 10, 3)
S3 = "s3://robots/lab/a.zarr"


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ObjectServer]:
    """With a buffer whose images are in chunks of four, some of them in shards of two."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_WEB_IDENTITY_TOKEN_FILE", "AWS_ENDPOINT"):
        monkeypatch.delenv(name, raising=False)
    random, folder = np.random.default_rng(0), tmp_path / "a.zarr"
    root = zarr.open_group(folder, mode="w")
    root.create_array("data/img", data=random.integers(0, 256, (N, *SHAPE), np.uint8), chunks=(4, *SHAPE))
    root.create_array(
        "data/far", data=random.integers(0, 256, (N, *SHAPE), np.uint8), chunks=(4, *SHAPE), shards=(8, *SHAPE)
    )
    root.create_array("data/action", data=random.random((N, 2)).astype(np.float32))
    root.create_array("meta/episode_ends", data=np.array([11, N]))
    zarr.consolidate_metadata(root.store)
    served = ObjectServer()
    served.put("robots", folder, "lab/a.zarr")
    monkeypatch.setenv("AWS_ENDPOINT_URL", served.url)
    monkeypatch.setattr(objects, "RETRIES", 0)
    yield served
    served.close()


def source(buffer: ReplayBuffer, **settings: object) -> BatchSource:
    return BatchSource(
        buffer=buffer,
        windows=make_windows(buffer.episode_ends, horizon=8, n_obs_steps=2, n_action_steps=4),
        observations={key: ObsKey(key, None, "image") for key in ("img", "far")},
        action_key="action",
        n_obs_steps=2,
        **settings,  # type: ignore[arg-type]
    )


def cached(cache: Path) -> list[Path]:
    return [path for path in cache.rglob("*") if path.is_file() and path.name != "lock"]


@pytest.mark.parametrize("scheme", ["s3", "https"])
def test_batches_are_those_of_the_folder(server: ObjectServer, scheme: str, tmp_path: Path) -> None:
    url = S3 if scheme == "s3" else f"{server.url}/robots/lab/a.zarr"
    buffer = open_data(url, cache_dir=tmp_path / "cache")
    assert (buffer.name, buffer.keys, buffer.n_steps) == (url, ["action", "far", "img"], N)
    made, expected = source(buffer, memory_gb=1e-6), source(ReplayBuffer.open(tmp_path / "a.zarr"))
    assert (made.mode, expected.mode) == ("decode", "memory")
    order = np.random.default_rng(0).permutation(len(made))
    for indices in np.array_split(order, 4):
        ours, theirs = made.gather(indices), expected.gather(indices)
        assert torch.equal(ours.obs["img"], theirs.obs["img"])
        assert torch.equal(ours.obs["far"], theirs.obs["far"])
        assert torch.equal(ours.action, theirs.action)
    asked = len(server.asked)
    source(buffer, memory_gb=1e-6).gather(order)
    assert len(server.asked) == asked  # all of it from the disk


def test_what_changed_is_fetched_again(server: ObjectServer, tmp_path: Path) -> None:
    before = open_data(S3, cache_dir=tmp_path / "cache")["action"][:]
    root = zarr.open_group(tmp_path / "a.zarr", mode="r+")
    root.create_array("data/action", data=before + 1, overwrite=True)
    server.put("robots", tmp_path / "a.zarr", "lab/a.zarr")
    np.testing.assert_array_equal(open_data(S3, cache_dir=tmp_path / "cache")["action"][:], before + 1)


def test_a_damaged_file_of_the_cache_is_fetched_again(server: ObjectServer, tmp_path: Path) -> None:
    before = open_data(S3, cache_dir=tmp_path / "cache")["img"][:]
    for path in cached(tmp_path / "cache"):
        path.write_bytes(path.read_bytes()[:-1] + b"?")
    np.testing.assert_array_equal(open_data(S3, cache_dir=tmp_path / "cache")["img"][:], before)


def test_requests_are_signed_where_there_is_a_key(
    server: ObjectServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.key = "mine"
    with pytest.raises(InputError, match=r"a\.zarr.*: not there, or not for you: set AWS_ACCESS_KEY_ID"):
        open_data(S3, cache_dir=tmp_path / "cache")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "mine")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    assert open_data(S3, cache_dir=tmp_path / "cache").n_steps == N


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("s3://nobodys/a.zarr", "s3://nobodys/a.zarr: no such bucket"),
        ("s3://robots/lab/b.zarr", "s3://robots/lab/b.zarr: there is nothing there"),
        ("s3://robots", "s3://robots: expected s3://BUCKET/FOLDER.zarr"),
        ("s3://robots/a.zarr.zip", "a.zarr.zip: a zip is not read from there"),
        ("{server}/robots/lab", "no consolidated metadata there"),
        ("http://elsewhere.org/a.zarr", "http:// is for this machine only"),
    ],
)
def test_what_is_not_there_is_one_line(server: ObjectServer, url: str, message: str, tmp_path: Path) -> None:
    for use in (look_at, open_data):
        with pytest.raises(InputError) as caught:
            use(url.format(server=server.url), cache_dir=tmp_path / "cache")
        assert message in str(caught.value)
        assert "\n" not in str(caught.value)


def test_a_chunk_that_is_gone_is_named(server: ObjectServer, tmp_path: Path) -> None:
    for url in (S3, f"{server.url}/robots/lab/a.zarr"):
        made = source(open_data(url, cache_dir=tmp_path / url[:2]), mode="decode")
        gone = server.buckets["robots"].pop("lab/a.zarr/data/img/c/3/0/0/0")
        with pytest.raises(InputError, match=r"a\.zarr/data/img/c/3/0/0/0: no such bucket, or no such file"):
            made.gather(np.array([12]))
        server.buckets["robots"]["lab/a.zarr/data/img/c/3/0/0/0"] = gone


@pytest.mark.parametrize("how", ["broken", "gone", "slow"])
def test_a_server_that_is_gone_ends_the_run_with_one_line(
    server: ObjectServer, how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(objects, "TIMEOUT", 1)
    made = source(open_data(S3, cache_dir=tmp_path / "cache"), mode="decode")
    if how == "gone":
        server.close()
    else:
        server.broken, server.slow = how == "broken", 3.0 * (how == "slow")
    asked = len(server.asked)
    with pytest.raises(
        InputError, match=r"s3://robots/lab/a\.zarr/data/.* cannot be read, the store does not answer"
    ) as caught:
        made.gather(np.arange(9))
    assert "\n" not in str(caught.value)
    for window in range(len(made)):
        with pytest.raises(InputError, match="does not answer"):
            made.gather(np.array([window]))  # at once, whatever it is
    assert len(server.asked) - asked < 16


def test_training_on_what_is_not_there_ends_at_once(
    server: ObjectServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["train", "task=custom", "data=s3://nobodys/a.zarr", f"output_dir={tmp_path / 'run'}"]
    assert cli.main([*words, f"dataset.cache_dir={tmp_path / 'cache'}", "train.max_steps=1"]) == 2
    assert capsys.readouterr().err.startswith("error: s3://nobodys/a.zarr: no such bucket")


def test_the_cache_keeps_what_was_used_last(tmp_path: Path) -> None:
    one, other = (ObjectCache(tmp_path, 16_000) for _ in range(2))
    for number in range(100):
        (one, other)[number % 2].write(str(number), bytes(500))
        assert one.read("0") is not None
        assert sum(path.stat().st_size for path in cached(tmp_path)) <= 16_000
    kept = [number for number in range(100) if one.read(str(number)) is not None]
    assert kept == [0, *range(100 - len(kept) + 1, 100)]
    assert len(kept) > 20


def test_threads_and_processes_share_a_cache(tmp_path: Path) -> None:
    caches = [ObjectCache(tmp_path, 5_000) for _ in range(2)]

    def use(cache: ObjectCache) -> None:
        for number in range(60):
            content = cache.read(str(number % 17))
            assert content in (None, bytes([number % 17]) * 200)
            cache.write(str(number % 17), bytes([number % 17]) * 200)

    failed = list[None]()
    threads = [threading.Thread(target=lambda cache=cache: failed.append(use(cache))) for cache in caches * 2]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(failed) == 4
    assert not [path for path in cached(tmp_path) if path.name.startswith(".")]


def test_times_are_as_they_are_said() -> None:
    assert timedelta(seconds=objects.GIVE_UP) == timedelta(minutes=1)
    assert (objects.CONNECT, objects.TIMEOUT) == (10, 30)
