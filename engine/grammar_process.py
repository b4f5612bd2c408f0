"""Grammar processes: `python -m cabochon.engine.grammar_process CONTROL_FD MASKS_FD SETUP`, of the engine.

The first one reads the tokenizer, then forks a process for each grammar that the engine asks for; memory is
shared until written, so one costs 4 MB and 10 ms. It compiles and follows its grammar, for all outputs of it.
A process, because llguidance does not bound all it does: {"multipleOf": 9999991} compiles for minutes, a
chain of 5,000 references overflows the stack, to copy `(a{1000}){1000}` takes the GIL for 0.8 s. Here the
kernel ends what takes too much, and only requests of that grammar notice. Loads neither torch nor numpy.
"""

import contextlib
import ctypes
import gc
import json
import mmap
import os
import resource
import select
import signal
import socket
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from llguidance import LLMatcher

from cabochon.engine.errors import BadGrammar
from cabochon.engine.grammar import DigitRun, Vocabulary, compile_grammar, read_vocabulary, reason
from cabochon.engine.grammar_wire import Ask, Order, Reply, Told, encode_reply, read_grammar, take_orders
from cabochon.engine.sampling_params import Grammar

COMPILE_CPU_S = 5.0  # 20,000 choices take 0.6 s, 5,000 optional properties 2 s
COMPILE_S = 20.0  # by the clock
MASK_S = 10.0  # without any mask done while some are wanted
MEMORY_BYTES = 2**30  # more than what is shared
STACK_BYTES = 256 * 2**20  # address space alone: recursion goes as deep as references and rules do
THREADS = 4  # that fill masks
COURTESY_S = 0.1  # a compilation that takes longer goes on with a lower priority
NICE = 10


def main() -> None:
    control = socket.socket(fileno=int(sys.argv[1]))
    setup = json.loads(sys.argv[3])
    for number in (signal.SIGINT, signal.SIGTERM):  # the server's: it drains, then the engine ends us
        signal.signal(number, signal.SIG_IGN)
    signal.signal(
        signal.SIGCHLD, signal.SIG_IGN
    )  # nobody waits for them: the engine sees their sockets close
    vocabulary = _read(Path(setup["model_dir"]), setup["vocab_size"], setup["eos_ids"])
    mask_bytes = setup["mask_bytes"]
    with contextlib.suppress(EOFError, ConnectionResetError):
        while True:
            sock, grammar_fd = _next(control)
            if os.fork() == 0:
                control.close()
                _Follower(sock, vocabulary, int(sys.argv[2]), mask_bytes).run(read_grammar(grammar_fd))
                os._exit(0)
            sock.close()
            os.close(grammar_fd)


def _read(model_dir: Path, vocab_size: int, eos_ids: list[int]) -> Vocabulary:
    """With the normal priority: a lower one starves while others generate, and the first request waits."""
    vocabulary = read_vocabulary(model_dir, vocab_size, eos_ids)
    gc.collect()
    with contextlib.suppress(AttributeError):  # glibc's alone; 0.1 GB
        ctypes.CDLL(None).malloc_trim(0)
    gc.freeze()  # or a collection in a child would write to, and so copy, what is shared
    return vocabulary


def _next(control: socket.socket) -> tuple[socket.socket, int]:
    """The engine's next wish. Raises EOFError when the engine is gone."""
    data, fds, _, _ = socket.recv_fds(control, 1, 2)
    if not data:
        raise EOFError
    return socket.socket(fileno=fds[0]), fds[1]


class _Place(NamedTuple):
    matcher: LLMatcher
    digits: DigitRun | None  # of JSON


class _Follower:
    """One grammar, and the outputs that it binds, each in a slot."""

    def __init__(self, sock: socket.socket, vocabulary: Vocabulary, masks_fd: int, mask_bytes: int) -> None:
        self._sock = sock
        self._vocabulary = vocabulary
        self._masks = mmap.mmap(masks_fd, 0)
        self._address = ctypes.addressof(ctypes.c_char.from_buffer(self._masks))
        self._mask_bytes = mask_bytes
        self._places: dict[int, _Place] = {}  # by slot
        self._is_json = False
        self._busy: set[int] = set()  # slots whose mask is being filled
        self._dropped: set[int] = set()  # of those
        self._lock = threading.Lock()  # of these sets, the timer and the socket
        self._first: tuple[LLMatcher, bytes] | None = None

    def run(self, grammar: Grammar) -> None:
        """Until the engine closes the socket."""
        self._is_json = grammar.kind == "json_schema"
        threading.stack_size(STACK_BYTES)
        _limit_memory((THREADS + 1) * STACK_BYTES + MEMORY_BYTES)
        signal.setitimer(signal.ITIMER_PROF, COMPILE_CPU_S)  # the default action ends the process
        signal.setitimer(signal.ITIMER_REAL, COMPILE_S)
        compiler = threading.Thread(target=self._compile, args=(grammar,), daemon=True)
        compiler.start()
        pool = ThreadPoolExecutor(THREADS)
        poll = select.poll()
        poll.register(self._sock, select.POLLIN)
        buffer = bytearray()
        while True:
            if not poll.poll(COURTESY_S * 1000 if compiler.is_alive() else None):
                with contextlib.suppress(ProcessLookupError):  # it may have ended just now
                    os.setpriority(os.PRIO_PROCESS, compiler.native_id or 0, NICE)
                continue
            data = self._sock.recv(1 << 16)
            if not data:
                os._exit(0)  # whatever the threads are at
            buffer += data
            for order in take_orders(buffer):
                self._obey(order, pool)

    def _compile(self, grammar: Grammar) -> None:
        reply = None
        try:
            self._first = compile_grammar(self._vocabulary, grammar)
            reply = Reply(Told.COMPILED)
        except BadGrammar as error:
            reply = Reply(Told.REFUSED, reason=str(error))
        finally:
            if reply is None:  # a panic of llguidance
                os._exit(1)
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)
        self._tell(reply)

    def _obey(self, order: Order, pool: ThreadPoolExecutor) -> None:
        ask, slot, token_id = order
        if ask == Ask.DROP:
            with self._lock:
                self._dropped.add(slot)
                is_busy = slot in self._busy
            if not is_busy:
                self._drop(slot)
            return
        with self._lock:
            if not self._busy:
                signal.setitimer(signal.ITIMER_REAL, MASK_S)
            self._busy.add(slot)
        pool.submit(self._begin if ask == Ask.BEGIN else self._advance, slot, token_id)

    def _begin(self, slot: int, _: int) -> None:
        assert self._first is not None, "begun before it was compiled"
        matcher, mask = self._first
        self._places[slot] = _Place(matcher.deep_copy(), DigitRun() if self._is_json else None)
        start = slot * self._mask_bytes
        self._masks[start : start + len(mask)] = mask
        self._done(Reply(Told.MASKED, slot))

    def _advance(self, slot: int, token_id: int) -> None:
        matcher, digits = self._places[slot]
        matcher.consume_token(token_id)
        if matcher.is_stopped() and not matcher.is_error():
            self._done(Reply(Told.COMPLETE, slot))
            return
        if not matcher.is_error():
            matcher.unsafe_compute_mask_ptr(self._address + slot * self._mask_bytes, self._mask_bytes)
            if digits is not None:
                digits.feed(self._vocabulary.trie.decode_bytes([token_id]))
                if digits.is_full:
                    self._forbid_digits(slot)
        is_good = not matcher.is_error()
        self._done(Reply(Told.MASKED, slot) if is_good else Reply(Told.FAILED, slot, reason(matcher)))

    def _forbid_digits(self, slot: int) -> None:
        """Unless nothing else may follow."""
        place = slice(slot * self._mask_bytes, (slot + 1) * self._mask_bytes)
        allowed = int.from_bytes(self._masks[place], "little") & ~self._vocabulary.digits
        if allowed:
            self._masks[place] = allowed.to_bytes(self._mask_bytes, "little")

    def _done(self, reply: Reply) -> None:
        with self._lock:
            self._busy.remove(reply.slot)
            signal.setitimer(signal.ITIMER_REAL, MASK_S if self._busy else 0)
            is_dropped = reply.slot in self._dropped
        if is_dropped:
            self._drop(reply.slot)
        else:
            self._tell(reply)

    def _drop(self, slot: int) -> None:
        with self._lock:
            self._dropped.discard(slot)
        self._places.pop(slot, None)
        self._tell(Reply(Told.DROPPED, slot))

    def _tell(self, reply: Reply) -> None:
        with self._lock, contextlib.suppress(OSError):  # the engine closed it: `run` sees that too
            self._sock.sendall(encode_reply(reply))


def _limit_memory(more_bytes: int) -> None:
    """Writable memory of its own, stacks of threads included, beyond what is there now."""
    pages = int(Path("/proc/self/statm").read_text().split()[5])
    limit = pages * resource.getpagesize() + more_bytes
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))


if __name__ == "__main__":
    main()
