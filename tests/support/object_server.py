"""A server on loopback that speaks as much of S3 as reading takes: objects, parts of them, ListObjectsV2.

The same objects are there without S3, as a web server has them: /BUCKET/KEY.
"""

from __future__ import annotations

import re
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, quote, unquote, urlparse
from xml.sax.saxutils import escape

_PAGE = 7  # objects a page


class _Server(ThreadingHTTPServer):
    def handle_error(self, request: Any, client_address: Any) -> None:
        """Whoever asked has gone."""


class ObjectServer:
    """`buckets`: their objects by key. key: what requests must be signed with; "" for none. `asked`: keys of objects.

    `broken`: answers 500 to everything. `slow`: seconds before each answer.
    """

    def __init__(self, key: str = "") -> None:
        self.buckets: dict[str, dict[str, bytes]] = {}
        self.key, self.asked, self.broken, self.slow = key, list[str](), False, 0.0
        self._server = _Server(("127.0.0.1", 0), _handler(self))
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def put(self, bucket: str, folder: Path, prefix: str) -> None:
        """All files of a folder."""
        files = [file for file in sorted(folder.rglob("*")) if file.is_file()]
        objects = self.buckets.setdefault(bucket, {})
        objects |= {f"{prefix}/{file.relative_to(folder).as_posix()}": file.read_bytes() for file in files}

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


def _handler(server: ObjectServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            time.sleep(server.slow)
            url = urlparse(self.path)
            bucket, _, key = unquote(url.path).lstrip("/").partition("/")
            if server.broken:
                self._answer(500, b"")
            elif server.key and f"Credential={server.key}/" not in self.headers.get("Authorization", ""):
                self._answer(403, b"<Error><Code>AccessDenied</Code></Error>")
            elif bucket not in server.buckets:
                self._answer(404, b"<Error><Code>NoSuchBucket</Code></Error>")
            elif not key:
                self._list(server.buckets[bucket], {name: one[0] for name, one in parse_qs(url.query).items()})
            elif key not in server.buckets[bucket]:
                self._answer(404, b"<Error><Code>NoSuchKey</Code></Error>")
            else:
                server.asked.append(key)
                self._object(server.buckets[bucket][key])

        do_HEAD = do_GET

        def _list(self, objects: dict[str, bytes], query: dict[str, str]) -> None:
            after = query.get("continuation-token", "")
            keys = [key for key in sorted(objects) if key.startswith(query.get("prefix", "")) and key > after]
            page, more = keys[:_PAGE], len(keys) > _PAGE
            entries = "".join(
                f"<Contents><Key>{escape(key)}</Key><Size>{len(objects[key])}</Size><ETag>{hash(objects[key])}</ETag>"
                "<LastModified>2026-01-01T00:00:00.000Z</LastModified></Contents>"
                for key in page
            )
            token = f"<NextContinuationToken>{escape(page[-1])}</NextContinuationToken>" if more else ""
            truncated = str(more).lower()
            body = f"<ListBucketResult><IsTruncated>{truncated}</IsTruncated>{token}{entries}</ListBucketResult>"
            self._answer(200, body.encode())

        def _object(self, content: bytes) -> None:
            wanted = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", ""))
            if wanted is None:
                self._answer(200, content)
                return
            n = len(content)
            first = int(wanted[1]) if wanted[1] else n - int(wanted[2])
            last = min(n - 1, int(wanted[2])) if wanted[1] and wanted[2] else n - 1
            self._answer(206, content[first : last + 1], {"Content-Range": f"bytes {first}-{last}/{n}"})

        def _answer(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
            self.send_response(status)
            common = {"Content-Length": str(len(body)), "Last-Modified": "Thu, 01 Jan 2026 00:00:00 GMT"}
            for name, value in {**common, "ETag": quote(str(hash(body))), **(headers or {})}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            pass

    return Handler
