"""The cameras of a LeRobotDataset whose frames lie in videos: which frames of which file are which episode's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from action_diffusion.datasets.formats.lerobot.episodes import Files, by_number, routes
from action_diffusion.datasets.formats.lerobot.info import FeatureInfo, Info
from action_diffusion.datasets.formats.lerobot.names import V30
from action_diffusion.datasets.formats.video import Part, VideoFilesColumn, VideoInfo, check_times, video_info
from action_diffusion.errors import InputError
from action_diffusion.progress import progress


def camera(info: Info, files: Files, name: str, feature: FeatureInfo) -> VideoFilesColumn:
    """Raises `InputError` unless the episodes fill each video, frame by frame, each frame at its row's time."""
    colours = 3 in feature.shape or 4 in feature.shape
    places = _places(info, files, name)
    videos: dict[Path, VideoInfo] = {}
    with progress("counting the frames", len(dict.fromkeys(places))) as advance:
        for file in dict.fromkeys(places):
            videos[file] = video_info(file, colours=colours)
            advance(1)
    parts = _parts(files, name, places, videos)
    for part, episode in zip(parts, files.episodes, strict=True):
        start = _start(episode, name, part.first / info.rate)
        check_times(videos[part.path], part, start, info.rate, episode["episode_index"])
    kinds = {video.kind: file for file, video in videos.items()}
    if len(kinds) > 1:
        listed = ", ".join(f"{file.name} {kind.dtype} {list(kind.shape)}" for kind, file in kinds.items())
        raise InputError(f"{info.root}: {name}: videos of different sizes: {listed}")
    kind = next(iter(kinds))
    if kind.alpha:
        info.said.append(f"{name} has an alpha channel, which was dropped: the colours are as they are stored")
    return VideoFilesColumn(parts, kind, files.episode_ends, videos)


def _places(info: Info, files: Files, name: str) -> list[Path]:
    """The file of each episode."""
    if info.version != V30:
        numbers = [episode["episode_index"] for episode in files.episodes]
        return [
            info.file("video_path", episode_chunk=number // info.chunk, episode_index=number, video_key=name)
            for number in numbers
        ]
    found = routes(files.episodes, f"videos/{name}")
    if found is not None:
        return [info.file("video_path", chunk_index=chunk, file_index=file, video_key=name) for chunk, file in found]
    info.said.append(f"meta/episodes does not say which video of {name} an episode is in: they were counted through")
    return _counted(info, files, name)


def _counted(info: Info, files: Files, name: str) -> list[Path]:
    """Episodes one after the other in the videos in the order of their numbers."""
    places: list[Path] = []
    lengths = files.lengths.tolist()
    for file in by_number(info.root, f"videos/{name}", "mp4"):
        left = video_info(file).frames
        while left > 0 and len(places) < len(lengths):
            left -= lengths[len(places)]
            places.append(file)
    if len(places) < len(lengths):
        raise InputError(f"{info.root}: videos/{name} holds frames for {len(places)} of {len(lengths)} episodes")
    return places


def _parts(files: Files, name: str, places: list[Path], videos: dict[Path, VideoInfo]) -> list[Part]:
    """The frames of each episode: those of a file are counted through in the order of their times."""
    starts = [_start(episode, name, index) for index, episode in enumerate(files.episodes)]
    parts, taken = dict[int, Part](), dict.fromkeys(videos, 0)
    for index in sorted(range(len(places)), key=starts.__getitem__):
        file, length = places[index], int(files.lengths[index])
        parts[index] = Part(file, taken[file], taken[file] + length)
        taken[file] += length
    for file, rows in taken.items():
        if videos[file].frames != rows:
            raise InputError(f"{file}: {videos[file].frames} frames, but its episodes have {rows} rows")
    return [parts[index] for index in range(len(places))]


def _start(episode: dict[str, Any], name: str, default: float) -> float:
    """When an episode begins in its video, s; `default` where the meta data does not say."""
    start = episode.get(f"videos/{name}/from_timestamp", default)
    if not isinstance(start, int | float):
        raise InputError(f"episode {episode['episode_index']}: from_timestamp of {name} is {start!r}, expected seconds")
    return start
