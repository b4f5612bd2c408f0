"""Which adapters are on the device: a slot each. An idle one gives way, least recently used first.

A request whose adapter finds no slot waits, and others pass it. But it claims a slot: requests that came
later and are of the adapter there then wait themselves, or a busy adapter could keep its slot for ever. Those
that wait by the time their adapter gets a slot may join it, claimed or not, so that batches are not of one.
Knows nothing of tensors, rows or pages.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from cabochon.engine.adapters.adapter import Adapter
from cabochon.engine.rows import NO_ADAPTER


@dataclass(slots=True, eq=False)
class LoadedAdapter:
    """An adapter under a name. One that is replaced, or unloaded, lives on until its requests have ended."""

    name: str
    uid: int  # never the same again: pages of a replaced adapter are not those of its successor
    weights: Adapter
    is_unloaded: bool = False

    @property
    def key(self) -> str:
        """What its pages are known by."""
        return f"{self.uid} {self.name}"


class AdapterSlots:
    """Slots 0..num_slots − 1 of the device, and the running requests of each."""

    def __init__(
        self, num_slots: int, waiting: Mapping[LoadedAdapter, Mapping[int, int]] = MappingProxyType({})
    ) -> None:
        """waiting: at any time, how many requests of an adapter wait, by priority. None is 0."""
        self._waiting = waiting
        self._held: list[LoadedAdapter | None] = [None] * num_slots
        self._num_running = [0] * num_slots
        self._last_use = [0] * num_slots
        self._claims: list[LoadedAdapter | None] = [None] * num_slots
        self._passes = [0] * num_slots  # requests that waited when their adapter got the slot: they join it
        self._clock = 0
        self._changes: dict[int, LoadedAdapter | None] = {}

    @property
    def resident(self) -> list[str]:
        """Names of the adapters that have a slot, in use or not."""
        return [one.name for one in self._held if one is not None]

    @property
    def awaited(self) -> list[str]:
        """Names of adapters of waiting requests, whatever they wait for."""
        return [one.name for one in self._waiting]

    def may_enter(self, adapter: LoadedAdapter | None, priority: int) -> bool:
        """Whether a request can run now; if not, it has claimed a slot as soon as one is left to claim."""
        if adapter is None or self._find(adapter, priority) is not None:
            return True
        if adapter not in self._held and adapter not in self._claims:
            self._claim(adapter, priority)
        return False

    def take(self, adapter: LoadedAdapter | None, priority: int) -> int:
        """A request that may enter begins to run. Returns its slot."""
        if adapter is None:
            return NO_ADAPTER
        slot = self._find(adapter, priority)
        assert slot is not None, "no slot for the adapter"
        if self._held[slot] is adapter:
            self._passes[slot] = max(0, self._passes[slot] - 1)
        else:
            self._held[slot] = self._changes[slot] = adapter
            self._passes[slot] = sum(self._waiting.get(adapter, {}).values())
        self._claims = [None if claim is adapter else claim for claim in self._claims]
        self._num_running[slot] += 1
        self._touch(slot)
        return slot

    def release(self, slot: int) -> None:
        """One of the slot's requests has ended, or was preempted."""
        if slot == NO_ADAPTER:
            return
        self._num_running[slot] -= 1
        self._touch(slot)
        held = self._held[slot]
        if held is not None and held.is_unloaded:
            self.forget(held)

    def forget(self, adapter: LoadedAdapter) -> None:
        """It is unloaded: its slot is empty as soon as no request runs in it."""
        adapter.is_unloaded = True
        if adapter in self._held and not self._num_running[slot := self._held.index(adapter)]:
            self._held[slot] = self._changes[slot] = None

    @property
    def has_changes(self) -> bool:
        """Whether take_changes has something to give."""
        return bool(self._changes)

    def take_changes(self) -> list[tuple[int, LoadedAdapter | None]]:
        """Slots that hold something else than at the last call: to be brought there before the next step."""
        changes = list(self._changes.items())
        self._changes.clear()
        return changes

    def check(self, running: list[int]) -> None:
        """Prove that the counts are those of the running requests. running: their slots."""
        for slot, (held, count) in enumerate(zip(self._held, self._num_running, strict=True)):
            assert count == running.count(slot), "a slot miscounts its requests"
            assert held is not None or not count, "an empty slot has requests"
            assert held is None or count or not held.is_unloaded, "an unloaded adapter keeps its slot"
        held_ones = [one for one in self._held if one is not None]
        assert len(set(held_ones)) == len(held_ones), "an adapter has two slots"

    def _find(self, adapter: LoadedAdapter, priority: int) -> int | None:
        """The slot that it has or can have at once, if claims allow that."""
        if adapter in self._held:
            slot = self._held.index(adapter)
            return slot if self._passes[slot] or self._is_open(slot, adapter, priority) else None
        idle = [
            slot
            for slot, count in enumerate(self._num_running)
            if not count and self._is_open(slot, adapter, priority)
        ]
        return min(idle, key=lambda slot: (self._held[slot] is not None, self._last_use[slot]), default=None)

    def _is_open(self, slot: int, adapter: LoadedAdapter, priority: int) -> bool:
        """To who claims it, and to requests of better priority than any that waits for the claim."""
        claim = self._claims[slot]
        if claim is None or claim is adapter:
            return True
        if claim not in self._waiting:
            self._claims[slot] = None  # whoever made it has gone
            return True
        return priority < min(self._waiting[claim])

    def _claim(self, adapter: LoadedAdapter, priority: int) -> None:
        """The slot that is likely to be idle first."""
        open_ones = [slot for slot in range(len(self._held)) if self._is_open(slot, adapter, priority)]
        if open_ones:
            slot = min(open_ones, key=lambda slot: (self._num_running[slot], self._last_use[slot]))
            self._claims[slot] = adapter

    def _touch(self, slot: int) -> None:
        self._clock += 1
        self._last_use[slot] = self._clock
