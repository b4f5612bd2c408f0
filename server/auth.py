"""API keys: a file with one per line, read again when it changes."""

import hmac
import logging
import os
from pathlib import Path

from cabochon.engine.errors import ConfigError
from cabochon.server.errors import ApiError

logger = logging.getLogger(__name__)

OPEN = frozenset(("/", "/docs", "/openapi.json", "/health", "/-/healthz", "/version", "/metrics"))


class ApiKeys:
    """No file: everybody may."""

    def __init__(self, path: str | None) -> None:
        """Raises ConfigError if the file cannot be read or has no key."""
        self._path = Path(path) if path is not None else None
        self._seen: tuple[int, int, int] | None = None
        self._keys: list[bytes] = []
        if self._path is not None:
            try:
                self._read()
            except OSError as error:
                raise ConfigError(f"api_key_file must be a file with keys: {error}: write it") from None
            if not self._keys:
                raise ConfigError(f"api_key_file must have a key per line, {path} has none: add one")

    def check(self, path: str, authorization: str | None) -> None:
        """Raises ApiError (401) if `path` is not open to everybody and the header has no known key.

        path: as routes see it, without the prefix that the app is mounted at.
        """
        if self._path is None or path in OPEN:
            return
        given = given_key(authorization)
        # Every key is compared, and in constant time: how long it takes tells nothing.
        if not sum([hmac.compare_digest(given, key) for key in self._current()]):
            raise ApiError(
                "the Authorization header must be `Bearer KEY` with a key of this server: ask its operator",
                status=401,
                type="authentication_error",
                code="invalid_api_key",
            )

    def _current(self) -> list[bytes]:
        try:
            self._read()
        except OSError as error:  # gone for a moment while it is replaced: the keys known so far hold
            logger.warning("api key file cannot be read, keys=%d hold error=%s", len(self._keys), error)
        return self._keys

    def _read(self) -> None:
        assert self._path is not None
        status = os.stat(self._path)
        seen = (status.st_ino, status.st_mtime_ns, status.st_size)
        if seen == self._seen:
            return
        lines = (line.strip() for line in self._path.read_bytes().removeprefix(b"\xef\xbb\xbf").splitlines())
        keys = [line for line in lines if line and not line.startswith(b"#")]
        self._seen = seen
        if keys or not self._keys:
            self._keys = keys
        else:
            logger.warning("api key file has no key, keys=%d hold: add one", len(self._keys))


def given_key(authorization: str | None) -> bytes:
    """The key of `Bearer KEY`; empty if there is none."""
    scheme, _, key = (authorization or "").partition(" ")
    return key.strip().encode("latin-1") if scheme.lower() == "bearer" else b""  # as headers are decoded
