"""Shared memory: whole records whatever the writer does, also when it is killed; nothing is left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from action_diffusion.deploy.ipc.rings import Moment, RingReader, RingWriter, Segments, sweep
from action_diffusion.errors import InputError

FIELDS = {"x": ("f8", (3,)), "image": ("u1", (2, 4, 3)), "why": ("S20", ()), "flag": ("?", ())}


def values(i: int) -> dict[str, object]:
    return {"x": np.full(3, i), "image": np.full((2, 4, 3), i % 256, np.uint8), "why": b"r%d" % i, "flag": i % 2 == 0}


@pytest.fixture
def path(tmp_path) -> Path:
    return tmp_path / "ring"


@settings(deadline=None, max_examples=60)
@given(n_slots=st.integers(2, 9), n=st.integers(0, 40), k=st.integers(0, 12), since=st.floats(-1, 41), data=st.data())
def test_readers_find_the_newest_records_whole_and_in_order(tmp_path_factory, n_slots, n, k, since, data):
    path = tmp_path_factory.mktemp("ring") / "ring"
    writer = RingWriter(path, fields=FIELDS, n_slots=n_slots)
    early = RingReader(path)
    for i in range(n):
        assert writer.append(float(i), values(i)) == i
    kept = list(range(max(0, n - n_slots), n))
    for reader in (early, RingReader(path)):
        newest = reader.latest()
        assert (newest is None) == (n == 0)
        assert newest is None or newest.number == n - 1
        assert [record.number for record in reader.last(k)] == (kept[-k:] if k else [])
        assert reader.times(k) == [(i, float(i)) for i in (kept[-k:] if k else [])]
        assert [record.number for record in reader.since(since)] == [i for i in kept if i > since]
        after = data.draw(st.integers(-1, 45))
        assert [record.number for record in reader.after(after)] == [i for i in kept if i > after]
        for record in reader.last(n_slots):
            assert record.t == record.number
            for name, value in values(record.number).items():
                np.testing.assert_array_equal(record.values[name], value)


def test_a_record_that_is_being_written_is_not_there(path):
    writer = RingWriter(path, fields={"x": ("f8", ())}, n_slots=3)
    reader = RingReader(path)
    for i in range(3):
        writer.append(i, {"x": i})
    writer._seq[0] = 2 * 3 + 1  # a writer that was killed while it wrote record 3
    writer._views["x"][0] = np.nan
    assert [record.number for record in reader.last(3)] == [1, 2]
    assert reader.latest().number == 2
    assert reader.read(3) is None
    writer.append(3, {"x": 3})
    assert [record.number for record in reader.last(3)] == [1, 2, 3]


@pytest.mark.parametrize("wrong", [{}, {"x": 1.0}, {"x": np.zeros(3)}, {"x": np.zeros(2), "y": 0}])
def test_a_record_of_another_shape_is_refused_and_not_broadcast(path, wrong):
    writer = RingWriter(path, fields={"x": ("f8", (2,))}, n_slots=2)
    with pytest.raises(ValueError, match="does not fit"):
        writer.append(0.0, wrong)
    assert RingReader(path).latest() is None


def test_what_cannot_be_a_ring_is_refused(path):
    with pytest.raises(InputError, match="at least 2 slots"):
        RingWriter(path, fields=FIELDS, n_slots=1)
    with pytest.raises(InputError, match="does not fit"):
        RingWriter(path, fields={f"field {i}": ("f8", ()) for i in range(300)}, n_slots=2)
    with pytest.raises(FileNotFoundError):
        RingReader(path)


WRITER = """
import sys, numpy as np
from pathlib import Path
from action_diffusion.deploy.ipc.rings import RingWriter
writer = RingWriter(Path(sys.argv[1]), fields={"frame": ("i8", (4000,))}, n_slots=4)
i = 0
while True:
    writer.append(i, {"frame": np.full(4000, i)})
    i += 1
"""


@pytest.mark.slow
def test_beside_a_writer_at_full_speed_no_record_is_torn_and_a_killed_one_leaves_readers_working(path):
    process = subprocess.Popen([sys.executable, "-c", WRITER, str(path)])
    try:
        deadline = time.monotonic() + 20
        while not path.exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        reader, seen = RingReader(path), 0
        until = time.monotonic() + 0.5
        while time.monotonic() < until or seen < 50:
            for record in reader.last(2):
                assert (record.values["frame"] == record.number).all()
                assert record.t == record.number
                seen += 1
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert reader.latest().number >= 10
        assert len(reader.last(3)) >= 2  # the one after may have been half written over the oldest
    finally:
        process.kill()


def test_threads_read_while_one_writes(path):
    writer = RingWriter(path, fields={"x": ("f8", (500,))}, n_slots=3)
    writer.append(0.0, {"x": np.zeros(500)})
    torn: list[int] = []

    def read() -> None:
        reader = RingReader(path)
        for _ in range(300):
            record = reader.latest()
            if record is None or not (record.values["x"] == record.number).all():
                torn.append(1)

    readers = [threading.Thread(target=read) for _ in range(2)]
    for thread in readers:
        thread.start()
    i = 1
    while any(thread.is_alive() for thread in readers):
        writer.append(float(i), {"x": np.full(500, i)})
        i += 1
    assert not torn


def test_a_moment_is_marked_by_anybody(tmp_path):
    one = Moment.create(tmp_path / "stop")
    other = Moment(tmp_path / "stop")
    assert one.t == 0
    before = time.monotonic()
    other.mark()
    assert before <= one.t <= time.monotonic()
    one.clear()
    assert other.t == 0


OWNER = """
import sys, time
from pathlib import Path
from action_diffusion.deploy.ipc.rings import Segments, RingWriter
segments = Segments(Path(sys.argv[1]))
RingWriter(segments.path / "ring", fields={"x": ("f8", ())}, n_slots=2)
print(segments.path, flush=True)
time.sleep(60)
"""


def test_a_dead_runs_memory_is_removed_by_the_next_run_and_a_living_ones_is_not(tmp_path):
    owner = subprocess.Popen([sys.executable, "-c", OWNER, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    try:
        folder = Path(owner.stdout.readline().strip())
        assert (folder / "ring").exists()
        assert sweep(tmp_path) == []
        mine = Segments(tmp_path)
        assert folder.exists()
        os.kill(owner.pid, signal.SIGKILL)
        owner.wait()
        second = Segments(tmp_path)
        assert not folder.exists()
        assert mine.path.exists()
        mine.remove()
        mine.remove()
        second.remove()
        assert list(tmp_path.iterdir()) == []
    finally:
        owner.kill()
        owner.wait()
        owner.stdout.close()
