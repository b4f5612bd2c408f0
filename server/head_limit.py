"""A limit on request heads: httptools collects a URL or header of any length, before a key is asked for."""

from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

MAX_HEAD_BYTES = 64 * 2**10
ANSWER = (
    b"HTTP/1.1 431 Request Header Fields Too Large\r\n"
    b"Content-Type: application/json\r\nConnection: close\r\n\r\n"
    b'{"error":{"message":"the head of a request must have at most 65536 bytes: send less",'
    b'"type":"invalid_request_error","param":null,"code":"head_too_large"}}'
)


class LimitedHead(HttpToolsProtocol):
    """Uvicorn's protocol that closes a connection whose request head does not end in time."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._is_in_head = True
        self._head_bytes = 0
        self._read_bytes = 0

    def data_received(self, data: bytes) -> None:
        """Reads that end inside a head count; the one that ended the message before it does not."""
        self._read_bytes = len(data)
        super().data_received(data)
        self._head_bytes = self._head_bytes + len(data) if self._is_in_head else 0
        if self._head_bytes > MAX_HEAD_BYTES and not self.transport.is_closing():
            self.transport.write(ANSWER)
            self.transport.close()

    def on_headers_complete(self) -> None:
        """The parser's call: a body follows, or the next request."""
        self._is_in_head = False
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        """The parser's call: the next bytes are a head again."""
        self._is_in_head = True
        self._head_bytes = -self._read_bytes
        super().on_message_complete()
