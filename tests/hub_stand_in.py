"""A Hugging Face Hub of one machine: the four calls that huggingface_hub makes to fetch a repository.

It can refuse as the Hub does (X-Error-Code), and cut connections. Xet is never offered.
"""

import hashlib
import json
import os
import socket
import struct
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Self
from urllib.parse import unquote, urlsplit

WAIT_S = 20  # a test that hangs fails instead


@dataclass
class Repository:
    """Files by path, one commit. `refusal` is what the Hub answers: (status, code, message)."""

    files: dict[str, bytes]
    revisions: tuple[str, ...] = ("main",)
    refusal: tuple[int, str, str] | None = None
    is_listed: bool = True  # a gated repository shows its list of files to everybody, a private one does not

    @property
    def commit(self) -> str:
        return hashlib.sha1(b"".join(sorted(self.files.values()))).hexdigest()


@dataclass
class Cut:
    """Close the connection after `after` bytes of a file, once."""

    after: int
    is_reset: bool = False  # RST, which huggingface_hub does not try again, for FIN
    behind: frozenset[str] = frozenset()  # wait until the content of these was asked for


@dataclass(frozen=True)
class Request:
    method: str
    path: str
    range: str | None
    token: str | None


@dataclass
class HubStandIn:
    """Use as a context manager. Everything asked for is in `requests`."""

    repositories: dict[str, Repository] = field(default_factory=dict)
    cuts: dict[str, Cut] = field(default_factory=dict)  # by file
    requests: list[Request] = field(default_factory=list)
    changed: threading.Condition = field(default_factory=threading.Condition)

    def __enter__(self) -> Self:
        handler = type("Handler", (_Handler,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,))
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}"

    def fetched(self) -> list[str]:
        """Names of the files whose content was asked for, in alphabetical order."""
        return sorted(r.path.rpartition("/")[2] for r in self.requests if self._is_content(r))

    def ranges(self, name: str) -> list[str | None]:
        """The Range header of each request for a file's content."""
        return [r.range for r in self.requests if self._is_content(r) and r.path.endswith(f"/{name}")]

    def wait_for_content_of(self, names: frozenset[str]) -> None:
        with self.changed:
            assert self.changed.wait_for(lambda: names <= set(self.fetched()), WAIT_S)

    @staticmethod
    def _is_content(request: Request) -> bool:
        return request.method == "GET" and "/resolve/" in request.path


class _Handler(BaseHTTPRequestHandler):
    hub: HubStandIn
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def log_message(self, format: str, *args: object) -> None:
        pass

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        token = (self.headers["Authorization"] or "").removeprefix("Bearer ") or None
        with self.hub.changed:
            self.hub.requests.append(Request(self.command, path, self.headers["Range"], token))
            self.hub.changed.notify_all()
        is_api = path.startswith("/api/models/")
        names = path.removeprefix("/api/models" if is_api else "").split("/")[1:]
        repository = self.hub.repositories.get("/".join(names[:2]))
        if repository is None:
            return self._refuse(404, "RepoNotFound", "Repository not found")
        if repository.refusal is not None and not (is_api and repository.is_listed):
            return self._refuse(*repository.refusal)
        revision, rest = names[3], "/".join(names[4:])
        if revision not in (*repository.revisions, repository.commit):
            return self._refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        if not is_api:
            return self._send_file(repository, rest)
        if names[2] == "tree":
            return self._send_json(
                [
                    {
                        "type": "file",
                        "path": path,
                        "size": len(content),
                        "oid": hashlib.sha1(content).hexdigest(),
                    }
                    for path, content in repository.files.items()
                ]
            )
        return self._send_json({"id": "/".join(names[:2]), "sha": repository.commit})

    def _refuse(self, status: int, code: str, message: str) -> None:
        self._send_head(status, 0, {"X-Error-Code": code, "X-Error-Message": message})

    def _send_json(self, content: object) -> None:
        body = json.dumps(content).encode()
        self._send_head(200, len(body), {"Content-Type": "application/json"})
        self.wfile.write(body)

    def _send_file(self, repository: Repository, name: str) -> None:
        content = repository.files[name]
        start = int((self.headers["Range"] or "bytes=0-").removeprefix("bytes=").rstrip("-"))
        tag = hashlib.sha256(content).hexdigest()
        headers = {"ETag": f'"{tag}"', "X-Repo-Commit": repository.commit, "Accept-Ranges": "bytes"}
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        self._send_head(206 if start else 200, len(content) - start, headers)
        if self.command == "HEAD":
            return
        cut = self.hub.cuts.pop(name, None)
        if cut is None:
            self.wfile.write(content[start:])
            return
        self.hub.wait_for_content_of(cut.behind)
        self.wfile.write(content[start : cut.after])
        self.close_connection = True
        if cut.is_reset:  # no time to linger: the kernel sends RST instead of FIN
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            os.close(self.connection.detach())

    def _send_head(self, status: int, length: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(length)}.items():
            self.send_header(key, value)
        self.end_headers()
