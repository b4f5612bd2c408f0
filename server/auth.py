"""API keys: a file with one per line, read again when it changes."""

import hmac
import os
from pathlib import Path

from cabochon.server.errors import ApiError

GUARDED = ("/v1/", "/tokenize", "/detokenize")  # probes, /metrics, /version and static pages are open


class ApiKeys:
    """No file: everybody may."""

    def __init__(self, path: str | None) -> None:
        self._path = Path(path) if path else None
        self._seen: tuple[int, int] | None = None
        self._keys: list[bytes] = []

    def check(self, path: str, authorization: str | None) -> None:
        """Raises ApiError (401) if `path` is guarded and the header has no known key."""
        if self._path is None or not path.startswith(GUARDED):
            return
        given = (authorization or "").removeprefix("Bearer ").encode()
        # Every key is compared, and in constant time: how long it takes tells nothing.
        if not sum(hmac.compare_digest(given, key) for key in self._read()):
            raise ApiError(
                "the Authorization header must be `Bearer KEY` with a key of this server: ask its operator",
                status=401,
                type="authentication_error",
                code="invalid_api_key",
            )

    def _read(self) -> list[bytes]:
        assert self._path is not None
        status = os.stat(self._path)
        seen = (status.st_mtime_ns, status.st_size)
        if seen != self._seen:
            lines = (line.strip() for line in self._path.read_bytes().splitlines())
            self._keys = [line for line in lines if line and not line.startswith(b"#")]
            self._seen = seen
        return self._keys
