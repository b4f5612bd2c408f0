"""Follows KV events and refuses what nobody could follow: a page told twice, an unknown one removed."""

from collections.abc import Iterable
from typing import NamedTuple

from cabochon.engine.kv_events import AllBlocksCleared, BlockRemoved, BlockStored, Event


class Told(NamedTuple):
    """All tokens from the prompt's start to the page's end; None if a page before it was never told."""

    prefix: tuple[int, ...] | None
    lora_name: str | None


class Replay:
    """What has been told, by hash."""

    def __init__(self) -> None:
        self.pages: dict[int, Told] = {}
        self.is_begun = False
        self._ever: dict[int, Told] = {}

    def follow(self, events: Iterable[Event]) -> None:
        for event in events:
            match event:
                case AllBlocksCleared():
                    self.pages = {}
                    self.is_begun = True
                case BlockRemoved(block_hashes=hashes):
                    assert hashes, "nothing is removed"
                    for one in hashes:
                        del self.pages[one]
                case BlockStored():
                    self._store(event)
            assert self.is_begun, "something is told before AllBlocksCleared"

    def _store(self, event: BlockStored) -> None:
        P = event.block_size
        assert len(event.token_ids) == P * len(event.block_hashes) > 0
        prefix: tuple[int, ...] | None = ()
        if event.parent_block_hash is not None:
            parent = self._ever.get(event.parent_block_hash)  # it may be gone by now
            prefix = None if parent is None else parent.prefix
        for idx, one in enumerate(event.block_hashes):
            if prefix is not None:
                prefix += tuple(event.token_ids[idx * P : (idx + 1) * P])
            assert one not in self.pages, "a page is told twice"
            self.pages[one] = self._ever[one] = Told(prefix, event.lora_name)
