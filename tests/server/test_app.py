"""The routes, over a FakeEngine whose answer is the prompt's own tokens."""

import dataclasses
import json
from concurrent.futures import ThreadPoolExecutor

import pytest
from fake_server import CHAT, COMPLETIONS, TOKENIZER, LiveServer, events, fake_service, wait_until

from cabochon.engine.fake import FAKE_INFO, FakeEngine
from cabochon.server.service import VERSION

CHAT_PROMPT = "<bos><start_of_turn>user\nhello<end_of_turn>\n<start_of_turn>model\n"
CHAT_IDS = TOKENIZER.encode(CHAT_PROMPT, add_special_tokens=False).ids
CHAT_TEXT = "user\nhello\nmodel\n"  # what the engine answers, control tokens not shown


def test_chat_answers_the_templates_tokens(live: LiveServer) -> None:
    answer = live.chat("hello", max_tokens=len(CHAT_IDS)).json()
    assert live.engine.seen[0].prompt_ids == CHAT_IDS
    assert answer["object"] == "chat.completion"
    assert answer["model"] == "fake"
    assert answer["choices"] == [
        {
            "index": 0,
            "message": {"role": "assistant", "content": CHAT_TEXT, "refusal": None},
            "logprobs": None,
            "finish_reason": "length",
        }
    ]
    assert answer["usage"] == {
        "prompt_tokens": len(CHAT_IDS),
        "completion_tokens": len(CHAT_IDS),
        "total_tokens": 2 * len(CHAT_IDS),
        "prompt_tokens_details": {"cached_tokens": 0},
    }


def test_chat_streams_the_same_text(live: LiveServer) -> None:
    answer = live.chat("hello", max_tokens=len(CHAT_IDS), stream=True)
    assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
    chunks = events(answer)
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert "".join(c["choices"][0]["delta"].get("content", "") for c in chunks) == CHAT_TEXT
    assert [c["choices"][0]["finish_reason"] for c in chunks] == [None] * (len(chunks) - 1) + ["length"]
    assert {c["object"] for c in chunks} == {"chat.completion.chunk"}
    assert len({c["id"] for c in chunks}) == 1


def test_message_parts_are_one_text(live: LiveServer) -> None:
    parts = [{"type": "text", "text": "hel"}, {"type": "text", "text": "lo"}]
    live.post(CHAT, {"messages": [{"role": "user", "content": parts}], "max_tokens": 1})
    assert live.engine.seen[0].prompt_ids == CHAT_IDS


def test_completion_of_text_gets_bos(live: LiveServer) -> None:
    answer = live.complete("hello", max_tokens=2).json()
    assert live.engine.seen[0].prompt_ids == [2, TOKENIZER.token_to_id("hello")]
    assert answer["object"] == "text_completion"
    assert answer["choices"][0] == {
        "index": 0,
        "text": "hello",
        "logprobs": None,
        "finish_reason": "length",
    }


def test_completion_of_token_ids_is_taken_as_it_is(live: LiveServer) -> None:
    live.complete([7, 8, 9], max_tokens=1)
    assert live.engine.seen[0].prompt_ids == [7, 8, 9]


def test_a_batch_of_prompts_with_n_numbers_its_choices_prompt_by_prompt(live: LiveServer) -> None:
    answer = live.complete(["hello", "world"], n=2, max_tokens=2, seed=5).json()
    assert [(c["index"], c["text"]) for c in answer["choices"]] == [
        (0, "hello"),
        (1, "hello"),
        (2, "world"),
        (3, "world"),
    ]
    assert answer["usage"]["prompt_tokens"] == 4
    assert answer["usage"]["completion_tokens"] == 8
    assert [request.params.seed for request in live.engine.seen] == [5, 6, 5, 6]


def test_a_batch_of_token_id_prompts_is_a_batch(live: LiveServer) -> None:
    answer = live.complete([[300], [301]], max_tokens=1).json()
    assert [request.prompt_ids for request in live.engine.seen] == [[300], [301]]
    assert len(answer["choices"]) == 2


def test_streams_of_several_choices_keep_their_order_within_each(live: LiveServer) -> None:
    answer = live.complete(["hello world", "user stop"], n=2, max_tokens=3, stream=True)
    texts: dict[int, str] = {}
    for chunk in events(answer):
        (choice,) = chunk["choices"]
        texts[choice["index"]] = texts.get(choice["index"], "") + choice["text"]
    assert texts == {0: "hello world", 1: "hello world", 2: "user ", 3: "user "}


def test_echo_puts_the_prompt_first(live: LiveServer) -> None:
    assert live.complete("hello", echo=True, max_tokens=2).json()["choices"][0]["text"] == "hellohello"
    chunks = events(live.complete("hello", echo=True, max_tokens=2, stream=True))
    assert [chunk["choices"][0]["text"] for chunk in chunks] == ["hello", "hello"]


def test_without_a_seed_two_requests_draw_differently(live: LiveServer) -> None:
    live.complete("hello", max_tokens=1)
    live.complete("hello", max_tokens=1)
    assert live.engine.seen[0].params.seed != live.engine.seen[1].params.seed


def test_sampling_parameters_reach_the_engine(live: LiveServer) -> None:
    given = {
        "max_tokens": 9, "min_tokens": 2, "temperature": 0.5, "top_k": 3, "top_p": 0.9, "min_p": 0.1,
        "seed": 4,
        "repetition_penalty": 1.5, "presence_penalty": -1, "frequency_penalty": 1, "ignore_eos": True,
    }  # fmt: skip
    rest = {"logit_bias": {"7": -3.5}, "stop_token_ids": [9], "priority": -2, "cache_salt": "tenant"}
    assert live.complete("hello", **given, **rest).status_code == 200
    request = live.engine.seen[0]
    assert {name: getattr(request.params, name) for name in given} == given
    assert request.params.logit_bias == {7: -3.5}
    assert request.params.stop_token_ids == (9,)
    assert (request.priority, request.cache_salt) == (-2, "tenant")


def test_max_completion_tokens_is_the_newer_name(live: LiveServer) -> None:
    live.chat("hello", max_tokens=5, max_completion_tokens=3)
    assert live.engine.seen[0].params.max_tokens == 3


def test_a_stop_string_ends_the_request_in_the_engine(live: LiveServer) -> None:
    answer = live.complete("hello world stop", stop=["wor"], max_tokens=100).json()
    assert answer["choices"][0]["text"] == "hello "
    assert answer["choices"][0]["finish_reason"] == "stop"
    assert live.engine.aborted == [live.engine.seen[0].request_id]
    assert not live.engine.open


def test_the_stop_string_is_shown_on_request(live: LiveServer) -> None:
    answer = live.complete("hello world", stop="wor", include_stop_str_in_output=True).json()
    assert answer["choices"][0]["text"] == "hello wor"


def test_a_stop_string_within_min_tokens_is_passed_over(live: LiveServer) -> None:
    answer = live.complete("hello", stop="hell", min_tokens=3, max_tokens=9, echo=False).json()
    assert answer["choices"][0]["text"] == "hello"  # <bos> hello <bos> | hello: found in the fourth token
    assert answer["usage"]["completion_tokens"] == 4


def test_a_stop_token_ends_the_text_before_it(live: LiveServer) -> None:
    ids = TOKENIZER.encode("hello stop", add_special_tokens=False).ids
    answer = live.complete(ids, stop_token_ids=[ids[-1]], max_tokens=9).json()
    assert answer["choices"][0]["text"] == "hello "
    assert answer["choices"][0]["finish_reason"] == "stop"
    assert answer["usage"]["completion_tokens"] == len(ids)
    shown = live.complete(ids, stop_token_ids=[ids[-1]], include_stop_str_in_output=True).json()
    assert shown["choices"][0]["text"] == "hello stop"


def test_special_tokens_are_shown_on_request(live: LiveServer) -> None:
    answer = live.complete("hello", max_tokens=2, skip_special_tokens=False).json()
    assert answer["choices"][0]["text"] == "<bos>hello"


def test_usage_comes_on_a_last_chunk_without_choices(live: LiveServer) -> None:
    chunks = events(live.chat(max_tokens=3, stream=True, stream_options={"include_usage": True}))
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"] == {
        "prompt_tokens": len(CHAT_IDS),
        "completion_tokens": 3,
        "total_tokens": len(CHAT_IDS) + 3,
        "prompt_tokens_details": {"cached_tokens": 0},
    }
    assert all(chunk["usage"] is None for chunk in chunks[:-1])


def test_continuous_usage_is_on_every_chunk(live: LiveServer) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    chunks = events(live.complete([300], max_tokens=3, stream=True, stream_options=options))
    assert [chunk["usage"]["completion_tokens"] for chunk in chunks] == [1, 2, 3, 3]


def test_several_tokens_of_a_step_are_one_chunk(live: LiveServer) -> None:
    live.faults.tokens_per_step = 4
    chunks = events(live.complete([300], max_tokens=8, stream=True))
    assert len(chunks) == 2


def test_events_are_compact_json_and_name_the_model_as_asked(live: LiveServer) -> None:
    text = live.complete("hello", model="fake", max_tokens=1, stream=True).text
    assert '"model":"fake"' in text
    assert ": " not in text.replace("data: ", "")


def test_every_answer_has_a_request_id(live: LiveServer) -> None:
    given = live.http.get("/version", headers={"X-Request-Id": "abc-1"})
    assert given.headers["x-request-id"] == "abc-1"
    bad = live.http.get("/nowhere", headers={"X-Request-Id": "a b"})
    assert len(bad.headers["x-request-id"]) == 32
    answer = live.post(COMPLETIONS, {"prompt": "hello", "max_tokens": 1}, headers={"X-Request-Id": "abc-2"})
    assert answer.json()["id"] == "cmpl-abc-2"
    assert live.complete("hello", max_tokens=1, request_id="mine").json()["id"] == "cmpl-mine"


def test_two_requests_of_one_id_do_not_meet(live: LiveServer) -> None:
    for _ in range(2):
        assert live.complete("hello", max_tokens=1, request_id="same").status_code == 200
    assert len({request.request_id for request in live.engine.seen}) == 2


def test_models_are_listed_under_the_served_names() -> None:
    with LiveServer(served_model_name=("gemma", "google/gemma-2-2b")) as live:
        data = live.http.get("/v1/models").json()["data"]
        assert [model["id"] for model in data] == ["gemma", "google/gemma-2-2b"]
        assert data[0]["max_model_len"] == 1024
        assert live.http.get("/v1/models/google/gemma-2-2b").json()["id"] == "google/gemma-2-2b"
        assert live.complete(model="google/gemma-2-2b", max_tokens=1).json()["model"] == "google/gemma-2-2b"
        assert live.complete(model="fake").status_code == 404


def test_an_unknown_model_is_a_404(live: LiveServer) -> None:
    for answer in (live.chat(model="gpt-4"), live.http.get("/v1/models/gpt-4")):
        assert answer.status_code == 404
        assert answer.json()["error"]["code"] == "model_not_found"
        assert answer.json()["error"]["param"] == "model"


def test_tokenize_and_detokenize_are_inverse(live: LiveServer) -> None:
    answer = live.post("/tokenize", {"prompt": "hello world", "return_token_strs": True}).json()
    assert answer == {
        "count": 3,
        "max_model_len": 1024,
        "tokens": [2, TOKENIZER.token_to_id("hello"), TOKENIZER.token_to_id("▁world")],
        "token_strs": ["<bos>", "hello", "▁world"],
    }
    back = live.post("/detokenize", {"tokens": answer["tokens"]}).json()
    assert back == {"prompt": "<bos>hello world"}


def test_tokenize_renders_messages(live: LiveServer) -> None:
    body = {"messages": [{"role": "user", "content": "hello"}]}
    assert live.post("/tokenize", body).json()["tokens"] == CHAT_IDS
    bare = live.post("/tokenize", {**body, "add_generation_prompt": False}).json()["tokens"]
    assert bare == CHAT_IDS[: len(bare)]
    assert len(bare) < len(CHAT_IDS)


def test_tokenize_needs_one_of_prompt_and_messages(live: LiveServer) -> None:
    answer = live.post("/tokenize", {})
    assert answer.status_code == 400
    assert "exactly one of prompt and messages" in answer.json()["error"]["message"]


def test_detokenize_refuses_ids_outside_the_vocabulary(live: LiveServer) -> None:
    answer = live.post("/detokenize", {"tokens": [5000]})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "tokens"


def test_probes_answer(live: LiveServer) -> None:
    for path in ("/health", "/-/healthz"):
        assert live.http.get(path).json() == {"status": "ok"}
        assert live.http.head(path).status_code == 200
    assert live.http.get("/version").json()["version"]


def test_a_dead_engine_is_unhealthy_and_refuses(live: LiveServer) -> None:
    live.engine.die("the engine process ended")
    assert live.http.get("/health").status_code == 503
    answer = live.chat()
    assert answer.status_code == 503
    assert answer.json()["error"]["code"] == "engine_dead"
    assert live.http.get("/metrics").status_code == 503, "its last gauges would look idle"


def test_docs_load_nothing_from_elsewhere(live: LiveServer) -> None:
    page = live.http.get("/docs").text
    assert "/v1/chat/completions" in page
    assert "http" not in page
    assert "<script" not in page
    schema = live.http.get("/openapi.json").json()
    body = schema["paths"][CHAT]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert body["$ref"].startswith("#/components/schemas/")
    for name in json.dumps(schema).split('"$ref": "#/components/schemas/')[1:]:
        assert name.split('"')[0] in schema["components"]["schemas"]


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/nowhere", 404, "unknown_path"),
        ("GET", CHAT, 405, "unknown_method"),
        ("GET", "/tokenizer_info", 404, "unknown_path"),
    ],
)
def test_unknown_paths_and_methods_have_openais_shape(
    live: LiveServer, method: str, path: str, status: int, code: str
) -> None:
    answer = live.http.request(method, path)
    assert answer.status_code == status
    assert answer.json()["error"]["code"] == code
    assert answer.json()["error"]["type"] == "invalid_request_error"


def test_half_a_character_at_the_end_is_not_lost(live: LiveServer) -> None:
    half = TOKENIZER.token_to_id("<0xF0>")
    assert live.complete([half], max_tokens=1).json()["choices"][0]["text"] == "\ufffd"
    (chunk,) = events(live.complete([half], max_tokens=1, stream=True))
    assert chunk["choices"][0]["text"] == "\ufffd"


def test_a_stop_string_that_never_completes_is_not_lost(live: LiveServer) -> None:
    prompt = TOKENIZER.encode("hello stop", add_special_tokens=False).ids
    answer = live.complete(prompt, stop="stop!", max_tokens=len(prompt))
    assert answer.json()["choices"][0]["text"] == "hello stop"


def test_an_emoji_streams_as_one_chunk(live: LiveServer) -> None:
    prompt = TOKENIZER.encode("👍", add_special_tokens=False).ids
    chunks = events(live.complete(prompt, max_tokens=len(prompt), stream=True))
    assert [chunk["choices"][0]["text"] for chunk in chunks] == ["", "👍"]


def test_every_choice_is_counted_as_open(live: LiveServer) -> None:
    live.faults.is_paused = True
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(live.complete, [300], n=3, max_tokens=1)
        wait_until(lambda: len(live.engine.open) == 3)
        assert live.service.lifecycle.num_open == 3
        live.faults.is_paused = False
        assert answer.result().status_code == 200
    assert live.service.lifecycle.num_open == 0


def test_cached_tokens_are_reported_once_per_prompt(live: LiveServer) -> None:
    live.faults.cached_tokens = 16
    usage = live.complete([[300] * 20, [301] * 20], n=2, max_tokens=1).json()["usage"]
    assert usage["prompt_tokens"] == 40
    assert usage["prompt_tokens_details"] == {"cached_tokens": 32}


def test_echo_is_the_text_as_it_was_sent(live: LiveServer) -> None:
    text = "<start_of_turn>user ▁world"
    assert live.complete(text, max_tokens=1, echo=True).json()["choices"][0]["text"].startswith(text)


@pytest.mark.parametrize(("quantization", "ending"), [("none", "fp32"), ("fp8", "fp32-fp8")])
def test_the_fingerprint_tells_quantized_weights_apart(quantization: str, ending: str) -> None:
    engine = FakeEngine(dataclasses.replace(FAKE_INFO, quantization=quantization))
    assert fake_service(engine).fingerprint == f"cabochon-{VERSION}-{ending}"
