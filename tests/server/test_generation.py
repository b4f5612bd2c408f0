"""Choices over an engine: deltas as they come, and what ends with what when one ends early."""

import asyncio
from collections import defaultdict
from collections.abc import AsyncIterator, Awaitable, Sequence
from contextlib import aclosing

import pytest
from fake_server import TOKENIZER

from cabochon.engine.detokenizer import Detokenizer, TokenBytes
from cabochon.engine.errors import ComputeError, EngineDead, EngineError
from cabochon.engine.fake import FakeEngine, FakeFaults
from cabochon.engine.messages import GenerateRequest, RequestOutput
from cabochon.engine.sampling_params import SamplingParams
from cabochon.server.generation import Choice, Delta, run_choices
from cabochon.server.metrics import Metrics

HELLO, WORLD = TOKENIZER.token_to_id("hello"), TOKENIZER.token_to_id("▁world")
HALF = TOKENIZER.token_to_id("<0xF0>")  # the first byte of an emoji
TOKEN_BYTES = TokenBytes(TOKENIZER)


def choice(
    index: int, prompt: Sequence[int] = (HELLO,), *, max_tokens: int = 3,
    stop_token_ids: tuple[int, ...] = (), **detokenizer: object,
) -> Choice:  # fmt: skip
    params = SamplingParams(max_tokens=max_tokens, stop_token_ids=stop_token_ids)
    request = GenerateRequest(request_id=f"r{index}", prompt_ids=list(prompt), params=params)
    return Choice(index, request, Detokenizer(TOKEN_BYTES, **detokenizer))


class Kept(FakeEngine):
    """Its streams do not close themselves when they are dropped, as EngineClient's do not."""

    def submit(self, request: GenerateRequest) -> AsyncIterator[RequestOutput]:
        stream = super().submit(request)
        self.__dict__.setdefault("streams", []).append(stream)
        return stream


class Run:
    """An engine, its metrics, and the deltas that came; what was aborted when they ended."""

    def __init__(self, engine: FakeEngine | None = None, **faults: object) -> None:
        self.engine = engine or Kept(faults=FakeFaults(**faults))
        self.metrics = Metrics(self.engine, "fake")
        self.deltas: list[Delta] = []
        self.aborted: list[str] = []

    async def all(self, *choices: Choice, until: int | None = None) -> None:
        """Collect deltas; close after `until` of them."""
        try:
            async with aclosing(run_choices(self.engine, choices, self.metrics)) as deltas:
                async for delta in deltas:
                    self.deltas.append(delta)
                    if len(self.deltas) == until:
                        return
        finally:
            self.aborted = sorted(self.engine.aborted)

    def ends(self) -> dict[str, float]:
        (success,) = [f for f in self.metrics.registry.collect() if f.name == "vllm:request_success"]
        return {sample.labels["finished_reason"]: sample.value for sample in success.samples if sample.value}

    def observed(self) -> tuple[int, int]:
        """First tokens, and gaps between tokens."""
        text = self.metrics.render().decode()
        names = ("time_to_first_token", "inter_token_latency")
        first, gaps = (int(text.split(f"{name}_seconds_count")[1].split()[1]) for name in names)
        return first, gaps

    def by_choice(self) -> dict[int, list[str]]:
        texts = defaultdict(list)
        for delta in self.deltas:
            texts[delta.index].append(delta.text)
        return dict(texts)


def go(work: Awaitable[None]) -> None:
    asyncio.run(asyncio.wait_for(work, 10))


class Scripted(Kept):
    """Answers every request with the given outputs: (token ids, finish reason)."""

    def __init__(self, *outputs: tuple[list[int], str | None]) -> None:
        super().__init__()
        self._outputs = outputs

    async def _stream(self, request: GenerateRequest) -> AsyncIterator[RequestOutput]:
        for token_ids, reason in self._outputs:
            if reason is not None:
                self.open.pop(request.request_id, None)
            yield RequestOutput(request_id=request.request_id, token_ids=token_ids, finish_reason=reason)


class OneFails(Kept):
    """The second token of r1 is NaN."""

    async def _next_step(self, request_id: str) -> None:
        await super()._next_step(request_id)
        if request_id == "r1" and self._num_generated >= 4:
            raise ComputeError("NaN")


def test_a_choice_gives_a_delta_for_every_output() -> None:
    run = Run(cached_tokens=7)
    go(run.all(choice(4, [HELLO, WORLD])))
    assert run.deltas == [
        Delta(4, "hello", 1, 7, None),
        Delta(4, " world", 1, 7, None),
        Delta(4, "hello", 1, 7, "length"),
    ]
    assert run.observed() == (1, 2)
    assert run.ends() == {"length": 1}
    assert run.aborted == []


def test_several_tokens_of_a_step_are_one_delta() -> None:
    run = Run(tokens_per_step=2)
    one = choice(0, [HELLO, WORLD])
    go(run.all(one))
    assert [(delta.text, delta.num_tokens) for delta in run.deltas] == [("hello world", 2), ("hello", 1)]
    assert one.num_tokens == 3


def test_choices_come_mixed_and_each_in_its_own_order() -> None:
    run = Run()
    go(run.all(choice(0, [HELLO, WORLD]), choice(1, [WORLD, HELLO]), choice(2, max_tokens=1)))
    assert run.by_choice() == {
        0: ["hello", " world", "hello"],
        1: [" world", "hello", " world"],
        2: ["hello"],
    }
    assert [delta.index for delta in run.deltas] != sorted(delta.index for delta in run.deltas)
    assert run.ends() == {"length": 3}


@pytest.mark.parametrize(("include_stop", "text"), [(False, "hello"), (True, "hello world")])
def test_a_stop_token_counts_and_its_text_is_shown_on_request(include_stop: bool, text: str) -> None:
    run = Run(tokens_per_step=2)
    go(run.all(choice(0, [HELLO, WORLD], stop_token_ids=(WORLD,), include_stop=include_stop)))
    assert run.deltas == [Delta(0, text, 2, 0, "stop")]
    assert run.ends() == {"stop": 1}


def test_a_stop_string_ends_the_choice_and_its_request() -> None:
    run = Run()
    go(run.all(choice(0, [HELLO, WORLD], stop=["wor"], max_tokens=9), choice(1, max_tokens=4)))
    assert run.by_choice() == {0: ["hello", " "], 1: ["hello"] * 4}
    assert [delta.finish_reason for delta in run.deltas if delta.index == 0] == [None, "stop"]
    assert run.aborted == ["r0"]
    assert run.ends() == {"stop": 1, "length": 1}


def test_a_stop_string_in_the_last_token_aborts_nothing() -> None:
    run = Run()
    go(run.all(choice(0, [HELLO, WORLD], stop=["wor"], max_tokens=2)))
    assert run.deltas[-1] == Delta(0, " ", 1, 0, "stop")
    assert run.aborted == []
    assert run.ends() == {"stop": 1}


def test_a_stop_string_that_only_the_flush_completes_ends_the_choice() -> None:
    run = Run()
    go(run.all(choice(0, [HELLO, HALF], stop=["\ufffd"], max_tokens=2)))
    assert [(delta.text, delta.finish_reason) for delta in run.deltas] == [("hello", None), ("", "stop")]


def test_a_last_output_without_tokens_ends_the_choice() -> None:
    run = Run(Scripted(([HELLO], None), ([], "stop")))
    go(run.all(choice(0)))
    assert run.deltas == [Delta(0, "hello", 1, 0, None), Delta(0, "", 0, 0, "stop")]
    assert run.observed() == (1, 0)
    assert run.aborted == []


@pytest.mark.parametrize("count", [1, 3])
def test_closing_early_aborts_every_request(count: int) -> None:
    run = Run()
    go(run.all(*(choice(i, max_tokens=100) for i in range(count)), until=count))
    assert run.aborted == [f"r{i}" for i in range(count)]
    assert not run.engine.open
    assert run.ends() == {"abort": count}


def test_closing_early_leaves_a_finished_choice_alone() -> None:
    run = Run()
    go(run.all(choice(0, max_tokens=1), choice(1, max_tokens=100), until=6))
    assert run.aborted == ["r1"]
    assert run.ends() == {"length": 1, "abort": 1}


def test_what_is_never_asked_for_never_starts() -> None:
    run = Run()

    async def close() -> None:
        await run_choices(run.engine, [choice(0), choice(1)], run.metrics).aclose()

    go(close())
    assert run.engine.seen == []


@pytest.mark.parametrize("count", [1, 3])
def test_cancelling_aborts_every_request(count: int) -> None:
    run = Run(is_paused=True)

    async def cancel() -> None:
        task = asyncio.create_task(run.all(*(choice(i) for i in range(count))))
        while len(run.engine.open) < count:
            await asyncio.sleep(0)
        task.cancel()
        await asyncio.wait([task])

    go(cancel())
    assert run.aborted == [f"r{i}" for i in range(count)]
    assert run.ends() == {"abort": count}


@pytest.mark.parametrize("error", [ComputeError("NaN"), EngineDead("gone"), RuntimeError("a mistake")])
def test_an_error_of_the_only_choice_is_raised(error: EngineError) -> None:
    run = Run(fails_after_tokens={2: error})
    with pytest.raises(type(error)) as caught:
        go(run.all(choice(0)))
    assert caught.value is error
    assert run.by_choice() == {0: ["hello"]}
    assert run.ends() == {"error": 1}


def test_an_error_of_one_choice_aborts_those_that_still_run() -> None:
    run = Run(OneFails())
    with pytest.raises(ComputeError, match="NaN"):
        go(run.all(choice(0, max_tokens=100), choice(1), choice(2, max_tokens=100), choice(3, max_tokens=1)))
    assert run.aborted == ["r0", "r2"]
    assert not run.engine.open
    assert run.ends() == {"error": 1, "abort": 2, "length": 1}


@pytest.mark.parametrize("count", [1, 2])
def test_a_mistake_of_ours_aborts_the_request(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    run, one = Run(), choice(0, max_tokens=100)
    monkeypatch.setattr(one.detokenizer, "feed", lambda _: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        go(run.all(one, *(choice(i) for i in range(1, count))))
    assert "r0" in run.aborted
