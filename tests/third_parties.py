"""Keeps clients under test from calling anybody but this machine: prices, telemetry, traces, data sets."""

import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

QUIET = {
    "LITELLM_LOCAL_MODEL_COST_MAP": "True",
    "LANGSMITH_TRACING": "false",
    "LANGCHAIN_TRACING_V2": "false",
    "HF_DATASETS_OFFLINE": "1",
}


@contextmanager
def no_third_parties() -> Iterator[None]:
    """Clients are told to be quiet. One that calls all the same is refused, and told of at the end.

    Raises AssertionError with the hosts that somebody tried to reach or to resolve.
    """
    called: list[Any] = []
    connect, getaddrinfo = socket.socket.connect, socket.getaddrinfo

    def check(host: Any) -> None:
        if host not in ("127.0.0.1", "localhost"):
            called.append(host)  # the error may be swallowed
            raise OSError("only this machine may be called")

    def checked_connect(self: socket.socket, address: Any) -> None:
        if self.family != socket.AF_UNIX:
            check(address[0])
        connect(self, address)

    def checked_getaddrinfo(host: Any, *args: Any, **options: Any) -> Any:
        check(host)
        return getaddrinfo(host, *args, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", checked_connect)
        patch.setattr(socket, "getaddrinfo", checked_getaddrinfo)
        for name, value in QUIET.items():
            patch.setenv(name, value)
        yield
    assert called == [], f"clients called {called}"
