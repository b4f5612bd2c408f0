"""The engine process: `python -m cabochon.engine.process FD`, a child of the server process.

Reads messages from the inherited socket FD between steps, sleeps in it when there is nothing to do, sends one
message per step. Ends when the socket closes or the parent is gone.
"""

import contextlib
import gc
import logging
import os
import select
import signal
import socket
import sys
import threading
import time
from pathlib import Path

from cabochon.engine.channel import FrameReader, Message, encode
from cabochon.engine.core import EngineCore
from cabochon.engine.errors import EngineError, RequestError
from cabochon.engine.load import load_engine
from cabochon.engine.messages import (
    Abort,
    Failed,
    LoadAdapter,
    Loading,
    Log,
    Publish,
    Ready,
    Refusal,
    Start,
    StepOutput,
    Submit,
    UnloadAdapter,
)

logger = logging.getLogger(__name__)

PARENT_CHECK_S = 1.0
PROGRESS_S = 0.1
LISTEN_S = 1.0  # an idle engine looks for new readers of its KV events
YOUNG_OBJECTS = 50_000  # between two looks for cycles


class Inbox:
    """Whole messages from the server, waited for or not. Raises EOFError when the server is gone."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._poll = select.poll()  # select() knows no descriptor beyond 1023
        self._poll.register(sock, select.POLLIN)
        self._reader = FrameReader()

    def drain(self, *, wait: bool, at_most_s: float | None = None) -> list[Message]:
        """All messages that have arrived; with `wait`, at least one, unless none came in at_most_s."""
        messages: list[Message] = []
        wait_ms = None if at_most_s is None else 1000 * at_most_s
        while True:
            if not self._poll.poll(wait_ms if wait and not messages else 0):
                return messages
            data = self._sock.recv(1 << 18)
            if not data:
                raise EOFError
            messages += self._reader.feed(data)


def serve(sock: socket.socket) -> None:
    """Load what the first message says, then step until the socket closes."""
    inbox = Inbox(sock)
    start = inbox.drain(wait=True)[0]
    assert isinstance(start, Start)
    try:
        core, info = load_engine(start.config, Path(start.model_dir), _progress(sock), expects_grammars=True)
    except EngineError as error:
        sock.sendall(encode(Failed(error=type(error).__name__, message=str(error))))
        return
    settle_collector()
    sock.sendall(encode(Ready(info=info)))
    _run(core, inbox, sock)


def settle_collector() -> None:
    """The loaded engine is permanent: later collections need not walk it.

    A step of 512 requests makes a thousand objects that live until it is told, so Python's threshold of 700
    had each step collected, and now and then all of them: 9 ms. Counting frees them; cycles are few.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(YOUNG_OBJECTS)


def _run(core: EngineCore, inbox: Inbox, sock: socket.socket) -> None:
    is_ready = False
    listen_s = None if core.kv_events is None else LISTEN_S
    while True:
        messages = inbox.drain(wait=is_ready and not core.has_work, at_most_s=listen_s)
        if not messages and not core.has_work:
            is_ready = not core.get_ready()
            continue
        refusals = [refusal for message in messages if (refusal := _handle(core, message))]
        outputs, failed = core.step()
        sock.sendall(encode(StepOutput(outputs=outputs, refusals=refusals + failed, stats=core.stats())))
        for reply in core.adapters.take_replies():
            sock.sendall(encode(reply))


def _handle(core: EngineCore, message: Message) -> Refusal | None:
    match message:
        case Submit(request=request):
            try:
                core.add(request)
            except RequestError as error:
                return Refusal.of(request.request_id, error)
        case Abort(request_id=request_id):
            core.abort(request_id)
        case Publish(request_id=request_id):
            core.publish(request_id)
        case LoadAdapter():
            core.load_adapter(message)
        case UnloadAdapter():
            core.unload_adapter(message)
        case _:
            raise AssertionError(f"unexpected {type(message).__name__}")
    return None


class _progress:
    """Tells the server how far loading is, a few times a second."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._last_s = 0.0

    def __call__(self, done_bytes: int, total_bytes: int) -> None:
        now = time.monotonic()
        if now - self._last_s >= PROGRESS_S or done_bytes == total_bytes:
            self._last_s = now
            self._sock.sendall(encode(Loading(done_bytes=done_bytes, total_bytes=total_bytes)))


class _LogHandler(logging.Handler):
    """Sends log lines to the server."""

    def __init__(self, sock: socket.socket) -> None:
        super().__init__()
        self.setFormatter(logging.Formatter())  # the message alone: basicConfig would add level and name
        self._sock = sock

    def emit(self, record: logging.LogRecord) -> None:
        with contextlib.suppress(OSError):  # the server is gone, and so are we, soon
            self._sock.sendall(
                encode(Log(level=record.levelno, logger=record.name, text=self.format(record)))
            )


def _end_with_parent() -> None:
    """A dead server closes the socket, but a step or a load may be long: look at the parent as well."""
    parent = os.getppid()
    while os.getppid() == parent:
        time.sleep(PARENT_CHECK_S)
    os._exit(1)


def main() -> None:
    sock = socket.socket(fileno=int(sys.argv[1]))
    logging.basicConfig(level=logging.INFO, handlers=[_LogHandler(sock)])
    for number in (signal.SIGINT, signal.SIGTERM):  # the server's: it drains, then closes the socket
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        serve(sock)
    except (EOFError, BrokenPipeError, ConnectionResetError):
        logger.info("server is gone, engine ends")
    except Exception:
        logger.exception("engine failed")
        sys.exit(1)


if __name__ == "__main__":
    main()
