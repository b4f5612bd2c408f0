"""A world without tensors: real scheduler and pages, and a runner that proves each key is where it should be.

The runner stores at every (page, offset) which tokens its K and V were computed from. Before it computes a
position it looks up every key that position sees, in every layer group, and compares. Sampled tokens are a
function of the tokens before them alone, so outputs do not depend on chunking, caching or preemption.
"""

from collections import deque
from collections.abc import Callable, Sequence
from typing import NamedTuple
from zlib import crc32

import numpy as np
from numpy.typing import NDArray

from cabochon.engine.adapters.adapter import Adapter
from cabochon.engine.adapters.slots import LoadedAdapter
from cabochon.engine.hashing import PageHasher
from cabochon.engine.kv_cache import KVCache
from cabochon.engine.kv_events import KVEvents
from cabochon.engine.messages import GenerateRequest, RequestOutput
from cabochon.engine.page_pool import PagePool
from cabochon.engine.plan import Plan
from cabochon.engine.rows import NO_ADAPTER, NULL_PAGE, Rows
from cabochon.engine.sampling_params import SamplingParams
from cabochon.engine.scheduler import MAX_CHUNK_TOKENS, Scheduler

VOCAB = 50
EOS = 1


def next_token(prefix: Sequence[int]) -> int:
    """The fake model: any function of all tokens so far; sometimes EOS."""
    return crc32(bytes(prefix)) % VOCAB


def expected_output(prompt: Sequence[int], max_tokens: int, *, ignore_eos: bool = False) -> list[int]:
    """The naive model of a whole request."""
    out: list[int] = []
    while len(out) < max_tokens:
        out.append(next_token([*prompt, *out]))
        if out[-1] == EOS and not ignore_eos:
            break
    return out


def request(request_id: str, prompt: Sequence[int], max_tokens: int = 4, **fields: object) -> GenerateRequest:
    params = SamplingParams(max_tokens=max_tokens, ignore_eos=bool(fields.pop("ignore_eos", False)))
    return GenerateRequest(request_id=request_id, prompt_ids=list(prompt), params=params, **fields)


def prompt_of(length: int, seed: int = 0) -> list[int]:
    """Random token ids without EOS."""
    return np.random.default_rng(seed).integers(2, VOCAB, length).tolist()


class Flying(NamedTuple):
    """A step as it was launched: the host's rows and tables change before it runs."""

    plan: Plan
    admitted: dict[int, list[int]]  # known tokens by row
    page_tables: NDArray[np.int32]
    slot_changes: list[tuple[int, LoadedAdapter | None]]
    adapters: dict[int, tuple[int, LoadedAdapter | None]]  # slot and adapter by row


class World:
    """Scheduler, pages and the checking runner. No contents are checked where hash collisions are forced.

    A step runs as late as it can, when its results are waited for: with a depth of 2 after the next one was
    scheduled and launched.
    """

    def __init__(
        self,
        *,
        num_pages: int = 40,
        page_tokens: int = 4,
        windows: Sequence[int | None] = (None, 6),
        max_seqs: int = 4,
        step_tokens: int = 16,
        part_tokens: int | None = None,
        max_model_len: int = 48,
        digest_bytes: int = 16,
        caching: bool = True,
        depth: int = 1,
        max_loras: int = 0,
    ) -> None:
        self.depth = depth
        self.num_adapters = 0
        self.adapters: dict[str, LoadedAdapter] = {}  # by name, made when a request names them
        self.device_slots: dict[int, LoadedAdapter | None] = {}
        self.flying: deque[Flying] = deque()
        self.device_ids: dict[int, list[int]] = {}  # by row: what the device knows, in the order of its steps
        self.rows = Rows(
            max_seqs=max_seqs, max_model_len=max_model_len, num_groups=len(windows), page_tokens=page_tokens
        )
        self.globals = [group for group, window in enumerate(windows) if window is None]
        self.events = KVEvents(page_tokens, self.globals)
        self.pool = PagePool(num_pages, self.events.lose)
        self.hasher = PageHasher(b"secret", digest_bytes)
        self.cache = KVCache(self.rows, self.pool, self.hasher if caching else None, windows, self.events)
        self.windows = windows
        self.step_tokens = step_tokens
        self.check_contents = digest_bytes == 16
        self.scheduler = Scheduler(
            self.rows,
            self.cache,
            step_tokens=step_tokens,
            part_tokens=part_tokens,
            eos_token_ids=[EOS],
            max_model_len=max_model_len,
            vocab_size=VOCAB,
            max_loras=max_loras,
        )
        self.contents = np.zeros((num_pages + 1, page_tokens), np.int64)
        self.outputs: dict[str, list[int]] = {}
        self.reasons: dict[str, str] = {}
        self.cached_tokens: dict[str, int] = {}
        self.plans: list[Plan] = []

    def add(self, message: GenerateRequest) -> None:
        self.scheduler.add(message, adapter=self.adapter(message.adapter))
        self.outputs[message.request_id] = []

    def adapter(self, name: str | None) -> LoadedAdapter | None:
        """The one that has the name; after `unload` another."""
        if name is None:
            return None
        if name not in self.adapters:
            self.num_adapters += 1
            self.adapters[name] = LoadedAdapter(name, self.num_adapters, Adapter(8, [], None))
        return self.adapters[name]

    def unload(self, name: str) -> None:
        adapter = self.adapters.pop(name)
        self.scheduler.slots.forget(adapter)
        self.events.retire(adapter)

    def step(self, in_flight: Callable[[], object] | None = None) -> Plan | None:
        """Schedule and launch, then run and enter the oldest step if there are enough.

        `in_flight` is called between, while steps are on the device. None: nothing happened.
        """
        before = list(self.scheduler._running)
        ready = {r.row for r in before if self.scheduler._remaining(r) == 1}
        plan = self.scheduler.schedule()
        if plan is not None:
            assert not set(before) & set(self.scheduler.take_admitted()), "preempted and admitted in one step"
            self._check_plan(plan, ready)
            admitted = {r.row: list(r.token_ids) for r in self.scheduler.take_admitted() if r.row is not None}
            adapters = {
                row: (int(self.rows.adapter_slots[row]), self.scheduler.request(row).adapter)
                for row in plan.rows.tolist()
            }
            changes = self.scheduler.slots.take_changes()
            self.flying.append(Flying(plan, admitted, self.rows.page_tables.copy(), changes, adapters))
            self._check_owners(plan)
            if self.depth > 1:
                self.scheduler.advance(plan)
            self.plans.append(plan)
        if in_flight is not None and self.flying:
            in_flight()
        if self.flying and (plan is None or len(self.flying) == self.depth):
            oldest = self.flying.popleft()
            for output in self.scheduler.update(oldest.plan, np.array(self._run(oldest), np.int32)):
                self._note(output)
            return oldest.plan
        return plan

    def names_of(self, tokens: Sequence[int], adapter: LoadedAdapter | None, salt: str | None) -> list[bytes]:
        """By the hasher alone: the names of its full pages, in order."""
        names = [self.hasher.root(None if adapter is None else adapter.key, salt)]
        P = self.rows.page_tokens
        for start in range(0, len(tokens) // P * P, P):
            names += self.hasher.chain(names[-1], np.array(tokens[start : start + P], np.int32), P)
        return names[1:]

    def is_found(self, name: bytes) -> bool:
        """Whether a hit in the global groups can have that page; without such groups it is not asked."""
        return bool(self.globals) and all(self.pool.lookup(group, name) is not None for group in self.globals)

    def run(self, max_steps: int = 2000) -> int:
        """Step until nothing is left. Returns the number of steps."""
        for steps in range(max_steps):
            if self.step() is None:
                return steps
            self.scheduler.check()
        raise AssertionError(f"not done after {max_steps} steps")

    def _note(self, output: RequestOutput) -> None:
        self.outputs[output.request_id] += output.token_ids
        self.cached_tokens[output.request_id] = output.cached_tokens
        if output.finish_reason is not None:
            self.reasons[output.request_id] = output.finish_reason

    def _check_plan(self, plan: Plan, ready: set[int | None]) -> None:
        assert 0 < plan.num_tokens <= self.step_tokens, "budget exceeded, or an empty step"
        assert (plan.lens >= 1).all()
        assert plan.lens.max() <= MAX_CHUNK_TOKENS
        assert (plan.starts == self.rows.num_computed[plan.rows]).all()
        ends = plan.starts + plan.lens
        assert (ends <= self.rows.num_tokens[plan.rows]).all(), "computes tokens that are not known"
        assert (plan.samples == (ends == self.rows.num_tokens[plan.rows])).all()
        assert len(set(plan.rows.tolist())) == len(plan.rows), "a row twice"
        is_decode = plan.samples & (plan.lens == 1)
        assert is_decode[: plan.num_decodes].all()
        assert not is_decode[plan.num_decodes :].any(), "decodes stand first"
        still_running = {r.row for r in self.scheduler._running if r not in self.scheduler.take_admitted()}
        assert ready & still_running <= set(plan.rows.tolist()), "a decode was skipped"

    def _check_owners(self, plan: Plan) -> None:
        for row, start, length in zip(plan.rows, plan.starts, plan.lens, strict=True):
            for position in range(start, start + length):
                for group in range(len(self.windows)):
                    page, _ = self._slot(self.rows.page_tables, group, row, position)
                    assert self.pool.references(page) == 1, "writes a page that others read"

    def _run(self, step: Flying) -> list[int]:
        tokens = []
        self.device_ids |= {row: list(ids) for row, ids in step.admitted.items()}
        self.device_slots.update(step.slot_changes)
        plan, tables = step.plan, step.page_tables
        for row, start, length, samples in zip(plan.rows, plan.starts, plan.lens, plan.samples, strict=True):
            known = self.device_ids[row]
            slot, adapter = step.adapters[row]
            held = None if slot == NO_ADAPTER else self.device_slots[slot]
            assert held is adapter, "another adapter is in the slot"
            uid = 0 if adapter is None else adapter.uid
            for position in range(start, start + length):
                self._write(tables, row, position, known, uid)
            for position in range(start, start + length):
                self._look_back(tables, row, position, known, uid)
            if samples:
                assert start + length == len(known), "the device knows another number of tokens"
                tokens.append(next_token(known))
                known.append(tokens[-1])
        return tokens

    def _slot(self, tables: NDArray[np.int32], group: int, row: int, position: int) -> tuple[int, int]:
        page_idx, offset = divmod(position, self.rows.page_tokens)
        page = int(tables[group, row, page_idx])
        assert page != NULL_PAGE, f"position {position} has no page in group {group}"
        return page, offset

    def _write(self, tables: NDArray[np.int32], row: int, position: int, known: list[int], uid: int) -> None:
        for group in range(len(self.windows)):
            place = self._slot(tables, group, row, position)
            self.contents[place] = self._content(group, known, position, uid)

    def _look_back(
        self, tables: NDArray[np.int32], row: int, position: int, known: list[int], uid: int
    ) -> None:
        for group, window in enumerate(self.windows):
            first = 0 if window is None else max(0, position - window + 1)
            for key in range(first, position + 1):
                place = self._slot(tables, group, row, key)
                if self.check_contents:
                    assert self.contents[place] == self._content(group, known, key, uid), "wrong page"

    @staticmethod
    def _content(group: int, known: list[int], position: int, uid: int) -> int:
        return crc32(bytes([group, uid % 256, *known[: position + 1]]))


def table_of(world: World, row: int, group: int) -> NDArray[np.int32]:
    """The page table of a row, as long as it is used."""
    return world.rows.page_tables[group, row]
