"""Random walks over scheduler and pages, `check()` after each step, outputs against the naive model."""

import random
from collections import Counter
from typing import ClassVar

import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test
from kv_event_replay import Replay, Told
from paged_world import World, expected_output, request

from cabochon.engine.adapters.slots import LoadedAdapter
from cabochon.engine.kv_events import public_hash

SHARED = [7, 8, 9, 10, 11, 12, 13, 14, 15, 16]  # prompts overlap, so that prefixes are shared
MAX_MODEL_LEN = 32
MAX_OPEN = 10
LAYOUTS = [(None,), (None, 6), (5, None, 5), (1, None), (3, 9), (4, 4, None)]


def pages_for_one(windows: tuple[int | None, ...], page_tokens: int, step_tokens: int) -> int:
    """The smallest pool that is allowed: one sequence of full length."""
    full = -(-MAX_MODEL_LEN // page_tokens)
    return sum(
        full if w is None else min(full, -(-(w - 1 + step_tokens) // page_tokens) + 1) for w in windows
    )


class Machine(RuleBasedStateMachine):
    """Adds, aborts, publishes and steps in any order, in a pool that holds little more than one sequence."""

    digest_bytes = 16
    seen: ClassVar[Counter[str]] = Counter()  # what the walks have been through, over all examples

    @initialize(
        windows=st.sampled_from(LAYOUTS),
        page_tokens=st.sampled_from([1, 2, 4]),
        spare=st.sampled_from([0, 0, 1, 3, 8, 20]),
        max_seqs=st.integers(1, 5),
        step_tokens=st.integers(5, 24),
        part_tokens=st.sampled_from([None, None, 1, 2, 7]),
        caching=st.sampled_from([True, True, True, False]),
        depth=st.sampled_from([1, 2]),
        max_loras=st.integers(1, 2),
    )
    def start(
        self, windows, page_tokens, spare, max_seqs, step_tokens, part_tokens, caching, depth, max_loras
    ) -> None:
        self.world = World(
            num_pages=pages_for_one(windows, page_tokens, step_tokens) + spare,
            page_tokens=page_tokens,
            windows=windows,
            max_seqs=max_seqs,
            step_tokens=step_tokens,
            part_tokens=part_tokens,
            max_model_len=MAX_MODEL_LEN,
            digest_bytes=self.digest_bytes,
            caching=caching,
            depth=depth,
            max_loras=max_loras,
        )
        self.requests: dict[str, tuple[list[int], int, bool]] = {}
        self.aborted: set[str] = set()
        self.replay = Replay()
        self.public: dict[bytes, tuple[tuple[int, ...], LoadedAdapter | None]] = {}  # names of unsalted pages

    def open_requests(self) -> list[str]:
        return [n for n in self.requests if n not in self.world.reasons and n not in self.aborted]

    @rule(
        copies=st.integers(1, 4),
        shared=st.integers(0, len(SHARED)),
        own=st.lists(st.integers(2, 5), max_size=8),
        max_tokens=st.sampled_from([1, 2, 5, 14, 14, 14]),
        priority=st.integers(0, 2),
        salt=st.sampled_from([None, None, "x"]),
        is_private=st.sampled_from([False, False, True]),
        ignore_eos=st.booleans(),
        adapter=st.sampled_from([None, None, "a", "b", "c"]),
    )
    def add(self, copies, shared, own, max_tokens, priority, salt, is_private, ignore_eos, adapter) -> None:
        prompt = [*SHARED[:shared], *own] or [2]
        for _ in range(min(copies, MAX_OPEN - len(self.open_requests()))):
            name = f"{len(self.requests)}"
            self.requests[name] = (prompt, max_tokens, ignore_eos)
            if salt is None:
                self.expect_pages([*prompt, *expected_output(prompt, max_tokens, ignore_eos=True)], adapter)
            self.world.add(
                request(
                    name, prompt, max_tokens, priority=priority, cache_salt=salt, is_private=is_private,
                    ignore_eos=ignore_eos, adapter=adapter,
                )
            )  # fmt: skip

    def expect_pages(self, tokens: list[int], adapter_name: str | None) -> None:
        adapter, P = self.world.adapter(adapter_name), self.world.rows.page_tokens
        for idx, name in enumerate(self.world.names_of(tokens, adapter, salt=None)):
            self.public[name] = (tuple(tokens[: (idx + 1) * P]), adapter)

    @rule()
    def a_reader_comes(self) -> None:
        self.world.events.restart()

    @rule(max_pages=st.integers(0, 3))
    def tell_some(self, max_pages) -> None:
        self.replay.follow(self.world.events.take(max_pages))

    @rule(data=st.data(), is_in_flight=st.booleans())
    def abort(self, data, is_in_flight) -> None:
        if not self.open_requests():
            return
        name = data.draw(st.sampled_from(self.open_requests()))
        self.aborted.add(name)
        if is_in_flight:
            plan = self.world.step(in_flight=lambda: self.world.scheduler.abort(name))
            self.seen["steps"] += 1
            self.seen["aborts in flight"] += plan is not None
        else:
            self.world.scheduler.abort(name)

    @rule(data=st.data(), is_in_flight=st.booleans())
    def publish(self, data, is_in_flight) -> None:
        if not self.requests:
            return
        name = data.draw(st.sampled_from(list(self.requests)))
        if is_in_flight:
            self.world.step(in_flight=lambda: self.world.scheduler.publish(name))
            self.seen["steps"] += 1
        else:
            self.world.scheduler.publish(name)

    @rule(data=st.data(), is_in_flight=st.booleans())
    def unload(self, data, is_in_flight) -> None:
        if not self.world.adapters:
            return
        name = data.draw(st.sampled_from(sorted(self.world.adapters)))
        if is_in_flight:
            self.world.step(in_flight=lambda: self.world.unload(name))
            self.seen["steps"] += 1
        else:
            self.world.unload(name)
        self.seen["unloads"] += 1

    @rule(steps=st.integers(1, 8))
    def step(self, steps) -> None:
        for _ in range(steps):
            if self.world.step() is None:
                return
            self.seen["steps"] += 1
            self.world.scheduler.check()

    @invariant()
    def books_agree(self) -> None:
        if hasattr(self, "world"):
            self.world.scheduler.check()

    @rule()
    def readers_know_what_is_found(self) -> None:
        """Exactly the unsalted pages that global groups find, with their tokens, whoever they came from."""
        while self.world.events.has_more:
            self.replay.follow(self.world.events.take(4))
        found = {
            public_hash(name): Told(prefix, None if adapter is None else adapter.name)
            for name, (prefix, adapter) in self.public.items()
            if self.world.is_found(name) and not (adapter is not None and adapter.is_unloaded)
        }
        if self.digest_bytes == 16:
            told = self.replay.pages
            assert set(told) == set(found)
            assert all(told[one] in (found[one], found[one]._replace(prefix=None)) for one in told)
            self.seen["pages told"] += sum(one.prefix is not None for one in told.values())
            self.seen["pages of adapters told"] += sum(one.lora_name is not None for one in told.values())
        else:
            assert set(self.replay.pages) <= {
                public_hash(name) for names in self.world.pool._page_of.values() for name in names
            }

    def teardown(self) -> None:
        if not hasattr(self, "world"):
            return
        self.readers_know_what_is_found()
        self.seen["steps"] += self.world.run()
        self.readers_know_what_is_found()
        stats = self.world.scheduler.stats()
        assert stats.pages_used == stats.running == stats.waiting == stats.queued_tokens == 0, (
            "something leaked"
        )
        assert set(stats.resident_adapters) <= set(self.world.adapters), "an unloaded adapter has a slot"
        assert stats.waiting_adapters == []
        started = [prompt for name, (prompt, _, _) in self.requests.items() if self.world.outputs[name]]
        assert stats.prompt_tokens == sum(map(len, started)), "each prompt counts once, preempted or not"
        for name, (prompt, max_tokens, ignore_eos) in self.requests.items():
            expected = expected_output(prompt, max_tokens, ignore_eos=ignore_eos)
            got = self.world.outputs[name]
            assert got == (expected[: len(got)] if name in self.aborted else expected)
        self.seen["preemptions"] += stats.preemptions
        self.seen["hits"] += stats.prefix_hits > 0


class CollidingMachine(Machine):
    """One-byte hashes: wrong hits happen, but books, writes and endings must stay right."""

    digest_bytes = 1
    seen: ClassVar[Counter[str]] = Counter()


def walk(machine: type[Machine], examples: int, length: int) -> Counter[str]:
    machine.seen.clear()
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=examples,
            stateful_step_count=length,
            deadline=None,
            database=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
    return machine.seen


@pytest.mark.parametrize("machine", [Machine, CollidingMachine])
def test_random_walks(machine: type[Machine]) -> None:
    walk(machine, examples=100, length=40)


@pytest.mark.slow
@pytest.mark.parametrize("machine", [Machine, CollidingMachine])
def test_ten_thousand_steps_of_random_walks(machine: type[Machine]) -> None:
    seen = walk(machine, examples=800, length=60)
    assert seen["steps"] > 10_000
    assert min(seen["preemptions"], seen["hits"], seen["aborts in flight"]) > 100, seen
    if machine is Machine:
        assert min(seen["pages told"], seen["pages of adapters told"]) > 100, seen


@pytest.mark.parametrize("windows", LAYOUTS)
@pytest.mark.parametrize(("digest_bytes", "depth"), [(16, 1), (16, 2), (1, 1)])
def test_a_thousand_steps_under_steady_load(
    windows: tuple[int | None, ...], digest_bytes: int, depth: int
) -> None:
    """Long runs in one world: the pool is always full, so pages are reused often."""
    rng = random.Random(f"{windows}")
    world = World(
        num_pages=pages_for_one(windows, 2, 12) + (6 if None in windows else 0),
        page_tokens=2,
        windows=windows,
        max_seqs=6,
        step_tokens=12,
        max_model_len=MAX_MODEL_LEN,
        digest_bytes=digest_bytes,
        depth=depth,
    )
    prompts: dict[str, list[int]] = {}
    for step in range(1000):
        if len(prompts) - len(world.reasons) < 9:
            shared = rng.choice((SHARED, SHARED[::-1], SHARED[2:]))[: rng.randrange(1, 11)]
            prompts[f"{step}"] = [*shared, *(rng.randrange(2, 6) for _ in range(rng.randrange(5)))]
            world.add(request(f"{step}", prompts[f"{step}"], 16, priority=rng.randrange(2), ignore_eos=True))
        world.step()
        world.scheduler.check()
    stats = world.scheduler.stats()
    assert stats.preemptions > 20
    assert stats.prefix_hits > 50
    world.run()
    for name, prompt in prompts.items():
        assert world.outputs[name] == expected_output(prompt, 16, ignore_eos=True)
