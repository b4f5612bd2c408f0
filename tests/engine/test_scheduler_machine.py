"""Random walks over scheduler and pages, `check()` after each step, outputs against the naive model."""

import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test
from paged_world import World, expected_output, request

SHARED = [7, 8, 9, 10, 11, 12, 13, 14, 15, 16]  # prompts overlap, so that prefixes are shared


class Machine(RuleBasedStateMachine):
    """Adds, aborts, publishes and steps in any order."""

    digest_bytes = 16

    @initialize(
        windows=st.sampled_from([(None,), (None, 6), (5, None, 5), (1, None), (3, 9), (4, 4, None)]),
        page_tokens=st.sampled_from([1, 2, 4]),
        spare=st.integers(0, 20),
        max_seqs=st.integers(1, 4),
        step_tokens=st.integers(4, 24),
        caching=st.booleans(),
    )
    def start(self, windows, page_tokens, spare, max_seqs, step_tokens, caching) -> None:
        need = sum(
            -(-32 // page_tokens)
            if w is None
            else min(-(-32 // page_tokens), -(-(w - 1 + step_tokens) // page_tokens) + 1)
            for w in windows
        )
        self.world = World(
            num_pages=need + spare,
            page_tokens=page_tokens,
            windows=windows,
            max_seqs=max_seqs,
            step_tokens=step_tokens,
            max_model_len=32,
            digest_bytes=self.digest_bytes,
            caching=caching,
        )
        self.requests: dict[str, tuple[list[int], int]] = {}
        self.aborted: set[str] = set()

    @rule(
        shared=st.integers(0, len(SHARED)),
        own=st.lists(st.integers(2, 5), max_size=8),
        max_tokens=st.integers(1, 12),
        priority=st.integers(0, 2),
        salt=st.sampled_from([None, "x"]),
        is_private=st.booleans(),
    )
    def add(self, shared, own, max_tokens, priority, salt, is_private) -> None:
        if len(self.requests) - len(self.aborted) - len(self.world.reasons) >= 8:
            return
        prompt = [*SHARED[:shared], *own] or [2]
        name = f"{len(self.requests)}"
        self.requests[name] = (prompt, max_tokens)
        self.world.add(
            request(name, prompt, max_tokens, priority=priority, cache_salt=salt, is_private=is_private)
        )

    @rule(data=st.data())
    def abort(self, data) -> None:
        open_ones = [n for n in self.requests if n not in self.world.reasons and n not in self.aborted]
        if open_ones:
            name = data.draw(st.sampled_from(open_ones))
            self.world.scheduler.abort(name)
            self.aborted.add(name)

    @rule(data=st.data())
    def publish(self, data) -> None:
        if self.requests:
            self.world.scheduler.publish(data.draw(st.sampled_from(list(self.requests))))

    @rule(steps=st.integers(1, 8))
    def step(self, steps) -> None:
        for _ in range(steps):
            if self.world.step() is None:
                return
            self.world.scheduler.check()

    @invariant()
    def books_agree(self) -> None:
        if hasattr(self, "world"):
            self.world.scheduler.check()

    def teardown(self) -> None:
        if not hasattr(self, "world"):
            return
        self.world.run()
        assert self.world.pool.num_used == 0, "pages leaked"
        for name, (prompt, max_tokens) in self.requests.items():
            expected = expected_output(prompt, max_tokens)
            if name in self.aborted:
                assert self.world.outputs[name] == expected[: len(self.world.outputs[name])]
            else:
                assert self.world.outputs[name] == expected


class CollidingMachine(Machine):
    """One-byte hashes: wrong hits happen, but books, writes and endings must stay right."""

    digest_bytes = 1


@pytest.mark.parametrize("machine", [Machine, CollidingMachine])
def test_random_walks(machine: type[Machine]) -> None:
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=60, stateful_step_count=30, deadline=None, suppress_health_check=list(HealthCheck)
        ),
    )


@pytest.mark.slow
@pytest.mark.parametrize("machine", [Machine, CollidingMachine])
def test_ten_thousand_steps_of_random_walks(machine: type[Machine]) -> None:
    steps = 0
    original = World.step

    def counted(world: World) -> object:
        nonlocal steps
        steps += 1
        return original(world)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(World, "step", counted)
        run_state_machine_as_test(
            machine,
            settings=settings(
                max_examples=500,
                stateful_step_count=50,
                deadline=None,
                suppress_health_check=list(HealthCheck),
            ),
        )
    assert steps > 10_000
