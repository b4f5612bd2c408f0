"""Guarded choices of an engine: each by itself, what a block aborts, how it is counted."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing

import pytest
from fake_server import TOKENIZER

from cabochon.engine.detokenizer import Detokenizer, TokenBytes
from cabochon.engine.fake import FakeEngine, FakeFaults
from cabochon.engine.messages import GenerateRequest
from cabochon.engine.sampling_params import SamplingParams
from cabochon.server.armor.response_guard import Approve, Blocked, Windows, guarded
from cabochon.server.armor.verdicts import Mode
from cabochon.server.generation import Choice, Delta, Guard, run_choices
from cabochon.server.metrics import Metrics

HELLO, WORLD, STOP = (TOKENIZER.token_to_id(piece) for piece in ("hello", "▁world", "stop"))
TOKEN_BYTES = TokenBytes(TOKENIZER)
WINDOWS = Windows(first_chars=12, max_chars=24, hold_back_chars=12)


def choice(
    index: int, *prompt: int, max_tokens: int = 40, logprobs: int | None = None, stop: str = ""
) -> Choice:
    params = SamplingParams(max_tokens=max_tokens, logprobs=logprobs)
    request = GenerateRequest(request_id=f"r{index}", prompt_ids=list(prompt), params=params)
    return Choice(index, request, Detokenizer(TOKEN_BYTES, stop=[stop]))


def blocks(word: str) -> Approve:
    async def approve(context: str, text: str) -> str:
        await asyncio.sleep(0)
        if word in text:
            raise Blocked(("rai:harassment",))
        return text

    return approve


def guard(approve: Approve, mode: Mode = "window") -> Guard:
    def of_choice(choice: Choice, deltas: AsyncGenerator[Delta, None]) -> AsyncGenerator[Delta, None]:
        return guarded(deltas, approve, mode=mode, windows=WINDOWS)

    return of_choice


class Run:
    def __init__(self, **faults: int) -> None:
        self.engine = FakeEngine(faults=FakeFaults(**faults))
        self.metrics = Metrics(self.engine, "fake")
        self.deltas: list[Delta] = []
        self.aborted: list[str] = []  # at the end

    def all(self, guard: Guard, *choices: Choice) -> "Run":
        async def collect() -> None:
            before = asyncio.all_tasks()
            async with aclosing(run_choices(self.engine, choices, self.metrics, guard)) as deltas:
                async for delta in deltas:
                    self.deltas.append(delta)
                self.aborted = list(self.engine.aborted)
                assert len(asyncio.all_tasks()) == len(before)

        try:
            asyncio.run(asyncio.wait_for(collect(), 10))
        finally:
            assert not self.engine.open
        return self

    def text(self, index: int) -> str:
        return "".join(delta.text for delta in self.deltas if delta.index == index)

    def ends(self) -> dict[str, float]:
        (success,) = [f for f in self.metrics.registry.collect() if f.name == "vllm:request_success"]
        return {sample.labels["finished_reason"]: sample.value for sample in success.samples if sample.value}


@pytest.mark.parametrize("mode", ["window", "strict", "optimistic"])
def test_a_block_ends_one_choice_and_the_others_go_on(mode: Mode) -> None:
    choices = [choice(0, HELLO), choice(1, HELLO, WORLD), choice(2, HELLO)]
    run = Run().all(guard(blocks("world"), mode), *choices)
    assert [run.text(index) for index in (0, 2)] == ["hello" * 40] * 2
    assert [one.finish_reason for one in choices] == ["length", "content_filter", "length"]
    assert sum(delta.num_tokens for delta in run.deltas) == sum(one.num_tokens for one in choices)
    if mode == "strict":  # the engine had ended all three
        assert (run.aborted, run.ends()) == ([], {"length": 3})
    else:
        assert (run.aborted, run.ends()) == (["r1"], {"length": 2, "abort": 1})
        assert choices[1].num_tokens < 40
    assert run.text(1) == "" or mode == "optimistic"


def test_a_block_of_the_only_choice_ends_its_request() -> None:
    run = Run().all(guard(blocks("world")), choice(0, HELLO, HELLO, HELLO, HELLO, WORLD))
    assert ("hello" * 4).startswith(run.text(0))
    assert [delta.finish_reason for delta in run.deltas if delta.finish_reason] == ["content_filter"]
    assert (run.aborted, run.ends()) == (["r0"], {"abort": 1})


@pytest.mark.parametrize("count", [1, 3])
def test_an_outage_ends_all_of_them(count: int) -> None:
    async def approve(context: str, text: str) -> str:
        raise ConnectionError("no answer")

    run = Run()
    with pytest.raises(ConnectionError):
        run.all(guard(approve), *(choice(index, HELLO, WORLD) for index in range(count)))
    assert run.deltas == []
    assert sorted(run.engine.aborted) == [f"r{index}" for index in range(count)]
    assert run.ends() == {"abort": count}


def test_the_engine_has_started_before_a_guard_lets_anything_go() -> None:
    calls: list[str] = []

    async def approve(context: str, text: str) -> str:
        calls.append("approve")
        return text

    async def collect() -> None:
        engine = FakeEngine()
        deltas = run_choices(
            engine,
            [choice(0, HELLO, WORLD)],
            Metrics(engine, "fake"),
            guard(approve),
            lambda: calls.append("started"),
        )
        assert len([delta async for delta in deltas]) > 1

    asyncio.run(collect())
    assert calls[0] == "started"
    assert calls.count("started") == 40


@pytest.mark.parametrize("tokens_per_step", [1, 3])
@pytest.mark.parametrize("mode", ["window", "strict", "optimistic"])
def test_tokens_of_a_stop_string_leave_no_log_probabilities(mode: Mode, tokens_per_step: int) -> None:
    """Their text is never said, so no check sees it."""
    prompt = [HELLO, WORLD, HELLO, WORLD, STOP]  # `world` is held back twice
    run = Run(tokens_per_step=tokens_per_step)
    run.all(guard(blocks("never"), mode), choice(0, *prompt, logprobs=1, stop="worldstop"))
    assert run.text(0) == "hello worldhello "
    scored = [delta.scored for delta in run.deltas if delta.scored is not None]
    tokens = [token_id for one in scored for token_id in one.token_ids]
    assert tokens == prompt[:3]
    assert all(one is not None and one.top_ids == [] for group in scored for one in group.logprobs)
