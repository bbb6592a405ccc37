"""`action-diffusion data view`: cameras, states and actions on one timeline, in rerun's viewer or a file for it."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from action_diffusion.datasets.doctor.examine import control_rate
from action_diffusion.datasets.doctor.survey import is_image
from action_diffusion.datasets.storage.checks import images_to_uint8
from action_diffusion.datasets.storage.replay_buffer import ReplayBuffer
from action_diffusion.datasets.storage.tasks import episode_tasks
from action_diffusion.errors import InputError
from action_diffusion.files import atomic_path, remove
from action_diffusion.progress import progress

QUALITY = 90
"""Of the JPEG frames that a recording holds."""
_FRAMES = 64
WORDS = "words"
"""Where the task in words is in a recording, beside the keys."""


def view(buffer: ReplayBuffer, episodes: Sequence[int], output: Path | None) -> None:
    """Show `episodes`, in a viewer where `output` is None, else as a .rrd file there.

    Timelines: `row` of the buffer, and `time` (s) where the buffer says its rate, in which episodes follow each other.
    Raises `InputError` where rerun is not installed, or there is no screen for its viewer.
    """
    rr = _rerun()
    if output is not None and output.suffix != ".rrd":
        raise InputError(f"output={output}: expected a file that ends in .rrd")
    recording = rr.RecordingStream(re.sub(r"[^\w -]", "-", f"action-diffusion {buffer.name}"))  # it takes no others
    if output is None:
        if sys.platform == "linux" and not {"DISPLAY", "WAYLAND_DISPLAY"} & set(os.environ):
            raise InputError("there is no screen for rerun's viewer: write a file with output=FILE.rrd")
        try:
            recording.spawn(default_blueprint=_blueprint(buffer))
        except Exception as error:
            raise InputError(f"rerun's viewer does not start ({error}): write a file with output=FILE.rrd") from error
        _log(rr, recording, buffer, episodes)
        return
    remove(output)
    with atomic_path(output) as temporary:
        recording.save(str(temporary), _blueprint(buffer))
        _log(rr, recording, buffer, episodes)
        recording.disconnect()


def _rerun() -> Any:
    try:
        import rerun
    except ImportError as error:
        raise InputError("data view needs rerun: pip install 'action-diffusion[view]'") from error
    return rerun


def _cameras(buffer: ReplayBuffer) -> list[str]:
    return [key for key in buffer.keys if is_image(buffer[key])]


def _blueprint(buffer: ReplayBuffer) -> Any:
    """Cameras side by side, and a plot for each other key below."""
    import rerun.blueprint as rrb

    cameras = _cameras(buffer)
    pictures: list[Any] = [rrb.Spatial2DView(origin=key, name=key) for key in cameras]
    plots = [rrb.TimeSeriesView(origin=key, name=key) for key in buffer.keys if key not in cameras]
    pictures += [rrb.TextDocumentView(origin=WORDS, name="task")] if any(episode_tasks(buffer)) else []
    rows = [rrb.Horizontal(*pictures)] if pictures else []
    return rrb.Blueprint(rrb.Vertical(*rows, rrb.Grid(*plots)) if plots else rows[0], collapse_panels=True)


def _log(rr: Any, recording: Any, buffer: ReplayBuffer, episodes: Sequence[int]) -> None:
    rate, ends, tasks = control_rate(buffer, None), buffer.episode_ends, episode_tasks(buffer)
    spans = [(int(ends[e - 1]) if e else 0, int(ends[e])) for e in episodes]
    with progress("logging", sum(end - start for start, end in spans)) as advance:
        for episode, (start, end) in zip(episodes, spans, strict=True):
            timelines = _timelines(rr, np.arange(start, end), rate)
            recording.send_columns("episode", timelines, rr.Scalars.columns(scalars=np.full(end - start, episode)))
            if tasks[episode]:
                words = rr.TextDocument.columns(text=[tasks[episode]])
                recording.send_columns(WORDS, _timelines(rr, np.array([start]), rate), words)
            for key in buffer.keys:
                if is_image(buffer[key]):
                    for rows, frames in _frames(buffer, key, start, end):
                        _log_frames(rr, recording, key, _timelines(rr, rows, rate), frames)
                    continue
                values = np.asarray(buffer[key][start:end]).reshape(end - start, -1).astype(float)
                recording.send_columns(key, timelines, rr.Scalars.columns(scalars=values))
            advance(end - start)


def _timelines(rr: Any, rows: np.ndarray, rate: float | None) -> list[Any]:
    timelines = [rr.TimeColumn("row", sequence=rows)]
    return timelines if rate is None else [*timelines, rr.TimeColumn("time", duration=rows / rate)]


def _frames(buffer: ReplayBuffer, key: str, start: int, end: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    for first in range(start, end, _FRAMES):
        rows = np.arange(first, min(end, first + _FRAMES))
        yield rows, images_to_uint8(np.asarray(buffer[key][first : rows[-1] + 1]), key, buffer.name, first)


def _log_frames(rr: Any, recording: Any, key: str, timelines: list[Any], frames: np.ndarray) -> None:
    blobs = [rr.Image(frame).compress(jpeg_quality=QUALITY).blob.as_arrow_array()[0].as_py() for frame in frames]
    columns = rr.EncodedImage.columns(blob=blobs, media_type=["image/jpeg"] * len(blobs))
    recording.send_columns(key, timelines, columns)
