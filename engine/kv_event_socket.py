"""Tells routers over ZeroMQ which pages can be found: topic, sequence number, msgpack, as vLLM does.

The only module that imports pyzmq, an optional package. XPUB instead of vLLM's PUB with a socket for replays:
it shows who subscribes, so a router that starts late, or comes back, is told everything again.
"""

import logging
import time
import weakref

import msgspec
import zmq

from cabochon.engine.errors import ConfigError
from cabochon.engine.kv_events import KVEvents, on_wire

logger = logging.getLogger(__name__)

MAX_UNREAD = 1024  # messages of a slow reader, 50 MB at worst; then it misses some, as their numbers show
MAX_PAGES = 512  # in a message: less than a millisecond of a step
MAX_HEARD = 64  # messages of readers that are looked at in a step
MAX_HEARD_BYTES = 1024  # they hold a topic; who sends more is cut off


class KVEventSocket:
    """Listens on `endpoint`, until it is collected. `send` never waits: ZeroMQ's own thread does."""

    def __init__(self, endpoint: str, topic: str, events: KVEvents) -> None:
        """Raises ConfigError if it cannot listen there."""
        self.events = events
        self._topic = topic.encode()
        self._num_sent = 0
        self._encoder = msgspec.msgpack.Encoder()
        context = zmq.Context()
        self._socket = context.socket(zmq.XPUB)
        weakref.finalize(self, _close, self._socket, context)
        self._socket.set_hwm(MAX_UNREAD)
        self._socket.setsockopt(zmq.MAXMSGSIZE, MAX_HEARD_BYTES)
        self._socket.setsockopt(zmq.XPUB_VERBOSE, 1)  # a topic that another reader has, too
        try:
            self._socket.bind(endpoint)
        except zmq.ZMQError as error:
            raise ConfigError(
                f"kv_events_endpoint must be an address to listen on, got {endpoint} ({error}): choose a free"
                " port of this machine"
            ) from None
        self.endpoint = self._socket.get_string(zmq.LAST_ENDPOINT)  # with the port, if it was *
        logger.info("kv events endpoint=%s topic=%s", self.endpoint, topic)

    def send(self) -> None:
        """One message, if there is something to tell. What a slow reader has no room for is lost to it."""
        if self._has_new_reader():
            self.events.restart()
        if not self.events.has_more:
            return
        events = [on_wire(event) for event in self.events.take(MAX_PAGES)]
        payload = self._encoder.encode((time.time(), events))
        number = self._num_sent.to_bytes(8, "big")
        self._socket.send_multipart((self._topic, number, payload), zmq.NOBLOCK)
        self._num_sent += 1

    def _has_new_reader(self) -> bool:
        is_new = False
        for _ in range(MAX_HEARD):
            try:
                is_new |= self._socket.recv(zmq.NOBLOCK).startswith(b"\1")  # \0: one unsubscribes
            except zmq.Again:
                break
        return is_new


def _close(socket: "zmq.Socket[bytes]", context: "zmq.Context[zmq.Socket[bytes]]") -> None:
    """In this order: a context waits for its sockets."""
    socket.close(linger=0)
    context.term()
