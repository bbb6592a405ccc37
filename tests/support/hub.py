"""A server on loopback that speaks as much of the Hugging Face Hub's API as fetching and writing small files takes."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlparse

Files = dict[str, bytes]


@dataclass
class Repository:
    """commits: files by commit, oldest first. refs: branches and tags."""

    private: bool = False
    commits: dict[str, Files] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)

    def commit(self, files: Files, *refs: str) -> str:
        digest = hashlib.sha1(repr((len(self.commits), sorted(files.items()))).encode()).hexdigest()
        self.commits[digest] = dict(files)
        self.refs |= dict.fromkeys(("main", *refs), digest)
        return digest


class Hub:
    """`repositories`: by type and name ("models/me/it"). `asked`: every request, as "GET /path"."""

    def __init__(self, token: str = "") -> None:
        self.repositories: dict[str, Repository] = {}
        self.token, self.asked = token, list[str]()
        self.listed: dict[str, list[dict[str, Any]]] = {}
        """What a repository says that it has, instead of what it has."""
        self.cut: set[str] = set()
        """Files of which half comes, each time."""
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def add(self, name: str, files: Files, *refs: str, kind: str = "models") -> str:
        """A new commit of a repository, which is made where there is none."""
        return self.repositories.setdefault(f"{kind}/{name}", Repository()).commit(files, *refs)

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


def _handler(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.0"  # a connection for each request, so that none outlives `close`

        def log_message(self, *_: Any) -> None:
            pass

        def do_GET(self) -> None:
            self._serve()

        do_HEAD = do_POST = do_GET

        def _serve(self) -> None:
            url = urlparse(self.path)
            hub.asked.append(f"{self.command} {unquote(url.path)}")
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            path = url.path.strip("/")
            if path == "api/repos/create":
                return self._create(json.loads(body))
            if path == "api/validate-yaml":
                return self._json({"errors": [], "warnings": []})
            if found := re.fullmatch(
                r"api/(models|datasets)/([^/]+/[^/]+)(?:/(revision|preupload|commit)/(.+))?", path
            ):
                return self._api(found[1], found[2], found[3], unquote(found[4] or "main"), body, parse_qs(url.query))
            if found := re.fullmatch(r"(datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
                return self._file((found[1] or "models/") + found[2], unquote(found[3]), unquote(found[4]))
            return self._refuse(404, "EntryNotFound")

        def _repository(self, place: str) -> Repository | None:
            found = hub.repositories.get(place)
            signed = self.headers.get("Authorization") == f"Bearer {hub.token}"
            return None if found is not None and found.private and not signed else found

        def _api(self, kind: str, name: str, what: str, revision: str, body: bytes, _: Any) -> None:
            repository = self._repository(f"{kind}/{name}")
            if repository is None:
                return self._refuse(401, "RepoNotFound")
            if what == "preupload":
                asked = [one["path"] for one in json.loads(body)["files"]]
                modes = [{"path": path, "uploadMode": "regular", "shouldIgnore": False} for path in asked]
                return self._json({"files": modes})
            commit = revision if revision in repository.commits else repository.refs.get(revision, "")
            if what == "commit":
                return self._commit(repository, name, body)
            if not commit and repository.commits:
                return self._refuse(404, "RevisionNotFound")
            files = repository.commits.get(commit, {})
            siblings = hub.listed.get(name) or [{"rfilename": key, "size": len(value)} for key, value in files.items()]
            self._json(
                {"id": name, "modelId": name, "sha": commit or None, "siblings": siblings, "private": False, "tags": []}
            )

        def _commit(self, repository: Repository, name: str, body: bytes) -> None:
            files = dict(repository.commits.get(repository.refs.get("main", ""), {}))
            for line in map(json.loads, body.decode().splitlines()):
                if line["key"] == "file":
                    files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
                elif line["key"] == "deletedFile":
                    files.pop(line["value"]["path"])
            oid = repository.commit(files)
            self._json(
                {"success": True, "commitOid": oid, "commitUrl": f"{hub.url}/{name}/commit/{oid}", "hookOutput": ""}
            )

        def _create(self, asked: dict[str, Any]) -> None:
            if hub.token and self.headers.get("Authorization") != f"Bearer {hub.token}":
                return self._refuse(401, None)
            place = (
                f"{asked.get('type', 'model')}s/{'/'.join(filter(None, (asked.get('organization'), asked['name'])))}"
            )
            private = bool(asked.get("private")) or asked.get("visibility") == "private"
            if place in hub.repositories:
                return self._json({"url": f"{hub.url}/{place.partition('/')[2]}"}, 409)
            hub.repositories[place] = Repository(private=private)
            self._json({"url": f"{hub.url}/{place.partition('/')[2]}"})

        def _file(self, place: str, revision: str, file: str) -> None:
            repository = self._repository(place)
            if repository is None:
                return self._refuse(401, "RepoNotFound")
            commit = revision if revision in repository.commits else repository.refs.get(revision, "")
            data = repository.commits.get(commit, {}).get(file)
            if data is None:
                return self._refuse(404, "EntryNotFound")
            start = int(match[1]) if (match := re.match(r"bytes=(\d+)-", self.headers.get("Range") or "")) else 0
            self.send_response(206 if start else 200)
            self.send_header("Content-Length", str(len(data) - start))
            self.send_header("ETag", f'"{hashlib.sha1(data).hexdigest()}"')
            self.send_header("X-Repo-Commit", commit)
            if start:
                self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
            self.end_headers()
            if self.command == "HEAD":
                return None
            if file in hub.cut:
                self.wfile.write(data[start : len(data) // 2])
                self.close_connection = True
                return None
            self.wfile.write(data[start:])
            return None

        def _json(self, data: Any, code: int = 200) -> None:
            body = json.dumps(data).encode()
            self.send_response(code)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def _refuse(self, code: int, reason: str | None) -> None:
            self.send_response(code)
            if reason:
                self.send_header("X-Error-Code", reason)
            self.send_header("Content-Length", "2")
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(b"{}")

    return Handler
