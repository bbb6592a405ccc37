"""Buffers in object stores, s3://bucket/a.zarr, gs://…, https://…: read as they are needed, through a cache on disk.

    a chunk  →  CACHE/objects/3f/3f9c…   (checksum, bytes)   the least recently used go first
             →  the store, by `obstore`

A connection has `CONNECT` seconds, a request `TIMEOUT`; after `RETRIES` more tries, or `GIVE_UP` seconds, the run ends
with one line. Nothing is written to a store. Credentials are those that the store's own environment variables give;
without any, requests are not signed, which public buckets take.

A server that cannot list its files (https://) must have consolidated metadata, which names all arrays; there a chunk
that is missing is an error, because nobody can tell whether it was ever there.
"""

from __future__ import annotations

import asyncio
import fcntl
import hashlib
import importlib
import json
import os
import re
import threading
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

from zarr.abc.store import ByteRequest, OffsetByteRequest, RangeByteRequest, SuffixByteRequest
from zarr.core.buffer import Buffer, BufferPrototype
from zarr.storage import ObjectStore

from action_diffusion.datasets.storage.zarr_metadata import MAX_FILES, MAX_METADATA, METADATA, Listing
from action_diffusion.errors import InputError
from action_diffusion.files import cache_folder, writing
from action_diffusion.memory import sized

URL = re.compile(r"(s3|gs|https?):/{1,2}(?P<bucket>[^/\s]+)/(?P<inside>\S+)")
CONNECT, TIMEOUT, RETRIES, GIVE_UP = 10, 30, 3, 60
CACHE_GB = 10.0
_AT_ONCE = 16
_CHECKED = 16  # times, while as much is written as the cache holds, that it is measured
_LONGEST = 300
_STATUS = re.compile(r"status code: (\d+)")
_KEYS = {
    "s3": ("AWS_ACCESS_KEY_ID", "AWS_WEB_IDENTITY_TOKEN_FILE", "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI"),
    "gs": ("GOOGLE_SERVICE_ACCOUNT", "GOOGLE_SERVICE_ACCOUNT_KEY", "GOOGLE_APPLICATION_CREDENTIALS"),
}
_NO_LOGIN = "the server wants a login, and none is given"
_LOGIN = {
    "s3": "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (AWS_REGION, AWS_ENDPOINT_URL where they are others)",
    "gs": "set GOOGLE_APPLICATION_CREDENTIALS",
    "http": _NO_LOGIN,
    "https": _NO_LOGIN,
}


def is_url(value: object) -> bool:
    """Whether an option names something in an object store."""
    return isinstance(value, str | Path) and re.match(r"(s3|gs|https?):/", str(value)) is not None


class ObjectCache:
    """Files of at most `n_bytes` together in `folder`, several processes at once; the least recently used go first."""

    def __init__(self, folder: Path, n_bytes: float) -> None:
        self.folder, self.n_bytes = folder, n_bytes
        self._lock = threading.Lock()
        self._written = float("inf")  # measure it at the first chance

    def read(self, name: str) -> bytes | None:
        """None for what is not there, or damaged."""
        path = self._path(name)
        try:
            content = path.read_bytes()
            os.utime(path)
        except OSError:  # another process may have removed it
            return None
        return content[4:] if zlib.crc32(content[4:]).to_bytes(4, "little") == content[:4] else None

    def write(self, name: str, content: bytes) -> None:
        """Raises `InputError` where the disk takes no more."""
        if len(content) + 4 > self.n_bytes / _CHECKED:
            return  # it would drive out too many others
        path = self._path(name)
        partial = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}")
        with writing(f"{path}, in the cache of object stores"):
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                partial.write_bytes(zlib.crc32(content).to_bytes(4, "little") + content)
                os.replace(partial, path)
            finally:
                partial.unlink(missing_ok=True)
        with self._lock:
            self._written += len(content) + 4
            if self._written > self.n_bytes / _CHECKED / 2:
                self._written = 0
                self._shrink()

    def _path(self, name: str) -> Path:
        digest = hashlib.sha256(name.encode()).hexdigest()
        return self.folder / digest[:2] / digest

    def _shrink(self) -> None:
        """So that two processes stay below `n_bytes` until both have measured again."""
        with writing(str(self.folder)), (self.folder / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            found = []
            for path in self.folder.glob("??/*"):
                with suppress(FileNotFoundError):
                    stat = path.stat()
                    found.append((stat.st_mtime_ns, stat.st_size, path))
            left, most = sum(size for _, size, _ in found), self.n_bytes * (1 - 2 / _CHECKED)
            for _, size, path in sorted(found):
                if left <= most:
                    break
                path.unlink(missing_ok=True)
                left -= size


def object_cache(cache_dir: Path | None = None, cache_gb: float = CACHE_GB) -> ObjectCache:
    """In `cache_dir` (default: the user's cache folder), of at most `cache_gb` (10^9 bytes)."""
    return ObjectCache((cache_dir or cache_folder()) / "objects", cache_gb * 1e9)


class Objects(ObjectStore[Any]):
    """The folder at `url`, to be read. limit: bytes of the largest file that is read.

    Raises `InputError` for a store that cannot be reached, has no such bucket or folder, or refuses. After the
    first file that could not be read none is asked for, so that a run which ends does not wait for others.
    """

    def __init__(self, url: str, cache: ObjectCache) -> None:
        found = URL.fullmatch(url)
        if found is None:
            raise InputError(f"{url}: expected s3://BUCKET/FOLDER.zarr, gs://… or https://HOST/FOLDER.zarr")
        self.scheme, inside = found[1], found["inside"].rstrip("/")
        if self.scheme == "http" and not re.match(r"(127\.0\.0\.1|localhost|\[::1\])(:\d+)?$", found["bucket"]):
            raise InputError(f"{url}: http:// is for this machine only, https:// for others")
        self.url = f"{self.scheme}://{found['bucket']}/{inside}"
        if inside.endswith(".zip"):
            raise InputError(f"{self.url}: a zip is not read from there: fetch it, or put its folder there")
        self._cache, self._pool = cache, ThreadPoolExecutor(_AT_ONCE, thread_name_prefix="objects")
        self._library = _library()
        super().__init__(_client(self.scheme, found["bucket"], inside), read_only=True)
        self.limit = MAX_METADATA
        self._failed: InputError | None = None
        self._sizes: dict[str, int] | None = None  # of every file; None where the server cannot list them
        self._versions: dict[str, str] = {}
        self._described: dict[str, bytes] = {}  # metadata, where nothing lists them
        if self.scheme in ("http", "https"):
            self._consolidated()
        else:
            self._list_all()

    def listing(self) -> Listing:
        names = self._described if self._sizes is None else self._sizes
        places = [name for name in names if name.rpartition("/")[2] in METADATA]
        stored = 2**62 if self._sizes is None else sum(self._sizes.values())
        return Listing(places, self._metadata, lambda: stored)

    def has(self, key: str) -> bool:
        """Whether there is such a file; where that cannot be known, reading it says so."""
        return self._sizes is None or key in self._sizes

    async def get(self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None = None) -> Buffer | None:
        """See `Store`. Waits in a thread, not in Zarr's own."""
        loop = asyncio.get_running_loop()
        found = await loop.run_in_executor(self._pool, self.read, key, byte_range)
        return None if found is None else prototype.buffer.from_bytes(found)

    async def exists(self, key: str) -> bool:
        """See `Store`."""
        return self.has(key)

    def read(self, key: str, byte_range: ByteRequest | None = None) -> bytes | None:
        """From the cache, or the store. None for a file that is not there, as the format has it."""
        if self._sizes is None and key.rpartition("/")[2] in (*METADATA, ".zmetadata"):
            return self._described.get(key)
        if not self.has(key):
            return None
        part = _range(byte_range)
        name = f"{self.url}/{key} {self._versions.get(key, self._versions.get(''))} {part}"
        content = self._cache.read(name)
        if content is None:
            if self._failed is not None:
                raise self._failed
            try:
                content = self._fetch(key, part)
            except InputError as error:
                self._failed = error
                raise
            self._cache.write(name, content)
        return content

    def _fetch(self, key: str, part: Any = None) -> bytes:
        with self._asking(key):
            answer = self._library.get(self.store, key, options={} if part is None else {"range": part})
            size = answer.meta["size"] if part is None else 0
            if size > self.limit:
                raise InputError(f"{self.url}: {key} has {sized(size)} where at most {sized(self.limit)} can belong")
            return bytes(answer.bytes())

    def _metadata(self, place: str) -> bytes:
        found = self.read(place)
        assert found is not None  # it was listed
        return found

    def _list_all(self) -> None:
        self._sizes = {}
        with self._asking(""):
            for objects in self._library.list(self.store, chunk_size=1000):
                for one in objects:
                    self._sizes[one["path"]] = one["size"]
                    self._versions[one["path"]] = f"{one['e_tag']} {one['last_modified']}"
                if len(self._sizes) > MAX_FILES:
                    raise InputError(f"{self.url} holds more than {MAX_FILES:,} files: use larger chunks")
        if not self._sizes:
            raise InputError(f"{self.url}: there is nothing there")

    def _consolidated(self) -> None:
        """What the metadata of the whole say, in either version's way."""
        for name, entry in (("zarr.json", "consolidated_metadata"), (".zmetadata", "metadata")):
            try:
                content = self._fetch(name)
                nodes = json.loads(content)[entry]
                if name == "zarr.json":
                    nodes = {f"{place}/{name}": node for place, node in nodes["metadata"].items()}
                    nodes[name] = {
                        "node_type": "group",
                        "zarr_format": 3,
                        "attributes": json.loads(content).get("attributes", {}),
                    }
                self._described = {place: json.dumps(node).encode() for place, node in nodes.items()}
                self._versions[""] = hashlib.sha256(content).hexdigest()
                return
            except _Missing:
                continue
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
                break
        raise InputError(
            f"{self.url}: no consolidated metadata there (zarr.json, .zmetadata), and a web server lists no files: run "
            "zarr.consolidate_metadata(FOLDER) on it before it goes there"
        )

    @contextmanager
    def _asking(self, key: str) -> Iterator[None]:
        """One line for whatever the library says."""
        where = f"{self.url}{f'/{key}' if key else ''}"
        errors = self._library.exceptions
        try:
            yield
        except (errors.BaseError, OSError) as error:
            said = " ".join(str(error).partition("Debug source")[0].split())
            status = _STATUS.search(said)
            missing, refused = (errors.NotFoundError, FileNotFoundError), (errors.UnauthenticatedError, PermissionError)
            if isinstance(error, missing) or (status and status[1] == "404"):
                raise _Missing(f"{where}: no such bucket, or no such file in it") from None
            if isinstance(error, (*refused, errors.PermissionDeniedError)) or (status and status[1] in ("401", "403")):
                raise InputError(f"{where}: not there, or not for you: {_LOGIN[self.scheme]}") from None
            raise InputError(f"{where} cannot be read, the store does not answer: {said[:_LONGEST]}") from None


class _Missing(InputError):
    """What is asked for is not there."""


def _range(wanted: ByteRequest | None) -> Any:
    """As obstore has it."""
    if isinstance(wanted, RangeByteRequest):
        return (wanted.start, wanted.end)
    if isinstance(wanted, OffsetByteRequest):
        return {"offset": wanted.offset}
    return {"suffix": wanted.suffix} if isinstance(wanted, SuffixByteRequest) else None


def _library() -> Any:
    try:
        importlib.import_module("obstore.store")
        importlib.import_module("obstore.exceptions")
        return importlib.import_module("obstore")
    except ImportError:
        raise InputError(
            's3://, gs:// and https:// need obstore: pip install "action-diffusion[object-store]"'
        ) from None


def _client(scheme: str, bucket: str, inside: str) -> Any:
    stores = importlib.import_module("obstore.store")
    endpoint = os.environ.get("AWS_ENDPOINT_URL") or os.environ.get("AWS_ENDPOINT") or "" if scheme == "s3" else ""
    plain = scheme == "http" or endpoint.startswith("http:")
    client: dict[str, Any] = {"timeout": f"{TIMEOUT}s", "connect_timeout": f"{CONNECT}s", "allow_http": plain}
    common: dict[str, Any] = {
        "client_options": client,
        "retry_config": {"max_retries": RETRIES, "retry_timeout": timedelta(seconds=GIVE_UP)},
    }
    try:
        if scheme in ("http", "https"):
            return stores.HTTPStore.from_url(f"{scheme}://{bucket}/{inside}", **common)
        if not any(os.environ.get(name) for name in _KEYS[scheme]):
            common["skip_signature"] = True
        if endpoint:
            common["endpoint"] = endpoint
        return {"s3": stores.S3Store, "gs": stores.GCSStore}[scheme](bucket, prefix=inside, **common)
    except Exception as error:  # a name that is none, a file of credentials that is not there
        said = " ".join(str(error).partition("Debug source")[0].split())[:_LONGEST]
        raise InputError(f"{scheme}://{bucket}/{inside}: {said}") from None


def opened(url: str, cache: ObjectCache) -> tuple[Objects, Listing, Callable[[str], bool]]:
    """What `store.open_zarr` needs of the folder at `url`."""
    objects = Objects(url, cache)
    return objects, objects.listing(), objects.has
