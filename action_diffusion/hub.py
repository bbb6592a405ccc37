"""Policies and data on the Hugging Face Hub, as `hf://user/name[@revision][/folder]`.

A branch, a tag or nothing is looked up once and then stands for a commit: that is fetched into
CACHE/hub/models--user--name/<commit>, taken from there the next time, and what records say. Of a repository only files
with names that are known here are taken, so neither code nor pickles. By `huggingface_hub`, which knows the user's
login or `HF_TOKEN` and the server (`HF_ENDPOINT`).
"""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple
from urllib.parse import quote, unquote

from action_diffusion.errors import InputError
from action_diffusion.files import cache_folder, locked, remove, require_space, writing
from action_diffusion.progress import progress
from action_diffusion.schema import shown

REFERENCE = re.compile(
    r"hf:/{1,2}(?:(?P<kind>datasets|models)/)?(?P<repo>[\w.-]+/[\w.-]+)(?:@(?P<revision>[^/@\s]+))?(?:/(?P<inside>.*))?"
)
COMMIT = re.compile(r"[0-9a-f]{40}")
TIMEOUT = 20.0  # seconds without an answer
ORIGIN = "hub.json"
"""Beside what was fetched: where it is from."""


class RepositoryKind(NamedTuple):
    """What is looked for. type: of its repositories. names: of the files that are taken. most_bytes: together."""

    type: str
    what: str
    names: re.Pattern[str]
    most_bytes: int


POLICY = RepositoryKind(
    "model",
    "a policy",
    re.compile(
        r"(config\.yaml|spec\.json|(model|golden|episodes)\.safetensors|extensions/[a-z0-9_]{1,64}\.safetensors"
        r"|config\.json|train_config\.json|policy_(pre|post)processor(\.json|[\w-]*\.safetensors))"
    ),
    20_000_000_000,
)
DATA = RepositoryKind(
    "dataset",
    "a LeRobot data set or a replay buffer",
    re.compile(
        r"meta/[\w./-]+\.(jsonl?|parquet)|data/[\w./-]+\.parquet|(videos|images)/[\w./-]+\.(mp4|png|jpe?g)"
        r"|[\w.-]+\.zarr\.zip|([\w. -]+/)*(\.z(group|array|attrs|metadata)|zarr\.json|(c/)?\d+([./]\d+)*)"
    ),
    1_000_000_000_000,
)
MOST_FILES = 1_000_000
AT_ONCE = 8


class HubReference(NamedTuple):
    """A repository, what of it, and as of when. revision: "" for its main branch. inside: "" for all of it."""

    repo: str
    revision: str = ""
    inside: str = ""

    @property
    def pinned(self) -> bool:
        """Whether it says a commit, which never changes."""
        return COMMIT.fullmatch(self.revision) is not None

    def __str__(self) -> str:
        at, inside = f"@{quote(self.revision, safe='')}" * bool(self.revision), f"/{self.inside}" * bool(self.inside)
        return f"hf://{self.repo}{at}{inside}"


def is_reference(value: object) -> bool:
    """Whether an option names something on the Hub."""
    return isinstance(value, str | Path) and str(value).startswith("hf:/")


def parse(text: str | Path) -> HubReference:
    """Raises `InputError` for what is no `hf://user/name[@revision][/folder]`."""
    found = REFERENCE.fullmatch(str(text))
    if found is None:
        raise InputError(f"{shown(text)}: expected hf://user/name, hf://user/name@revision or …/folder")
    inside = (found["inside"] or "").strip("/")
    if inside:
        _check_name(inside, str(text))
    return HubReference(found["repo"], unquote(found["revision"] or ""), inside)


def pinned(text: str | Path, kind: RepositoryKind) -> str:
    """The same with the commit that it stands for now."""
    reference = parse(text)
    return str(reference if reference.pinned else reference._replace(revision=_listing(reference, kind)[0]))


def fetched(text: str | Path, kind: RepositoryKind) -> Path:
    """Where what is named lies on this machine; from the Hub unless it does already.

    Raises `InputError` for a repository, a revision or a file that is not there or may not be read, one that holds
    nothing that is known here, and no network.
    """
    reference = parse(text)
    place = _place(reference, kind)
    if reference.pinned and place.is_dir():
        return _chosen(place, reference)
    commit, files = _listing(reference, kind)
    reference = reference._replace(revision=commit)
    place = _place(reference, kind)
    with locked(place):
        if not place.is_dir():
            _fetch(reference, kind, _taken(reference, kind, files), place)
    return _chosen(place, reference)


def pull(text: str | Path, kind: RepositoryKind, out: Path) -> str:
    """Fetch into a folder of the user's; returns the reference with its commit."""
    place = fetched(text, kind)
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(f".{out.name}.{os.getpid()}.partial")
    try:
        with writing(str(out)):
            shutil.copytree(place, partial)
            os.replace(partial, out)
    finally:
        remove(partial)
    return origin(out) or str(text)


def origin(folder: Path) -> str | None:
    """The reference, with its commit, that a folder was fetched from; None for one that was not."""
    try:
        found = json.loads((folder / ORIGIN).read_text(encoding="utf-8"))["from"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return found if isinstance(found, str) and REFERENCE.fullmatch(found) else None


def push(
    text: str | Path, kind: RepositoryKind, files: Mapping[str, Path | bytes], *, private: bool, message: str
) -> str:
    """Write files, by their name there, as one commit, in a repository that is made where there is none; returns the
    reference with that commit. Files of the `kind` that are there and not among these go.

    private: of a repository that is made now.
    """
    reference, hub = parse(text), _library()
    if reference.revision or reference.inside:
        raise InputError(f"{reference}: push to hf://{reference.repo}, which makes a new revision of its main branch")
    with _asking(reference):
        api = _api(hub)
        api.create_repo(reference.repo, repo_type=kind.type, private=private, exist_ok=True)
        there = [file.rfilename for file in api.repo_info(reference.repo, repo_type=kind.type).siblings or ()]
        operations = [
            hub.CommitOperationAdd(path_in_repo=name, path_or_fileobj=data if isinstance(data, bytes) else str(data))
            for name, data in files.items()
        ]
        gone = [name for name in there if kind.names.fullmatch(name) and name not in files]
        operations += [hub.CommitOperationDelete(path_in_repo=name) for name in gone]
        made = api.create_commit(reference.repo, operations, commit_message=message, repo_type=kind.type)
    return str(reference._replace(revision=str(made.oid)))


def _library() -> Any:
    try:
        return importlib.import_module("huggingface_hub")
    except ImportError:
        raise InputError('hf:// needs huggingface_hub: pip install "action-diffusion[hub]"') from None


def _api(hub: Any) -> Any:
    hub.utils.disable_progress_bars()  # of single files
    hub.utils.logging.set_verbosity_error()  # what went wrong is said once, here
    return hub.HfApi(endpoint=os.environ.get("HF_ENDPOINT") or None, library_name="action-diffusion")


def _place(reference: HubReference, kind: RepositoryKind) -> Path:
    part = f"-{hashlib.sha256(reference.inside.encode()).hexdigest()[:12]}" if reference.inside else ""
    repo = f"{kind.type}s--{reference.repo.replace('/', '--')}"
    return cache_folder() / "hub" / repo / f"{reference.revision or 'main'}{part}".replace("/", "--")


def _listing(reference: HubReference, kind: RepositoryKind) -> tuple[str, dict[str, int]]:
    """The commit, and all files of it by name, with their sizes."""
    hub = _library()
    with _asking(reference):
        info = _api(hub).repo_info(
            reference.repo,
            repo_type=kind.type,
            revision=reference.revision or None,
            files_metadata=True,
            timeout=TIMEOUT,
        )
    if not isinstance(info.sha, str) or not COMMIT.fullmatch(info.sha):
        raise InputError(f"{reference}: the server names no commit, but {shown(info.sha)}")
    files = {}
    for file in info.siblings or ():
        _check_name(file.rfilename, str(reference))
        files[file.rfilename] = int(file.size or 0)
    return info.sha, files


def _check_name(name: str, where: str) -> None:
    """`InputError` for a name that leads out of the folder that it is for."""
    parts = name.split("/")
    if PurePosixPath(name).is_absolute() or {"", ".", ".."} & set(parts) or re.search(r"[\\:\x00-\x1f]", name):
        raise InputError(f"{where} has a file {shown(name)!r}, whose name leads elsewhere: nothing of it is taken")


def _taken(reference: HubReference, kind: RepositoryKind, files: Mapping[str, int]) -> dict[str, int]:
    """What is fetched, and its size. Raises `InputError` where there are none, too many, or too large ones."""
    start = f"{reference.inside}/" if reference.inside else ""
    inside = [name for name in files if name == reference.inside or name.startswith(start)]
    taken = [name for name in inside if kind.names.fullmatch(name.removeprefix(start) or name)]
    if kind is DATA and not start:
        taken = _one_of(reference, taken)
    if not taken:
        listed = ", ".join(sorted(files)[:8]) or "nothing"
        raise InputError(f"{reference} holds no file of {kind.what}; there is {shown(listed)}")
    size = sum(files[name] for name in taken)
    if len(taken) > MOST_FILES or size > kind.most_bytes:
        raise InputError(
            f"{reference}: {len(taken):,} files of {size / 1e9:,.1f} GB together; at most {MOST_FILES:,} and "
            f"{kind.most_bytes / 1e9:,.0f} GB are fetched"
        )
    require_space(cache_folder(), size, f"what {reference} holds")
    return {name: files[name] for name in taken}


def _one_of(reference: HubReference, names: Sequence[str]) -> list[str]:
    """Those of one data set: a LeRobot data set or a Zarr group that the repository is, or the buffer in it."""
    if any(name in ("meta/info.json", ".zgroup", "zarr.json") for name in names):
        return list(names)
    roots = sorted({name.split("/")[0] for name in names if re.fullmatch(r".+\.zarr(\.zip)?", name.split("/")[0])})
    if len(roots) > 1:
        raise InputError(f"{reference} holds {', '.join(roots[:8])}: say which, such as {reference}/{roots[0]}")
    return [name for name in names if roots and name.split("/")[0] == roots[0]]


def _fetch(reference: HubReference, kind: RepositoryKind, sizes: Mapping[str, int], place: Path) -> None:
    """Into `place`, which is there when it is complete; what has come of it is kept for another try."""
    partial, hub = place.with_name(f".{place.name}.partial"), _library()
    api = _api(hub)

    def one(name: str) -> int:
        with _asking(reference, name):
            api.hf_hub_download(
                reference.repo, name, repo_type=kind.type, revision=reference.revision, local_dir=partial
            )
        return (partial / name).stat().st_size

    with progress(f"downloading {reference}", sum(sizes.values())) as advance, ThreadPoolExecutor(AT_ONCE) as pool:
        for name, size in zip(sizes, pool.map(one, sizes), strict=True):
            if size != sizes[name]:
                pool.shutdown(cancel_futures=True)  # nobody writes into it any more
                remove(partial)
                raise InputError(f"{reference}, {name}: {size:,} bytes came, of {sizes[name]:,} that are listed")
            advance(size)
    with writing(str(place)):
        remove(partial / ".cache")  # the library's own notes
        if kind is POLICY:
            (partial / reference.inside / ORIGIN).write_text(json.dumps({"from": str(reference)}) + "\n")
        os.replace(partial, place)


def _chosen(place: Path, reference: HubReference) -> Path:
    """The folder, or the file, of a fetched repository that is meant."""
    if reference.inside:
        return place / reference.inside
    found = [path for path in place.iterdir() if re.fullmatch(r".+\.zarr(\.zip)?", path.name)]
    return found[0] if len(found) == 1 and not (place / "meta").is_dir() else place


@contextmanager
def _asking(reference: HubReference, file: str = "") -> Iterator[None]:
    """One line for whatever the library says: it has errors of its own, and those of what it speaks HTTP with."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        errors = importlib.import_module("huggingface_hub.errors")
        host = os.environ.get("HF_ENDPOINT") or "https://huggingface.co"
        about = f"{reference}{f', {file}' if file else ''}"
        status = getattr(getattr(error, "response", None), "status_code", None)
        if isinstance(error, errors.GatedRepoError):
            reason = f"its owner on {host} has to let you in first"
        elif isinstance(error, errors.RepositoryNotFoundError) or status in (401, 403):
            reason = f"not on {host}, or not for you: log in (hf auth login), or set HF_TOKEN"
        elif isinstance(error, errors.RevisionNotFoundError):
            reason = f"no such revision on {host}"
        elif isinstance(error, errors.HFValidationError):
            reason = shown(error)
        elif status is not None:
            reason = f"{host} answers {status}"
        else:
            said = shown(str(error) or type(error).__name__)
            reason = f"{host} cannot be reached, or broke off ({said}); what has come is kept"
        raise InputError(f"{about}: {reason}") from None
