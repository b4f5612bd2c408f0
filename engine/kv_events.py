"""What a router must hear to know which prefixes this engine can reuse: vLLM's KV cache events.

A page counts while every global group finds it: a router counts pages from a prompt's start, and those of
sliding groups are soon gone from there. One that comes and goes between two takes is not told. Source: vLLM's
distributed/kv_events.py, and how llm-d-router reads it (pkg/kvevents). Knows nothing of sockets.
"""

from collections.abc import Collection, Iterable
from itertools import islice
from typing import NamedTuple

import numpy as np

from cabochon.engine.adapters.slots import LoadedAdapter

MEDIUM = "GPU"  # the reader's word for the engine's own pages, wherever they are


class BlockStored(NamedTuple):
    """Consecutive pages that can be found now. Names and order of the fields are the format."""

    block_hashes: list[int]
    parent_block_hash: int | None  # of the page before them; None: they begin a prompt
    token_ids: list[int]  # block_size for each hash
    block_size: int
    lora_id: None = None
    medium: str = MEDIUM
    lora_name: str | None = None  # None: the base model's


class BlockRemoved(NamedTuple):
    """Pages that can be found no more."""

    block_hashes: list[int]
    medium: str = MEDIUM


class AllBlocksCleared(NamedTuple):
    """Forget everything: what can be found follows."""


Event = BlockStored | BlockRemoved | AllBlocksCleared


class _Page(NamedTuple):
    """parent: the name before it, None at a prompt's start. token_ids: [P] int32, as bytes."""

    parent: bytes | None
    token_ids: bytes
    adapter: LoadedAdapter | None


class KVEvents:
    """The pages that can be found, and what of that has not been told. By name, as in KVCache.page_names."""

    def __init__(self, page_tokens: int, global_groups: Collection[int]) -> None:
        self._page_tokens = page_tokens
        self._groups = frozenset(global_groups)
        self._pages: dict[bytes, _Page] = {}
        self._unsent: dict[bytes, None] = {}
        self._removed: list[int] = []
        self._is_cleared = True

    @property
    def has_more(self) -> bool:
        """Whether there is something to tell."""
        return bool(self._is_cleared or self._removed or self._unsent)

    def store(
        self, name: bytes, parent: bytes | None, token_ids: bytes, adapter: LoadedAdapter | None
    ) -> None:
        """Every global group finds the page. token_ids: [P] int32, as bytes."""
        if name not in self._pages:
            self._pages[name] = _Page(parent, token_ids, adapter)
            self._unsent[name] = None

    def lose(self, group: int, name: bytes) -> None:
        """The group does not find the page any more."""
        if group in self._groups:
            self._drop(name)

    def retire(self, adapter: LoadedAdapter) -> None:
        """No new request can name the adapter: its pages would draw requests that are its successor's."""
        for name in [name for name, page in self._pages.items() if page.adapter is adapter]:
            self._drop(name)

    def restart(self) -> None:
        """Somebody knows nothing, or not enough: tell everything from the start."""
        self._is_cleared = True
        self._removed = []
        self._unsent = dict.fromkeys(self._pages)

    def take(self, max_pages: int) -> list[Event]:
        """What is to be told, in order: removals, then at most max_pages pages; the others are left."""
        events: list[Event] = []
        if self._is_cleared:
            events.append(AllBlocksCleared())
            self._is_cleared = False
        if self._removed:
            events.append(BlockRemoved(self._removed))
            self._removed = []
        names = list(islice(self._unsent, max_pages))
        for name in names:
            del self._unsent[name]
        return events + [self._stored(run) for run in self._runs(names)]

    def _drop(self, name: bytes) -> None:
        if self._pages.pop(name, None) is None:
            return
        if name in self._unsent:
            del self._unsent[name]
        else:
            self._removed.append(public_hash(name))

    def _runs(self, names: Iterable[bytes]) -> list[list[bytes]]:
        """Cut where a page does not follow the one before."""
        runs: list[list[bytes]] = []
        for name in names:
            if runs and self._pages[name].parent == runs[-1][-1]:
                runs[-1].append(name)
            else:
                runs.append([name])
        return runs

    def _stored(self, run: list[bytes]) -> BlockStored:
        pages = [self._pages[name] for name in run]
        first = pages[0]
        return BlockStored(
            block_hashes=[public_hash(name) for name in run],
            parent_block_hash=None if first.parent is None else public_hash(first.parent),
            token_ids=np.frombuffer(b"".join(page.token_ids for page in pages), np.int32).tolist(),
            block_size=self._page_tokens,
            lora_name=None if first.adapter is None else first.adapter.name,
        )


def on_wire(event: Event) -> tuple[object, ...]:
    """As it is sent: an array that begins with its kind."""
    return (type(event).__name__, *event)


def public_hash(name: bytes) -> int:
    """A page's name as routers take it, 64 bits: the last 8 bytes, as llm-d-router shortens longer ones."""
    return int.from_bytes(name[-8:], "big")
