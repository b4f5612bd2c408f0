"""The engine's side of its grammar processes: outputs in, masks out, nobody waits.

A grammar has a process, an output in it has a slot: the place of its mask in memory that all share. All
methods belong to the thread that steps. Replies are taken when the engine looks for them; orders never block,
for they are small and the other side always reads. Knows nothing of rows.
"""

import contextlib
import enum
import heapq
import json
import logging
import mmap
import os
import select
import socket
import subprocess
import sys
import time
import weakref
from collections import OrderedDict, deque
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cabochon.engine.grammar_wire import (
    Ask,
    Order,
    Reply,
    Told,
    encode_order,
    grammar_file,
    take_replies,
)
from cabochon.engine.sampling_params import Grammar

logger = logging.getLogger(__name__)

KEPT = 64  # processes; one that nobody uses ends when another is needed
COMPILING = 4  # at once, so that the others need not wait for one that takes seconds
SLOTS = 4096  # outputs that are bound at once, waiting ones included: 128 MiB of address space
ENDED = {  # by whether it was compiled
    False: "must compile within 5 s of CPU time and 1 GiB, it has not: simplify it",
    True: "must give each mask within 10 s and 1 GiB, it has not: simplify it",
}


class State(enum.Enum):
    """Of a matcher."""

    COMPILING = enum.auto()
    WAITING = enum.auto()  # for its mask
    READY = enum.auto()
    COMPLETE = enum.auto()  # nothing may follow
    FAILED = enum.auto()


class Matcher:
    """How far one output is in its grammar."""

    def __init__(self, owner: "Grammars", request_id: str, grammar: Grammar) -> None:
        self._owner = owner
        self.request_id = request_id
        self.grammar = grammar
        self.state = State.COMPILING
        self.error = ""  # why it failed
        self.slot: int | None = None

    @property
    def is_late(self) -> bool:
        """Whether its next mask is still to come."""
        return self.state in (State.COMPILING, State.WAITING)

    def wait(self, until_s: float) -> bool:
        """Returns whether it is no longer late, until_s (monotonic) at most."""
        while self.is_late and (left_s := until_s - time.monotonic()) > 0:
            self._owner.poll(left_s)
        return not self.is_late

    def mask(self) -> NDArray[np.bool_]:
        """[V], the tokens that may come next. Only while it is READY."""
        assert self.state is State.READY, self.state
        return self._owner.mask(self)

    def advance(self, token_id: int) -> None:
        """Take a token that the mask allowed; the next mask is begun at the next flush or poll."""
        assert self.state is State.READY, self.state
        self.state = State.WAITING
        self._owner.advance(self, token_id)


class _Process:
    """Of one grammar, as the engine sees it."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.buffer = bytearray()  # what it says
        self.orders = bytearray()  # not sent yet
        self.is_compiled = False
        self.by_slot: dict[int, Matcher] = {}
        self.dropping: set[int] = set()  # slots it may still write into

    @property
    def is_idle(self) -> bool:
        return self.is_compiled and not self.by_slot and not self.dropping

    def flush(self) -> None:
        """Send the orders. A process that is gone says so by its end of file."""
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self.sock.sendall(self.orders)
        self.orders.clear()


class Grammars:
    """Follows the grammars of all requests, with the tokenizer in a directory."""

    def __init__(self, model_dir: Path, vocab_size: int, eos_ids: list[int]) -> None:
        """Starts nothing."""
        self._vocab_size = vocab_size
        self._mask_bytes = (vocab_size + 31) // 32 * 4
        setup = {"vocab_size": vocab_size, "eos_ids": eos_ids, "mask_bytes": self._mask_bytes}
        self._setup = json.dumps({"model_dir": str(model_dir), **setup})
        self._host: _Host | None = None
        self._processes: OrderedDict[Grammar, _Process] = OrderedDict()  # the least recently asked for first
        self._by_fd: dict[int, tuple[Grammar, _Process]] = {}
        self._poll = select.poll()
        self._waiting: deque[Matcher] = deque()  # for a slot or a process
        self._free_slots = list(range(SLOTS))  # a heap: low ones again and again, their memory is there
        self._completed: list[Matcher] = []
        self._to_flush: set[_Process] = set()

    def start(self) -> None:
        """Have the tokenizer read in the background, before anybody asks. Without it, the first one waits."""
        if self._host is None:
            self._host = _Host(self._setup, SLOTS * self._mask_bytes)
            weakref.finalize(self, self._host.end)  # not by the caller: offline use has no end

    def open(self, request_id: str, grammar: Grammar) -> Matcher:
        """A matcher at the grammar's start, COMPILING until a later poll."""
        self.start()
        matcher = Matcher(self, request_id, grammar)
        self._waiting.append(matcher)
        self._place_waiting()
        return matcher

    def close(self, matcher: Matcher) -> None:
        """Its output is over. May be called in any state, once."""
        if matcher.slot is None:
            if matcher in self._waiting:
                self._waiting.remove(matcher)
            return
        process = self._processes.get(matcher.grammar)
        if process is None or process.by_slot.pop(matcher.slot, None) is None:
            return  # it failed, and its process ended
        if process.is_compiled:
            process.dropping.add(matcher.slot)
            self._order(process, Order(Ask.DROP, matcher.slot))
        else:
            heapq.heappush(self._free_slots, matcher.slot)

    def poll(self, timeout_s: float = 0.0) -> None:
        """Take what the processes say, the first of it within timeout_s."""
        if not self._by_fd:
            if timeout_s:
                time.sleep(timeout_s)
            return
        for fd, _ in self._poll.poll(timeout_s * 1000):
            grammar, process = self._by_fd[fd]
            try:
                data = process.sock.recv(1 << 16)
            except ConnectionResetError:
                data = b""
            if not data:
                self._end(grammar, process, ENDED[process.is_compiled])
                continue
            process.buffer += data
            for reply in take_replies(process.buffer):
                self._take(grammar, process, reply)
        if self._waiting:
            self._place_waiting()
        self.flush()

    def take_completed(self) -> list[Matcher]:
        """Those whose output has become complete since the last call."""
        completed, self._completed = self._completed, []
        return completed

    def mask(self, matcher: Matcher) -> NDArray[np.bool_]:
        """[V], a copy."""
        assert self._host is not None
        assert matcher.slot is not None
        bits = self._host.masks[matcher.slot * self._mask_bytes :][: self._mask_bytes]
        return np.unpackbits(bits, bitorder="little", count=self._vocab_size).view(np.bool_)

    def advance(self, matcher: Matcher, token_id: int) -> None:
        """Matcher.advance."""
        assert matcher.slot is not None
        self._order(self._processes[matcher.grammar], Order(Ask.ADVANCE, matcher.slot, token_id))

    def flush(self) -> None:
        """Send what was ordered since: a message for all outputs of a grammar instead of one each."""
        for process in self._to_flush:
            process.flush()
        self._to_flush.clear()

    def _order(self, process: _Process, order: Order) -> None:
        process.orders += encode_order(order)
        self._to_flush.add(process)

    def _place_waiting(self) -> None:
        """Slots and processes for those that wait, in order, as far as there are any."""
        for matcher in list(self._waiting):
            if not self._free_slots:
                return
            process = self._processes.get(matcher.grammar) or self._fork(matcher.grammar)
            if process is None:
                continue
            self._waiting.remove(matcher)
            self._processes.move_to_end(matcher.grammar)
            matcher.slot = heapq.heappop(self._free_slots)
            process.by_slot[matcher.slot] = matcher
            if process.is_compiled:
                self._begin(process, matcher)

    def _begin(self, process: _Process, matcher: Matcher) -> None:
        assert matcher.slot is not None
        matcher.state = State.WAITING
        self._order(process, Order(Ask.BEGIN, matcher.slot))

    def _fork(self, grammar: Grammar) -> _Process | None:
        """A process for a grammar, which begins to compile; None if there are too many."""
        if sum(not process.is_compiled for process in self._processes.values()) >= COMPILING:
            return None
        if len(self._processes) >= KEPT:
            idle = next(((g, p) for g, p in self._processes.items() if p.is_idle), None)
            if idle is None:
                return None
            self._forget(*idle)
        assert self._host is not None
        process = _Process(self._host.fork(grammar))
        self._processes[grammar] = process
        self._by_fd[process.sock.fileno()] = (grammar, process)
        self._poll.register(process.sock, select.POLLIN)
        return process

    def _forget(self, grammar: Grammar, process: _Process) -> None:
        """Closing its socket ends it."""
        del self._processes[grammar], self._by_fd[process.sock.fileno()]
        self._to_flush.discard(process)
        self._poll.unregister(process.sock)
        process.sock.close()

    def _end(self, grammar: Grammar, process: _Process, error: str) -> None:
        """It will not answer any more."""
        self._forget(grammar, process)
        for slot in (*process.by_slot, *process.dropping):
            heapq.heappush(self._free_slots, slot)
        for matcher in process.by_slot.values():
            matcher.state, matcher.error = State.FAILED, error

    def _take(self, grammar: Grammar, process: _Process, reply: Reply) -> None:
        told, slot, reason = reply
        match told:
            case Told.COMPILED:
                process.is_compiled = True
                for matcher in process.by_slot.values():
                    self._begin(process, matcher)
            case Told.REFUSED:
                self._end(grammar, process, reason)
            case Told.DROPPED:
                process.dropping.remove(slot)
                heapq.heappush(self._free_slots, slot)
            case _ if slot in process.by_slot:  # or it was closed meanwhile
                self._move(process.by_slot[slot], told, reason)

    def _move(self, matcher: Matcher, told: Told, reason: str) -> None:
        if told == Told.MASKED:
            matcher.state = State.READY
        elif told == Told.COMPLETE:
            matcher.state = State.COMPLETE
            self._completed.append(matcher)
        else:
            matcher.state = State.FAILED
            matcher.error = f"must stay within its limits, it became too complex ({reason}): simplify it"


class _Host:
    """The process that has read the tokenizer and forks the others, and the memory of all masks."""

    def __init__(self, setup: str, masks_bytes: int) -> None:
        self._setup = setup
        self._masks_fd = os.memfd_create("masks")
        os.ftruncate(self._masks_fd, masks_bytes)  # a page becomes real when it is written
        self.masks = np.frombuffer(mmap.mmap(self._masks_fd, masks_bytes), np.uint8)
        self._sockets: list[socket.socket] = []  # kept until closed: garbage must not hold open ones
        self._spawn()

    def fork(self, grammar: Grammar) -> socket.socket:
        """To a process that compiles the grammar, or will when the tokenizer is read."""
        if (code := self._process.poll()) is not None:
            logger.warning("grammar process ended code=%d, starting another", code)
            self._control.close()
            self._spawn()
        ours, theirs = socket.socketpair()
        fd = grammar_file(grammar)
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # it is gone: so is `theirs`
            socket.send_fds(self._control, [b"+"], [theirs.fileno(), fd])
        os.close(fd)
        theirs.close()
        self._sockets = [sock for sock in self._sockets if sock.fileno() >= 0]  # the others are closed
        self._sockets.append(ours)
        return ours

    def end(self) -> None:
        """With all that it has forked."""
        self._control.close()
        for sock in self._sockets:
            sock.close()
        os.close(self._masks_fd)
        self._process.kill()
        self._process.wait()

    def _spawn(self) -> None:
        self._control, theirs = socket.socketpair()
        fds = [theirs.fileno(), self._masks_fd]
        command = [sys.executable, "-m", "cabochon.engine.grammar_process", *map(str, fds), self._setup]
        self._process = subprocess.Popen(command, pass_fds=fds, stdin=subprocess.DEVNULL)
        theirs.close()
