"""The engine in a child process, as the server sees it: requests in, one message per step back.

All methods belong to one asyncio event loop. Never imports torch. A dead, hung or stopped engine ends every
open request and question with EngineDead; nothing is restarted here: weights and cache are gone with it.
"""

import asyncio
import dataclasses
import logging
import os
import socket
import subprocess
import sys
import time
from collections import deque
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import NamedTuple

from cabochon.engine import errors
from cabochon.engine.channel import FrameReader, Message, encode
from cabochon.engine.config import EngineConfig
from cabochon.engine.engine import Engine
from cabochon.engine.errors import Aborted, EngineDead, EngineError, RequestError
from cabochon.engine.messages import (
    Abort,
    AdapterInfo,
    AdapterReply,
    EngineInfo,
    EngineStats,
    Failed,
    GenerateRequest,
    LoadAdapter,
    Loading,
    Log,
    Publish,
    Ready,
    Refusal,
    RequestOutput,
    Start,
    StepOutput,
    Submit,
    UnloadAdapter,
)

logger = logging.getLogger(__name__)

Progress = Callable[[int, int], None]  # bytes loaded, bytes in total
StepListener = Callable[[StepOutput], None]
EXIT_TIMEOUT_S = 5.0
OLD_S = 0.5  # of a snapshot, while requests are open: longer than most steps


class _Stream(AsyncIterator[RequestOutput]):
    """Outputs of one request. Ends after the last one; closing it early aborts the request.

    For one reader: asyncio.Queue costs three times as much, for every token.
    """

    def __init__(self, request_id: str, abort: Callable[[str], None]) -> None:
        self.request_id = request_id
        self._abort = abort
        self._items: deque[RequestOutput | EngineError] = deque()
        self._waiter: asyncio.Future[None] | None = None
        self._is_ended = False

    def put(self, item: RequestOutput | EngineError) -> None:
        self._items.append(item)
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def __anext__(self) -> RequestOutput:
        if self._is_ended:
            raise StopAsyncIteration
        if not self._items:
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        item = self._items.popleft()
        if isinstance(item, EngineError):
            self._is_ended = True
            raise item
        self._is_ended = item.finish_reason is not None
        return item

    async def aclose(self) -> None:
        if not self._is_ended:
            self._is_ended = True
            self._abort(self.request_id)


class _Question(NamedTuple):
    """About an adapter, and who waits for the engine's answer."""

    message: LoadAdapter | UnloadAdapter
    answer: asyncio.Future[AdapterInfo | None]


class EngineClient(Engine):
    """Spawns the engine process with `start`, ends it with `shutdown`."""

    def __init__(self, config: EngineConfig, model_dir: Path, *, step_timeout_s: float = 60.0) -> None:
        """step_timeout_s: work is pending and no step ends for that long: the engine counts as hung."""
        self._config = config
        self._model_dir = model_dir
        self._step_timeout_s = step_timeout_s
        self._streams: dict[str, _Stream] = {}  # by id on the wire: outputs of an ended request find nobody
        self._wire_ids: dict[str, str] = {}  # of open requests
        self._num_submitted = 0
        self._questions: dict[int, _Question] = {}  # by reply_to
        self._num_asked = 0
        self._stats = EngineStats()
        self._info: EngineInfo | None = None
        self._dead_reason: str | None = None
        self._last_message_s = 0.0
        self._process: subprocess.Popen[bytes] | None = None
        self._writer: asyncio.StreamWriter | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._on_step: list[StepListener] = []

    @property
    def info(self) -> EngineInfo:
        if self._info is None:
            raise EngineDead("the engine must be ready, it is still loading: wait for start()")
        return self._info

    @property
    def pid(self) -> int:
        """Process id of the engine."""
        assert self._process is not None
        return self._process.pid

    def on_step(self, listener: StepListener) -> None:
        """Call `listener` with every step's message (for metrics)."""
        self._on_step.append(listener)

    async def start(self, on_progress: Progress | None = None) -> EngineInfo:
        """Spawn the engine and load the model. Raises what the engine raised, or EngineDead."""
        ours, theirs = socket.socketpair()
        command = [sys.executable, "-m", "cabochon.engine.process", str(theirs.fileno())]
        # A session of its own: Ctrl-C at the terminal must reach the server alone, which drains.
        self._process = subprocess.Popen(
            command, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, start_new_session=True
        )
        theirs.close()
        reader, self._writer = await asyncio.open_unix_connection(sock=ours)
        self._send(Start(config=self._config, model_dir=str(self._model_dir)))
        frames = FrameReader()
        pending = await self._wait_until_ready(reader, frames, on_progress)
        self._last_message_s = time.monotonic()
        self._tasks = [
            asyncio.create_task(self._read(reader, frames, pending)),
            asyncio.create_task(self._watch()),
        ]
        return self.info

    def submit(self, request: GenerateRequest) -> AsyncIterator[RequestOutput]:
        stream = _Stream(request.request_id, self.abort)
        if self._dead_reason is not None:
            stream.put(EngineDead(self._dead_reason))
        elif request.request_id in self._wire_ids:
            stream.put(
                RequestError(f"request ids must be unique, {request.request_id} is running: send another")
            )
        else:
            self._num_submitted += 1
            wire_id = str(self._num_submitted)
            # First, so that what cannot be encoded leaves nothing behind
            self._send(Submit(request=dataclasses.replace(request, request_id=wire_id)))
            if not self._streams:
                self._last_message_s = time.monotonic()  # it slept: the time to its next step starts now
            self._streams[wire_id] = stream
            self._wire_ids[request.request_id] = wire_id
        return stream

    def publish(self, request_id: str) -> None:
        if (wire_id := self._wire_ids.get(request_id)) is not None:
            self._send(Publish(request_id=wire_id))

    def abort(self, request_id: str) -> None:
        if (wire_id := self._wire_ids.get(request_id)) is not None:
            self._end(wire_id, Aborted(f"request {request_id} was aborted"))
            self._send(Abort(request_id=wire_id))

    async def load_adapter(self, name: str, path: str, *, replace: bool = False) -> AdapterInfo:
        """As Engine has it. A cancelled load is undone, unless it may have replaced an adapter."""
        info = await self._ask(
            LoadAdapter(reply_to=self._next_question(), name=name, path=path, replace=replace)
        )
        assert info is not None
        return info

    async def unload_adapter(self, name: str) -> None:
        await self._ask(UnloadAdapter(reply_to=self._next_question(), name=name))

    def stats(self) -> EngineStats:
        """The last snapshot; where it is old, requests that it does not know wait: a hung engine looks busy.

        Not at once: a picker that sees each new request waiting for a step would send the next elsewhere,
        away from its pages.
        """
        waiting = len(self._streams) - self._stats.running
        if waiting <= self._stats.waiting or time.monotonic() - self._last_message_s < OLD_S:
            return self._stats
        return dataclasses.replace(self._stats, waiting=waiting)

    def dead_reason(self) -> str | None:
        return self._dead_reason

    async def shutdown(self) -> None:
        self._die("the engine was shut down", is_expected=True)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._tasks = []
        if self._process is not None:
            await asyncio.to_thread(_reap, self._process)

    def _send(self, message: Message) -> None:
        if self._dead_reason is None and self._writer is not None:
            self._writer.write(encode(message))

    def _next_question(self) -> int:
        self._num_asked += 1
        return self._num_asked

    async def _ask(self, message: LoadAdapter | UnloadAdapter) -> AdapterInfo | None:
        if self._dead_reason is not None:
            raise EngineDead(self._dead_reason)
        assert self._info is not None, "the engine is not ready"
        answer: asyncio.Future[AdapterInfo | None] = asyncio.get_running_loop().create_future()
        self._send(message)
        self._questions[message.reply_to] = _Question(message, answer)
        try:
            return await answer
        except asyncio.CancelledError:
            if answer.done() and not answer.cancelled() and answer.exception() is None:
                self._undo(message)  # it was answered and cancelled at once
            raise

    def _hear(self, reply: AdapterReply) -> None:
        self._last_message_s = time.monotonic()
        message, answer = self._questions.pop(reply.reply_to, (None, None))
        if answer is None:
            return
        if reply.refusal is not None:
            if not answer.cancelled():
                answer.set_exception(_refusal_error(reply.refusal))
        elif not answer.cancelled():
            answer.set_result(reply.info)
        else:
            self._undo(message)

    def _undo(self, message: LoadAdapter | UnloadAdapter | None) -> None:
        """Of a cancelled load nobody knows: its name and memory would be lost. No one awaits the answer."""
        if isinstance(message, LoadAdapter) and not message.replace:
            self._send(UnloadAdapter(reply_to=self._next_question(), name=message.name))

    async def _wait_until_ready(
        self, reader: asyncio.StreamReader, frames: FrameReader, on_progress: Progress | None
    ) -> list[Message]:
        """Returns the messages that came after Ready."""
        while True:
            data = await _read_some(reader)
            if not data:
                code = await asyncio.to_thread(_reap, self._process)
                self._die(f"the engine process ended while loading, exit code {code}: its log says why")
                raise EngineDead(self._dead_reason)
            messages = frames.feed(data)
            for index, message in enumerate(messages):
                if isinstance(message, Ready):
                    self._info = message.info
                    return messages[index + 1 :]
                if isinstance(message, Failed):
                    self._die(message.message)
                    raise _as_error(message.error, message.message, None)
                if isinstance(message, Log):
                    _log(message)
                if isinstance(message, Loading) and on_progress is not None:
                    on_progress(message.done_bytes, message.total_bytes)

    async def _read(self, reader: asyncio.StreamReader, frames: FrameReader, messages: list[Message]) -> None:
        while True:
            for message in messages:
                match message:
                    case Log():
                        _log(message)
                    case AdapterReply():
                        self._hear(message)
                    case StepOutput():
                        self._deliver(message)
                    case _:
                        raise AssertionError(f"unexpected {type(message).__name__}")
            data = await _read_some(reader)
            if not data:
                code = await asyncio.to_thread(_reap, self._process)
                self._die(f"the engine process ended, exit code {code}: restart the server")
                return
            messages = frames.feed(data)

    def _deliver(self, step: StepOutput) -> None:
        self._last_message_s = time.monotonic()
        self._stats = step.stats
        for output in step.outputs:
            stream = self._streams.get(output.request_id)
            if stream is not None:
                wire_id, output.request_id = output.request_id, stream.request_id
                if output.finish_reason is None:
                    stream.put(output)
                else:
                    self._end(wire_id, output)
        for refusal in step.refusals:
            if refusal.request_id in self._streams:
                self._end(refusal.request_id, _refusal_error(refusal))
        for listener in self._on_step:
            listener(step)

    def _end(self, wire_id: str, last: RequestOutput | EngineError) -> None:
        stream = self._streams.pop(wire_id)
        del self._wire_ids[stream.request_id]
        stream.put(last)

    async def _watch(self) -> None:
        """A hung or stopped engine does not close its socket: look at the clock."""
        interval_s = min(1.0, self._step_timeout_s / 4)
        while self._dead_reason is None:
            started_s = time.monotonic()
            await asyncio.sleep(interval_s)
            if time.monotonic() - started_s > 2 * interval_s:  # it was this process that stood still
                self._last_message_s = time.monotonic()
            silent_s = time.monotonic() - self._last_message_s
            if self._streams and silent_s > self._step_timeout_s:
                self._die(
                    f"the engine must step every {self._step_timeout_s:g} s while requests are open,"
                    f" it has not for {silent_s:.0f} s: restart the server"
                )

    def _die(self, reason: str, *, is_expected: bool = False) -> None:
        if self._dead_reason is not None:
            return
        self._dead_reason = reason
        if not is_expected:
            logger.error("engine dead open_requests=%d reason=%s", len(self._streams), reason)
        for wire_id in list(self._streams):
            self._end(wire_id, EngineDead(reason))
        for question in self._questions.values():
            if not question.answer.done():
                question.answer.set_exception(EngineDead(reason))
        self._questions.clear()
        if self._writer is not None:
            self._writer.close()
        if self._process is not None and not is_expected:
            self._process.kill()  # SIGKILL ends a stopped process as well


async def _read_some(reader: asyncio.StreamReader) -> bytes:
    """What has arrived; nothing at the end, however it came (a message left unread makes it a reset)."""
    try:
        return await reader.read(1 << 18)
    except ConnectionError:
        return b""


def _reap(process: subprocess.Popen[bytes] | None) -> int | None:
    """Wait for the end, kill after EXIT_TIMEOUT_S. Returns the exit code."""
    if process is None:
        return None
    try:
        return process.wait(EXIT_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        os.kill(process.pid, 9)
        return process.wait()


def _log(line: Log) -> None:
    logging.getLogger(line.logger).log(line.level, "%s", line.text)


def _refusal_error(refusal: Refusal) -> EngineError:
    return _as_error(refusal.error, refusal.message, refusal.param)


def _as_error(name: str, message: str, param: str | None) -> EngineError:
    kind = getattr(errors, name, EngineDead)
    if issubclass(kind, RequestError):
        return kind(message, param)
    return kind(message) if issubclass(kind, EngineError) else EngineDead(message)
