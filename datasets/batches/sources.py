"""What `data=` may say: a path, hf://user/name (`hub`), s3://…, gs://… or https://… (`storage.objects`), or the name of
a data set that ships or is downloaded.

What lies at a path is a replay buffer, or any format of `datasets.formats`, which is converted into the cache.

pusht_expert   in the package: states and actions of the scripted expert
pusht_human    206 demonstrations by people, 30 MB, from the authors of "Diffusion Policy" (RSS 2023)
"""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from action_diffusion.datasets.batches.columns import cached_array, digest
from action_diffusion.datasets.batches.download import download
from action_diffusion.datasets.formats.cached import as_buffer, look
from action_diffusion.datasets.storage.objects import CACHE_GB, is_url, object_cache
from action_diffusion.datasets.storage.replay_buffer import ReplayBuffer
from action_diffusion.errors import InputError, unknown
from action_diffusion.files import cache_folder, locked
from action_diffusion.hub import DATA, fetched, is_reference
from action_diffusion.parallel import cores, in_order, refuse_while_importing

HUMAN = "pusht_human"
NAMES = ("pusht_expert", HUMAN)
HUMAN_URL = "https://diffusion-policy.cs.columbia.edu/data/training/pusht.zip"
# SHA-256 of the bytes of state (float32), action (float32) and episode_ends (int64), all little-endian
HUMAN_CONTENT = "e5f0b2b088fb60d8a8d412c2694e7241283a552e2cf21192ecbc44249189869b"
HUMAN_EPISODES, HUMAN_STEPS = 206, 25650
_RENDER_ROWS, _RENDER_ALONE = 256, 5000


def names(data: str | Sequence[str]) -> list[str]:
    """The names and paths that `data=` says: one, or several that are trained on together."""
    return [data] if isinstance(data, str) else list(data)


def tell(text: str) -> None:
    """A line for the user, beside what a program reads."""
    print(text, file=sys.stderr)


def open_data(
    data: str | Path,
    *,
    cache_dir: Path | None = None,
    say: Callable[[str], None] = tell,
    images: str = "disk",
    cache_gb: float = CACHE_GB,
) -> ReplayBuffer:
    """The buffer that `data` names or lies at, or the copy of what lies there; see `resolve` and `formats.cached`.

    say: gets a line about a conversion. images: "decode", or "auto" and a disk too small for a copy, leave videos where
    they are. cache_gb: what is kept at most (10^9 bytes) of what is read from object stores.
    """
    if is_url(data):
        return ReplayBuffer.open(data, object_cache(cache_dir, cache_gb))
    return as_buffer(resolve(data, cache_dir=cache_dir), _converted(cache_dir), say, images)


def look_at(data: str | Path, *, cache_dir: Path | None = None) -> ReplayBuffer:
    """The same without converting anything: for what is told from columns and episodes."""
    if is_url(data):
        return ReplayBuffer.open(data, object_cache(cache_dir))
    return look(resolve(data, cache_dir=cache_dir), _converted(cache_dir))


def _converted(cache_dir: Path | None) -> Path:
    return (cache_dir or cache_folder()) / "converted"


def resolve(data: str | Path, *, cache_dir: Path | None = None) -> Path:
    """Where `data`, one of `NAMES`, hf://… or a path, is on this machine; downloads it if need be.

    Raises `InputError` for a name that does not exist (close ones are suggested), a path that is not
    there, and a download that fails (what to do instead is said).
    """
    name, path = str(data), Path(data).expanduser()
    if is_reference(name):
        return fetched(name, DATA)
    if name == "pusht_expert":
        return Path(__file__).parents[1] / "embedded" / "pusht_expert.zarr.zip"
    if name == HUMAN:
        return _human_file(cache_dir or cache_folder())
    looks_like_path = os.sep in name or path.suffix or name.startswith(("~", "."))
    if not path.exists() and not looks_like_path:
        raise InputError(f"{unknown('data set', name, NAMES)}; there is no file or folder of that name either")
    return path


def _human_file(folder: Path) -> Path:
    path = folder / "pusht.zip"
    with locked(path):
        if not path.exists():
            partial = path.with_suffix(".zip.part")
            try:
                download(HUMAN_URL, partial)
            except InputError as error:
                raise InputError(
                    f"pusht_human cannot be downloaded ({error}): try again (what has come is kept), or "
                    "fetch that file by hand and pass data=PATH, or use the demonstrations in the package: "
                    "data=pusht_expert"
                ) from error
            _check_human(partial)
            os.replace(partial, path)
    return path


def _check_human(path: Path) -> None:
    """Deletes the file and raises `InputError` unless it holds the 206 demonstrations, to the last bit."""
    try:
        buffer = ReplayBuffer.open(path)
        found = buffer.n_episodes, buffer.n_steps, content_hash(buffer)
    except InputError as error:
        path.unlink()
        raise InputError(f"the file from {HUMAN_URL} is damaged, and was deleted: try again ({error})") from error
    if found != (HUMAN_EPISODES, HUMAN_STEPS, HUMAN_CONTENT):
        path.unlink()
        raise InputError(
            f"what came from {HUMAN_URL} is not the expected file, and was deleted: {found[0]} episodes, "
            f"{found[1]} steps, content {found[2][:12]} instead of {HUMAN_EPISODES}, {HUMAN_STEPS}, "
            f"{HUMAN_CONTENT[:12]}; if you trust it, fetch it by hand and pass data=PATH"
        )


def content_hash(buffer: ReplayBuffer) -> str:
    """SHA-256 of `state`, `action` and `episode_ends`, whatever their chunks and compression."""
    columns = (buffer["state"][:], "<f4"), (buffer["action"][:], "<f4"), (buffer.episode_ends, "<i8")
    return hashlib.sha256(b"".join(np.ascontiguousarray(a, dtype).tobytes() for a, dtype in columns)).hexdigest()


def with_images(
    buffer: ReplayBuffer,
    render: Callable[[np.ndarray], np.ndarray],
    *,
    key: str = "img",
    state_key: str = "state",
    cache_dir: Path | None = None,
) -> ReplayBuffer:
    """`buffer`, with a column `key` of pictures of its recorded states where it has none.

    render: states [n, S] -> uint8 [n, H, W, 3], such as `envs.pusht.render_states`; for many states it runs in as many
    processes as there are cores, so it must pickle. What it draws is kept in
    `cache_dir` (default: the user's cache folder) and read from there, also the next time.
    """
    if key in buffer:
        return buffer
    refuse_while_importing()
    states = np.asarray(buffer[state_key][:])
    first = render(states[:1])

    def parts() -> Iterator[np.ndarray]:
        pieces = [states[row : row + _RENDER_ROWS] for row in range(0, len(states), _RENDER_ROWS)]
        # Processes take some seconds to start, in which one draws a thousand pictures and more.
        workers = cores() if len(states) >= _RENDER_ALONE else 1
        return in_order(render, pieces, workers, "rendering")

    images = cached_array(
        f"rendered-{digest(states.tobytes())}",
        digest(first.tobytes()),  # shows another size, and nearly any other way of drawing
        shape=(len(states), *first.shape[1:]),
        dtype=np.dtype(np.uint8),
        parts=parts,
        folder=cache_dir,
        description="rendering the recorded states",
    )
    return buffer.with_column(key, images)
