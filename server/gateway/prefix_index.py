"""Which endpoint has probably which prefixes: the endpoint picker's approximate index of its own decisions.

A prompt is cut into chunks of its bytes, each named by a hash over it and all before, the model and the salt.
Source: llm-d-router, pkg/epp/framework/plugins/requestcontrol/dataproducer/approximateprefix.
"""

import hashlib
from collections import OrderedDict
from collections.abc import Collection, Sequence

MIN_CHUNK_TOKENS = 64  # smaller pages are raised to it
DEFAULT_CHUNK_TOKENS = 64
BYTES_PER_TOKEN = 4
MAX_PREFIX_TOKENS = 131_072
DEFAULT_CAPACITY = 31_250  # chunks an endpoint holds if it does not say


def chunk_tokens(page_tokens: int) -> int:
    """Tokens of a chunk for an endpoint with such pages; 0 means that it did not say."""
    return max(page_tokens or DEFAULT_CHUNK_TOKENS, MIN_CHUNK_TOKENS)


def chunk_hashes(prompt: bytes, tokens: int, model: str, salt: str = "") -> list[bytes]:
    """A name for each chunk of `tokens` tokens, the last one possibly shorter."""
    step = tokens * BYTES_PER_TOKEN
    end = min(len(prompt), MAX_PREFIX_TOKENS // tokens * step)
    before = _hash(model.encode() + salt.encode())
    names = []
    for start in range(0, end, step):
        before = _hash(_hash(prompt[start : start + step]) + before)
        names.append(before)
    return names


class PrefixIndex:
    """The chunks last sent to each endpoint, as many as it has pages; the oldest are forgotten first."""

    def __init__(self) -> None:
        self._sent: dict[str, OrderedDict[bytes, None]] = {}

    def matches(self, names: Sequence[bytes]) -> dict[str, int]:
        """Chunks of the prompt that each endpoint has, up to the first that none has."""
        counts: dict[str, int] = {}
        for name in names:
            holders = [address for address, sent in self._sent.items() if name in sent]
            if not holders:
                break
            for address in holders:
                counts[address] = counts.get(address, 0) + 1
        return counts

    def add(self, address: str, names: Sequence[bytes], num_pages: int) -> None:
        """The prompt was sent to that endpoint. num_pages: its capacity; 0 means that it did not say."""
        sent = self._sent.setdefault(address, OrderedDict())
        for name in names:
            sent[name] = None
            sent.move_to_end(name)
        while len(sent) > (num_pages or DEFAULT_CAPACITY):
            sent.popitem(last=False)

    def keep(self, addresses: Collection[str]) -> None:
        """Forget all endpoints but these."""
        self._sent = {address: sent for address, sent in self._sent.items() if address in addresses}


def _hash(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=8).digest()
