"""The real server over the real engine, through the real `openai` client: what a user gets, come what may.

The demo answers in bf16, which gives the same tokens in any company but not from the prefix cache: prompts
whose texts are compared are shorter than a page or have a salt of their own. The tiny random model is fp32.
"""

import asyncio
import json
import re
import shlex
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import httpx
import openai
import pytest
from fake_server import wait_until
from real_server import RealServer, is_gone
from tools import ran_without_amx

ROOT = Path(__file__).parents[2]
NAME = "demo"  # of every model here
FRANCE = "The capital of France is"
HELLO: list[Any] = [{"role": "user", "content": "hello"}]
SHORT = [FRANCE, "Once upon a time", "1, 2, 3,", "def main():"]  # less than a page each
LONG = "A page of the cache holds sixteen tokens. " * 20
MARKER = "xyzzyMARKERplugh"  # part of every prompt that must leave no trace
TINY: dict[str, Any] = {"dtype": "fp32", "kv_cache_gib": 0.02, "page_tokens": 4, "served_model_name": NAME}
# A second at least: not over before a test stops the engine or looks at it.
ENDLESS: dict[str, Any] = {"max_tokens": 300, "extra_body": {"ignore_eos": True}}
HISTOGRAMS = (
    "iteration_tokens_total", "time_to_first_token_seconds", "inter_token_latency_seconds",
    "request_time_per_output_token_seconds", "request_queue_time_seconds", "request_prefill_time_seconds",
    "request_decode_time_seconds", "request_inference_time_seconds", "e2e_request_latency_seconds",
)  # fmt: skip
BAD_BODIES = [
    b"", b"{", b"[]", b"\xff\xfe", b'{"prompt": "\xff"}', b"[" * 100_000, b'{"prompt": ""}',
    b'{"prompt": []}',
    b'{"prompt": [-1]}', b'{"prompt": [400000]}', b'{"prompt": [1, "a"]}', b'{"prompt": ["a", ""]}',
    *(b'{"prompt": "a", %s}' % field for field in (
        b'"temperature": NaN', b'"temperature": -1', b'"top_p": 0', b'"max_tokens": 0',
        b'"max_tokens": 99999',
        b'"min_tokens": 17', b'"n": 100000', b'"seed": -1', b'"logit_bias": {"400000": 1}',
        b'"model": "gpt-4"',
        b'"stop_token_ids": [400000]', b'"temprature": 1', b'"tools": [{}]', b'"stream": "yes"',
        b'"stop": [%s]' % b",".join([b'"x"'] * 10_000),
    )),
    b'{"prompt": "%s"}' % (b"too long " * 40_000), b'{"prompt": [%s 1]}' % (b"1," * 40_000),
]  # fmt: skip
HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: "
BAD_BYTES = [
    b"\x16\x03\x01\x02",
    b"NONSENSE\r\n\r\n",
    HEAD + b"999999999\r\n\r\n",
    HEAD + b'50\r\n\r\n{"prompt": "a',
]


@pytest.fixture(scope="module")
def demo(demo_dir: Path) -> Iterator[RealServer]:
    with RealServer("demo", kv_cache_gib=0.3, log_level="debug") as server:
        yield server


@pytest.fixture(scope="module")
def client(demo: RealServer) -> Iterator[openai.OpenAI]:
    with demo.client() as one:
        yield one


def complete(client: openai.OpenAI, prompt: Any = FRANCE, **fields: Any) -> Any:
    """Greedy, unless told otherwise, and without the pages of others."""
    extra = {"cache_salt": uuid4().hex, **fields.pop("extra_body", {})}
    given = {"model": NAME, "max_tokens": 16, "temperature": 0, **fields}
    return client.completions.create(prompt=prompt, extra_body=extra, **given)


def text(client: openai.OpenAI, prompt: Any = FRANCE, **fields: Any) -> str:
    return str(complete(client, prompt, **fields).choices[0].text)


def together(server: RealServer, prompts: list[Any], **fields: Any) -> list[str]:
    """Greedy texts of all prompts, streamed at once."""

    async def one(client: openai.AsyncOpenAI, prompt: Any) -> str:
        stream = await client.completions.create(
            model=NAME, prompt=prompt, temperature=0, stream=True, **fields
        )
        return "".join([chunk.choices[0].text async for chunk in stream])

    async def run() -> list[str]:
        async with server.async_client() as client:
            return await asyncio.gather(*(one(client, prompt) for prompt in prompts))

    return asyncio.run(run())


def join(stream: Any) -> str:
    return "".join(chunk.choices[0].text for chunk in stream if chunk.choices)


def started(client: openai.OpenAI, prompts: list[Any], **fields: Any) -> list[Any]:
    """Streams that have had their first token: the server sends no status before."""
    return [complete(client, prompt, stream=True, **fields) for prompt in prompts]


def wait_until_idle(server: RealServer, timeout_s: float = 10) -> None:
    wait_until(lambda: server.metric("num_requests_running") == 0, timeout_s)
    assert server.metric("kv_cache_usage_perc") == 0
    assert server.metric("num_requests_waiting") == 0


def test_health_is_200_as_soon_as_the_banner_is_out(demo: RealServer) -> None:
    assert demo.health_at_banner == 200


def test_the_curl_of_the_readme_answers_with_text(demo: RealServer) -> None:
    command = re.search(r"curl http.*?\}'", (ROOT / "README.md").read_text(), re.DOTALL)
    assert command is not None
    _, url, _, header, _, body = shlex.split(command[0].replace("\\\n", " "))
    assert json.loads(body) == {"prompt": FRANCE, "max_tokens": 16, "temperature": 0}
    url = url.replace("http://127.0.0.1:8000", demo.url)
    name, _, value = header.partition(": ")
    answer = httpx.post(url, content=body, headers={name: value}, timeout=60)
    assert answer.status_code == 200
    assert len(answer.json()["choices"][0]["text"].split()) > 5


@pytest.mark.parametrize("size", [70_000, 200_000, 1_000_000])
def test_a_body_of_several_reads_is_answered(demo: RealServer, size: int) -> None:
    content = b'{"prompt": "a", "max_tokens": 1}'.ljust(size)
    answer = demo.send(content)
    assert answer.status_code == 200, answer.text


def test_a_text_and_its_token_ids_are_the_same_prompt(demo: RealServer, client: openai.OpenAI) -> None:
    ids = demo.http.post("/tokenize", json={"prompt": FRANCE}).json()["tokens"]
    assert text(client, ids) == text(client, FRANCE)


def test_a_batch_has_the_choices_of_each_prompt_in_order(client: openai.OpenAI) -> None:
    alone = [text(client, prompt, max_tokens=6) for prompt in SHORT[:2]]
    answer = complete(client, SHORT[:2], n=2, echo=True, max_tokens=6)
    expected = [prompt + alone[i] for i, prompt in enumerate(SHORT[:2]) for _ in range(2)]
    assert [choice.text for choice in answer.choices] == expected
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert answer.usage.completion_tokens == 24


def test_a_streamed_completion_has_the_text_and_usage_of_a_whole_one(client: openai.OpenAI) -> None:
    whole = complete(client)
    chunks = list(complete(client, stream=True, stream_options={"include_usage": True}))
    assert join(chunks) == whole.choices[0].text
    assert len(chunks) > 8
    assert [chunk.usage for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
    assert chunks[-1].usage == whole.usage
    assert chunks[-2].choices[0].finish_reason == whole.choices[0].finish_reason == "length"


def test_a_chat_is_the_same_streamed_or_whole_from_either_client(
    demo: RealServer, client: openai.OpenAI
) -> None:
    fields: dict[str, Any] = {"model": "demo", "messages": HELLO, "max_tokens": 12, "temperature": 0}
    whole = client.chat.completions.create(**fields)

    async def streamed() -> str:
        async with demo.async_client() as one:
            stream = await one.chat.completions.create(**fields, stream=True)
            return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

    assert whole.choices[0].message.role == "assistant"
    assert whole.choices[0].message.content == asyncio.run(streamed())
    assert whole.usage is not None
    assert whole.usage.completion_tokens == 12


def test_a_repeated_long_prompt_comes_from_the_cache(client: openai.OpenAI) -> None:
    salt = {"cache_salt": uuid4().hex}
    first, second = (complete(client, LONG, max_tokens=1, extra_body=salt).usage for _ in range(2))
    assert first.prompt_tokens_details.cached_tokens == 0
    assert second.prompt_tokens - 17 <= second.prompt_tokens_details.cached_tokens < second.prompt_tokens
    assert first.prompt_tokens == second.prompt_tokens


def test_a_seed_gives_the_same_sample_and_another_seed_another(client: openai.OpenAI) -> None:
    samples = [text(client, temperature=1.5, seed=seed) for seed in (7, 7, 8)]
    assert samples[0] == samples[1] != samples[2]


def test_a_stop_string_ends_the_text_before_it(client: openai.OpenAI) -> None:
    whole = text(client)
    stop = whole[10:15]  # starts and ends within words
    choice = complete(client, stop=[stop, "never seen"]).choices[0]
    assert choice.text == whole[: whole.index(stop)]
    assert choice.finish_reason == "stop"


def test_logit_bias_forces_a_token_and_bans_one(demo: RealServer, client: openai.OpenAI) -> None:
    gem, first = (
        demo.http.post("/tokenize", json={"prompt": word, "add_special_tokens": False}).json()["tokens"][0]
        for word in (" gem", text(client, max_tokens=1))
    )
    assert text(client, logit_bias={str(gem): 100}, max_tokens=4) == " gem gem gem gem"
    assert text(client, logit_bias={str(first): -100}, max_tokens=1) != text(client, max_tokens=1)


def test_max_tokens_ends_the_text_with_length(client: openai.OpenAI) -> None:
    answer = complete(client, max_tokens=5)
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage.completion_tokens == 5


def test_openai_names_its_errors(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as bad:
        complete(client, top_p=-1)
    assert bad.value.param == "top_p"
    with pytest.raises(openai.NotFoundError) as missing:
        complete(client, model="gpt-4")
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as long:
        complete(client, [5] * 32_760)
    assert long.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError) as outside:
        complete(client, [262_144 + 1000])
    assert outside.value.param == "prompt"


def test_the_model_is_listed(client: openai.OpenAI) -> None:
    (model,) = client.models.list()
    assert (model.id, model.owned_by) == ("demo", "cabochon")


def test_64_streams_at_once_have_the_text_of_one_alone(demo: RealServer, client: openai.OpenAI) -> None:
    alone = [text(client, prompt, max_tokens=5) for prompt in SHORT]
    assert together(demo, SHORT * 16, max_tokens=5) == alone * 16
    wait_until_idle(demo)


def test_a_closed_stream_frees_its_pages_and_harms_no_other(
    demo: RealServer, client: openai.OpenAI, request: pytest.FixtureRequest
) -> None:
    if ran_without_amx(request):  # with it, the rows of the long prompt change bits of the other stream's
        return
    expected = text(client, max_tokens=24)
    aborted = demo.metric("request_success_total", finished_reason="abort")
    (other,) = started(client, [FRANCE], max_tokens=24)
    (closed,) = started(client, [LONG], max_tokens=5000)  # minutes, if it were not closed
    used = demo.metric("kv_cache_usage_perc")
    closed.close()
    wait_until(lambda: demo.metric("num_requests_running") <= 1, 5)
    assert demo.metric("kv_cache_usage_perc") < used / 2
    assert join(other) == expected
    wait_until_idle(demo)
    assert demo.metric("request_success_total", finished_reason="abort") == aborted + 1


def test_a_storm_of_bad_bodies_harms_no_stream(demo: RealServer, client: openai.OpenAI) -> None:
    expected = [join(stream) for stream in started(client, SHORT, max_tokens=40)]
    streams = started(client, SHORT, max_tokens=40)
    for content in BAD_BODIES:
        answer = demo.send(content)
        assert 400 <= answer.status_code < 500, content[:100]
        assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
    for data in BAD_BYTES:
        address = demo.url.removeprefix("http://").split(":")
        with socket.create_connection((address[0], int(address[1])), timeout=30) as sock:
            sock.sendall(data)
    assert demo.metric("num_requests_running") == 4, "the storm must end before the streams do"
    assert [join(stream) for stream in streams] == expected


def test_no_prompt_and_no_answer_is_in_a_log_or_a_metric(demo: RealServer, client: openai.OpenAI) -> None:
    answer = text(client, MARKER, echo=True, max_tokens=20, stop=[MARKER + "!"], user=MARKER)
    join(complete(client, f"{MARKER} streamed", stream=True))
    client.chat.completions.create(model=NAME, messages=[{"role": "user", "content": MARKER}], max_tokens=1)
    for content in (
        b'{"prompt": "%s' % MARKER.encode(),
        json.dumps({"prompt": MARKER, "temperature": MARKER}).encode(),
        json.dumps({"prompt": [MARKER, 5]}).encode(),
        json.dumps({"prompt": MARKER * 20_000}).encode(),
    ):
        refused = demo.send(content)
        assert refused.status_code == 400
        assert MARKER not in refused.text
    seen = demo.output() + demo.metrics()
    assert "path=/v1/completions status=200" in seen
    assert "path=/v1/completions status=400" in seen
    assert MARKER not in seen
    assert answer.startswith(MARKER)
    assert answer.removeprefix(MARKER) not in seen


def test_metrics_have_vllms_names_and_count_what_the_usage_says(
    demo: RealServer, client: openai.OpenAI
) -> None:
    counters = ("prompt_tokens_total", "generation_tokens_total", "prefix_cache_queries_total")
    before = [demo.metric(name) for name in counters]
    usage = complete(client).usage
    wait_until_idle(demo)
    counted = [demo.metric(name) - old for name, old in zip(counters, before, strict=True)]
    assert counted == [usage.prompt_tokens, usage.completion_tokens, usage.prompt_tokens]
    assert all(demo.metric(f"{name}_count") > 0 for name in HISTOGRAMS)
    for name in ("prefix_cache_hits_total", "num_preemptions_total", "cache_config_info"):
        assert demo.metric(name) >= 0


def test_a_pool_too_small_for_all_preempts_and_gives_the_same_texts(tiny_gemma2_dir: Path) -> None:
    with (
        RealServer(tiny_gemma2_dir, **TINY | {"kv_cache_gib": 0.0005, "max_model_len": 256}) as server,
        server.client() as client,
    ):
        prompts = [[100 + i, *range(200, 300)] for i in range(8)]  # 524 tokens fit, all need 1,288
        fields = {"max_tokens": 60, "extra_body": {"ignore_eos": True}}
        alone = [text(client, prompt, **fields) for prompt in prompts]
        assert server.metric("num_preemptions_total") == 0
        assert len(set(alone)) > 4
        assert together(server, prompts, **fields) == alone
        assert server.metric("num_preemptions_total") > 0
        wait_until_idle(server)


def test_sigterm_lets_streams_finish_and_refuses_new_requests(tiny_gemma2_dir: Path) -> None:
    with RealServer(tiny_gemma2_dir, **TINY) as server, server.client() as client:
        streams = started(client, [[300], [301], [302]], stream_options={"include_usage": True}, **ENDLESS)
        with server.paused_engine():
            server.process.terminate()
            wait_until(lambda: server.health() == 503)
            with pytest.raises(openai.InternalServerError, match="shutting down") as refused:
                complete(client)
            assert refused.value.status_code == 503
        assert [list(stream)[-1].usage.completion_tokens for stream in streams] == [300] * 3
        assert server.exit_code() == 0
        with pytest.raises(openai.APIConnectionError):
            complete(client)


def test_a_killed_engine_ends_streams_and_server_with_the_reason(tiny_gemma2_dir: Path) -> None:
    with RealServer(tiny_gemma2_dir, **TINY) as server, server.client() as client:
        streams = started(client, [[300], [301], [302]], **ENDLESS)
        server.engine.kill()
        must_be_dead(server, client, streams, "the engine process ended, exit code -9")


@pytest.mark.slow  # 3 s to start, 2 to be noticed, 5 to exit
def test_a_hung_engine_ends_streams_and_server_with_the_reason(tiny_gemma2_dir: Path) -> None:
    with RealServer(tiny_gemma2_dir, **TINY, step_timeout_s=2) as server, server.client() as client:
        streams = started(client, [[300], [301], [302]], **ENDLESS)
        server.engine.suspend()
        must_be_dead(server, client, streams, "the engine must step every 2 s while requests are open")


def must_be_dead(server: RealServer, client: openai.OpenAI, streams: list[Any], reason: str) -> None:
    """Every open stream ends with an error event; probes and clients are told for 5 s, then it exits."""
    for stream in streams:
        with pytest.raises(openai.APIError, match=reason) as ended:
            join(stream)
        assert ended.value.code == "engine_dead"
    told_s = time.monotonic()
    assert server.health() == 503
    with pytest.raises(openai.InternalServerError, match=reason) as refused:
        complete(client)
    assert (refused.value.status_code, refused.value.code) == (503, "engine_dead")
    assert server.exit_code() == 1
    assert time.monotonic() - told_s < 15
    assert reason in server.output()


def test_the_engine_ends_with_a_server_that_is_killed(tiny_gemma2_dir: Path) -> None:
    with RealServer(tiny_gemma2_dir, **TINY) as server, server.client() as client:
        (stream,) = started(client, [[300]], **ENDLESS)
        server.process.kill()
        wait_until(lambda: is_gone(server.engine), 10)
        stream.close()
