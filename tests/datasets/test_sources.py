"""Names and paths of data, a download that breaks half-way, and pictures rendered from recorded states."""

from __future__ import annotations

import http.server
import os
import threading
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from action_diffusion.datasets import ReplayBuffer
from action_diffusion.datasets.batches import sources
from action_diffusion.datasets.batches.sources import content_hash, open_data, resolve, with_images
from action_diffusion.errors import InputError


class Server(http.server.ThreadingHTTPServer):
    """Serves `content`; the first `cuts` answers stop after `cut_after` bytes. `ranges`: what was asked for."""

    daemon_threads = True
    content = b""
    cuts = 0
    cut_after = 1000
    supports_ranges = True
    status = 200

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.ranges: list[str | None] = []
        self.url = f"http://127.0.0.1:{self.server_port}/pusht.zip"


class Handler(http.server.BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        server, wanted = self.server, self.headers["Range"]
        server.ranges.append(wanted)
        total = len(server.content)
        first = int(wanted.removeprefix("bytes=").removesuffix("-")) if wanted and server.supports_ranges else 0
        if server.status != 200:
            self.send_error(server.status)
            return
        if first >= total:
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{total}")
            self.end_headers()
            return
        self.send_response(206 if first else 200)
        self.send_header("Content-Length", str(total - first))
        self.end_headers()
        body = server.content[first:]
        if server.cuts > 0:
            server.cuts -= 1
            body = body[: server.cut_after]
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


def demonstrations() -> ReplayBuffer:
    rng = np.random.default_rng(0)
    arrays = {"state": rng.random((30, 5), np.float32), "action": rng.random((30, 2), np.float32)}
    return ReplayBuffer.from_arrays(arrays, [10, 30])


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """Serves what passes for the authors' zip: the buffer lies in a folder of it."""
    demonstrations().save(tmp_path / "pusht" / "a.zarr")
    with zipfile.ZipFile(tmp_path / "made.zip", "w") as archive:
        for file in (tmp_path / "pusht").rglob("*"):
            archive.write(file, file.relative_to(tmp_path))
    server = Server()
    server.content = (tmp_path / "made.zip").read_bytes()
    monkeypatch.setattr(sources, "HUMAN_URL", server.url)
    monkeypatch.setattr(sources, "HUMAN_EPISODES", 2)
    monkeypatch.setattr(sources, "HUMAN_STEPS", 30)
    monkeypatch.setattr(sources, "HUMAN_CONTENT", content_hash(demonstrations()))
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def test_a_download_is_kept_and_opened(server: Server, tmp_path: Path) -> None:
    buffer = open_data("pusht_human", cache_dir=tmp_path / "cache")
    assert content_hash(buffer) == content_hash(demonstrations())
    assert open_data("pusht_human", cache_dir=tmp_path / "cache").n_steps == 30
    assert server.ranges == [None]
    assert [file.name for file in (tmp_path / "cache").glob("*.part")] == []


def test_a_broken_connection_is_taken_up_where_it_stopped(server: Server, tmp_path: Path) -> None:
    server.cuts = 3
    assert open_data("pusht_human", cache_dir=tmp_path / "cache").n_steps == 30
    assert server.ranges == [None, "bytes=1000-", "bytes=2000-", "bytes=3000-"]


def test_the_next_run_goes_on_with_what_an_earlier_one_left(server: Server, tmp_path: Path) -> None:
    server.cuts, server.cut_after = 9, 0
    (tmp_path / "pusht.zip.part").write_bytes(server.content[:500])
    with pytest.raises(InputError, match=r"connection broke.*what has come is kept"):
        resolve("pusht_human", cache_dir=tmp_path)
    assert (tmp_path / "pusht.zip.part").stat().st_size == 500
    server.cuts = 0
    assert resolve("pusht_human", cache_dir=tmp_path).read_bytes() == server.content
    assert server.ranges[-1] == "bytes=500-"


@pytest.mark.parametrize("extra", [0, 100])
def test_a_file_that_had_come_completely_is_not_fetched_again(server: Server, tmp_path: Path, extra: int) -> None:
    (tmp_path / "pusht.zip.part").write_bytes(server.content + bytes(extra))
    assert resolve("pusht_human", cache_dir=tmp_path).read_bytes() == server.content
    assert len(server.ranges) == (2 if extra else 1)


def test_a_server_without_ranges_sends_all_of_it_again(server: Server, tmp_path: Path) -> None:
    server.supports_ranges, server.cuts = False, 1
    assert resolve("pusht_human", cache_dir=tmp_path).read_bytes() == server.content


def test_what_is_not_the_expected_file_is_refused_and_deleted(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    good, damaged = server.content, bytearray(server.content)
    damaged[len(good) // 2] ^= 0xFF
    for content in (b"<html>moved</html>", good[:-30] + bytes(30), bytes(damaged)):
        server.content = content
        with pytest.raises(InputError, match="damaged, and was deleted"):
            resolve("pusht_human", cache_dir=tmp_path)
        assert list(tmp_path.glob("pusht.zip*")) == [tmp_path / "pusht.zip.lock"]
    server.content = good
    monkeypatch.setattr(sources, "HUMAN_STEPS", 31)
    with pytest.raises(InputError, match="not the expected file, and was deleted: 2 episodes, 30 steps"):
        resolve("pusht_human", cache_dir=tmp_path)
    assert list(tmp_path.glob("pusht.zip*")) == [tmp_path / "pusht.zip.lock"]


def test_without_a_network_one_line_says_what_to_do(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.status = 503
    for url in (server.url, "http://127.0.0.1:9/pusht.zip"):
        monkeypatch.setattr(sources, "HUMAN_URL", url)
        with pytest.raises(InputError, match=f"{url}.*data=PATH.*data=pusht_expert") as caught:
            resolve("pusht_human", cache_dir=tmp_path)
        assert "\n" not in str(caught.value)


def test_a_path_is_taken_as_it_is_and_a_wrong_name_is_not_taken_for_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    demonstrations().save("mine")
    assert open_data("mine").n_steps == open_data(tmp_path / "mine").n_steps == 30
    with pytest.raises(InputError, match=r"unknown data set 'pusht_humann'.*did you mean pusht_human"):
        open_data("pusht_humann")
    for path in ("no/where", "nothing.zarr", "~/nowhere-at-all"):
        with pytest.raises(InputError, match="no such file or folder"):
            open_data(path)


def test_missing_pictures_are_rendered_once(tmp_path: Path) -> None:
    calls: list[int] = []

    def render(states: np.ndarray) -> np.ndarray:
        calls.append(len(states))
        return np.broadcast_to((states[:, :1, None, None] * 255).astype(np.uint8), (len(states), 4, 4, 3))

    buffer = demonstrations()
    expected = render(buffer["state"][:])
    for _ in range(2):
        np.testing.assert_array_equal(with_images(buffer, render, cache_dir=tmp_path)["img"][:], expected)
    assert calls == [30, 1, 30, 1]
    assert with_images(with_images(buffer, render, cache_dir=tmp_path), render, cache_dir=tmp_path).n_steps == 30
    # other states, other pictures
    states = np.array(buffer["state"][:])
    states[7] = 0
    other = ReplayBuffer.from_arrays({"state": states, "action": states}, [30])
    assert with_images(other, render, cache_dir=tmp_path)["img"][7].max() == 0


def test_a_rendering_that_fails_leaves_nothing_behind(tmp_path: Path) -> None:
    def render(states: np.ndarray) -> np.ndarray:
        if len(states) > 1:
            raise InputError("no display")
        return np.zeros((1, 4, 4, 3), np.uint8)

    with pytest.raises(InputError, match="no display"):
        with_images(demonstrations(), render, cache_dir=tmp_path)
    assert [file.suffix for file in tmp_path.iterdir()] == [".lock"]


def human_file() -> Path:
    folder = os.environ.get("ACTION_DIFFUSION_DATA")
    if not folder:
        pytest.skip("ACTION_DIFFUSION_DATA is not set: the folder with pusht_cchi_v7_replay.zarr.zip")
    return Path(folder) / "pusht_cchi_v7_replay.zarr.zip"


def test_the_pinned_content_is_that_of_the_human_file() -> None:
    buffer = ReplayBuffer.open(human_file())
    assert (buffer.n_episodes, buffer.n_steps) == (sources.HUMAN_EPISODES, sources.HUMAN_STEPS)
    assert content_hash(buffer) == sources.HUMAN_CONTENT


def test_rendered_pictures_are_those_that_were_recorded(tmp_path: Path) -> None:
    from action_diffusion.envs.pusht.simulator import render_states

    recorded = ReplayBuffer.open(human_file())
    state, images = recorded["state"][:60], recorded["img"][:60]
    rendered = with_images(ReplayBuffer.from_arrays({"state": state}, [60]), render_states, cache_dir=tmp_path)["img"][
        :
    ]
    assert np.abs(rendered.astype(np.float32) - images).mean() < 0.5
