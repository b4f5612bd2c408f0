"""FakeEngine keeps the contract of Engine, so that what works with it works with the real one."""

import asyncio
from dataclasses import replace

import pytest

from cabochon.engine.engine import Engine
from cabochon.engine.errors import (
    Aborted,
    BadAdapter,
    BadPrompt,
    EngineDead,
    PromptTooLong,
    UnknownAdapter,
)
from cabochon.engine.fake import FAKE_INFO, FakeEngine, FakeFaults
from cabochon.engine.messages import AdapterInfo, GenerateRequest, RequestOutput, StepOutput
from cabochon.engine.sampling_params import SamplingParams


def request(prompt_ids: list[int], request_id: str = "r", **params: object) -> GenerateRequest:
    return GenerateRequest(request_id=request_id, prompt_ids=prompt_ids, params=SamplingParams(**params))


def outputs(engine: Engine, one: GenerateRequest) -> list[RequestOutput]:
    async def run() -> list[RequestOutput]:
        return [output async for output in engine.submit(one)]

    return asyncio.run(run())


def tokens(all_outputs: list[RequestOutput]) -> list[int]:
    return [token_id for output in all_outputs for token_id in output.token_ids]


def test_the_prompt_comes_back_again_and_again() -> None:
    made = outputs(FakeEngine(), request([7, 8, 9], max_tokens=5))
    assert tokens(made) == [7, 8, 9, 7, 8]
    assert [output.finish_reason for output in made] == [None] * 4 + ["length"]


def test_an_eos_ends_it_unless_ignored_or_too_early() -> None:
    ended = outputs(FakeEngine(), request([7, 1], max_tokens=9))
    assert tokens(ended) == [7, 1]
    assert (ended[-1].finish_reason, ended[-1].stop_token_id) == ("stop", 1)
    assert len(tokens(outputs(FakeEngine(), request([7, 1], max_tokens=9, ignore_eos=True)))) == 9
    assert tokens(outputs(FakeEngine(), request([7, 1], max_tokens=9, min_tokens=2))) == [7, 1, 7, 1]


def test_a_stop_token_ends_it() -> None:
    assert tokens(outputs(FakeEngine(), request([7, 8], max_tokens=9, stop_token_ids=(8,)))) == [7, 8]


def test_several_tokens_may_come_at_once() -> None:
    engine = FakeEngine(faults=FakeFaults(tokens_per_step=2))
    made = outputs(engine, request([7, 8, 9], max_tokens=5))
    assert [output.token_ids for output in made] == [[7, 8], [9, 7], [8]]


@pytest.mark.parametrize(
    ("prompt", "error"), [([], BadPrompt), ([5000], BadPrompt), ([7] * 2000, PromptTooLong)]
)
def test_it_checks_requests_as_the_real_engine_does(prompt: list[int], error: type[Exception]) -> None:
    engine = FakeEngine()
    with pytest.raises(error):
        outputs(engine, request(prompt, max_tokens=5))
    assert not engine.open


def test_it_refuses_on_demand() -> None:
    with pytest.raises(BadPrompt, match="on demand"):
        outputs(FakeEngine(faults=FakeFaults(refuses=BadPrompt("on demand"))), request([7], max_tokens=5))


def test_its_death_ends_open_and_later_requests() -> None:
    engine = FakeEngine(faults=FakeFaults(dies_after_tokens=3))
    for _ in range(2):
        with pytest.raises(EngineDead, match="exit code -9"):
            outputs(engine, request([7], max_tokens=5))
    assert engine.dead_reason() is not None


def test_shutdown_ends_open_requests_and_may_be_repeated() -> None:
    async def run() -> None:
        engine = FakeEngine(faults=FakeFaults(is_paused=True))
        waiting = asyncio.ensure_future(anext(engine.submit(request([7], max_tokens=5))))
        await asyncio.sleep(0.01)
        await engine.shutdown()
        await engine.shutdown()
        with pytest.raises(EngineDead, match="shut down"):
            await waiting

    asyncio.run(run())


def test_an_aborted_request_is_closed_and_yields_no_more() -> None:
    async def run() -> None:
        engine = FakeEngine()
        stream = engine.submit(request([7], max_tokens=100))
        await anext(stream)
        engine.abort("r")
        engine.abort("unknown")
        assert (engine.aborted, engine.open) == (["r"], {})
        with pytest.raises(Aborted, match="request r was aborted"):
            await asyncio.wait_for(anext(stream), 5)

    asyncio.run(run())


def test_submit_opens_the_request_before_the_first_anext() -> None:
    engine = FakeEngine()
    engine.submit(request([7], max_tokens=5))
    assert list(engine.open) == ["r"]
    assert engine.stats().running == 1


def test_listeners_hear_of_every_step() -> None:
    engine = FakeEngine()
    steps: list[StepOutput] = []
    engine.on_step(steps.append)
    outputs(engine, request([7], max_tokens=3))
    assert [step.stats.generation_tokens for step in steps] == [1, 2, 3]


def test_publish_is_recorded() -> None:
    engine = FakeEngine()
    engine.publish("r")
    assert engine.published == ["r"]


def test_adapters_come_and_go_and_open_requests_keep_theirs() -> None:
    async def run() -> None:
        first = AdapterInfo(name="a", path="/a", rank=8, num_bytes=1, base_model=None)
        engine = FakeEngine(replace(FAKE_INFO, max_loras=2, adapters=[first]))
        assert (await engine.load_adapter("b", "/b")).path == "/b"
        for name, path in (("b", "/other"), ("c", "/bad")):
            with pytest.raises(BadAdapter):
                await engine.load_adapter(name, path)
        await engine.load_adapter("b", "/other", replace=True)
        assert list(engine.adapters) == ["a", "b"]
        kept = engine.submit(replace(request([7], max_tokens=1), adapter="a"))
        await engine.unload_adapter("a")
        assert (await anext(kept)).token_ids == [7]
        with pytest.raises(UnknownAdapter, match="a is not"):
            await anext(engine.submit(replace(request([7], max_tokens=1), adapter="a")))
        with pytest.raises(UnknownAdapter):
            await engine.unload_adapter("a")
        assert not engine.open
        engine.die("gone")
        for change in (engine.load_adapter("d", "/d"), engine.unload_adapter("b")):
            with pytest.raises(EngineDead, match="gone"):
                await change

    asyncio.run(run())


def test_an_engine_without_slots_takes_no_adapter() -> None:
    with pytest.raises(BadAdapter):
        asyncio.run(FakeEngine().load_adapter("a", "/a"))
