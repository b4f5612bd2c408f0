"""Which endpoint has which pages: the endpoint picker's precise index, fed by the engines' KV events.

Reads frames as strictly as the picker's parser. Pages are known by names of the index's own, a hash over the
model and all tokens up to a page's end; an engine's hashes only say which page an event is about.
Source: llm-d-router, pkg/kvevents (zmq_subscriber, engineadapter, pool) and pkg/kvcache/kvblock.
"""

import hashlib
from collections import Counter
from collections.abc import Sequence
from typing import Any

import msgspec


class Malformed(ValueError):
    """What the picker drops, with everything that it knew of the endpoint."""


class KVIndex:
    """Pages of `page_tokens` tokens, which must be the engines'. Endpoints are called by the topic's pod."""

    def __init__(self, page_tokens: int) -> None:
        self.page_tokens = page_tokens
        self.num_dropped = 0  # stores behind a page that is not known
        self.num_missed = 0  # messages, by the gaps in their numbers
        self._names: dict[tuple[str, int], bytes] = {}  # by pod and the engine's hash
        self._holders: dict[bytes, set[str]] = {}
        self._stores: Counter[tuple[str, int]] = Counter()
        self._last: dict[str, int] = {}

    def feed(self, frames: Sequence[bytes]) -> str:
        """A message as it comes from the socket. Returns the pod. Raises Malformed."""
        if len(frames) != 3 or len(frames[1]) != 8:
            raise Malformed("a message has a topic, a number in 8 bytes, and a payload")
        parts = frames[0].decode().split("@")
        if len(parts) != 3 or parts[0] != "kv":
            raise Malformed("a topic is kv@POD@MODEL")
        _, pod, model = parts
        number = int.from_bytes(frames[1], "big")
        self.num_missed += number - self._last.get(pod, number - 1) - 1
        self._last[pod] = number
        batch = msgspec.msgpack.decode(frames[2])
        if not isinstance(batch, list) or len(batch) < 2 or not isinstance(batch[0], float):
            raise Malformed("a payload is an array of a time, events, and perhaps a rank")
        for event in batch[1]:
            self._apply(pod, model, event)
        return pod

    def matches(self, token_ids: Sequence[int], model: str) -> dict[str, int]:
        """Pages of the prompt that each pod has, from its start without a gap."""
        counts: dict[str, int] = {}
        name = _root(model)
        for start in range(0, len(token_ids) // self.page_tokens * self.page_tokens, self.page_tokens):
            name = _extend(name, token_ids[start : start + self.page_tokens])
            page_idx = start // self.page_tokens
            holders = [pod for pod in self._holders.get(name, ()) if counts.get(pod, 0) == page_idx]
            if not holders:
                break
            counts.update(dict.fromkeys(holders, page_idx + 1))
        return counts

    def _apply(self, pod: str, model: str, event: Any) -> None:
        match event:
            case ["AllBlocksCleared", *_]:
                for known in [known for known in self._names if known[0] == pod]:
                    self._remove(*known)
            case ["BlockRemoved", list(hashes), "GPU", *_]:
                for one in hashes:
                    self._stores[pod, one] -= 1
                    if self._stores[pod, one] <= 0:
                        self._remove(pod, one)
            case ["BlockStored", list(hashes), parent, list(tokens), int(size), None, "GPU", lora, *more]:
                if more and more[1:2] != [None]:
                    raise Malformed("a page of a layer group is dropped, unless its kind is known")
                if size != self.page_tokens or len(tokens) != size * len(hashes):
                    raise Malformed("tokens must fill the pages")
                self._store(pod, lora or model, hashes, parent, tokens)
            case _:
                raise Malformed("an event is an array that begins with its kind")

    def _store(self, pod: str, model: str, hashes: list[int], parent: int | None, tokens: list[int]) -> None:
        if parent is not None and (pod, parent) not in self._names:
            self.num_dropped += 1
            return
        name = _root(model) if parent is None else self._names[pod, parent]
        for idx, one in enumerate(hashes):
            name = _extend(name, tokens[idx * self.page_tokens : (idx + 1) * self.page_tokens])
            self._names[pod, one] = name
            self._holders.setdefault(name, set()).add(pod)
            self._stores[pod, one] += 1

    def _remove(self, pod: str, one: int) -> None:
        name = self._names.pop((pod, one), None)
        self._stores.pop((pod, one), None)
        if name is not None:
            self._holders[name].discard(pod)


def _root(model: str) -> bytes:
    return hashlib.blake2b(model.encode()).digest()


def _extend(name: bytes, token_ids: Sequence[int]) -> bytes:
    return hashlib.blake2b(name + msgspec.msgpack.encode(list(token_ids))).digest()
