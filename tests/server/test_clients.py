"""Other people's clients against the real server, called as their users call them; nobody else is called.

The demo answers in fp32: the same tokens from any client, in any batch, and transformers' log probabilities.
"""

import asyncio
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import openai
import pytest
from pydantic import BaseModel
from quiz import NUM_TOKENS, QUESTIONS, STOPS, Oracle, quiz_tasks
from real_server import RealServer
from third_parties import no_third_parties
from tools import need_package

pytestmark = pytest.mark.slow  # LiteLLM alone takes 6 s to import

HELLO: list[Any] = [{"role": "user", "content": "hello"}]
FRANCE = "The capital of France is"
TOO_LONG = "a " * 40_000  # the demo takes 32,768 tokens
WRONG = "nobody answers this"
ONE_CALL = {"tool_choice": "required", "parallel_tool_calls": False}  # of several, the demo makes many
LM_EVAL_MODES = [{}, {"batch_size": 4}, {"batch_size": 2, "num_concurrent": 2}]


class Gem(BaseModel):
    """So narrow that a small model comes to its end."""

    name: Literal["ruby", "opal"]
    hardness: Literal[5, 9]


class GetHardness(BaseModel):
    """Hardness of a gem."""

    gem: Literal["ruby", "opal"]


@pytest.fixture(scope="module", autouse=True)
def quiet() -> Iterator[None]:
    with no_third_parties():
        yield


@pytest.fixture(scope="module")
def demo(demo_dir: Path, quiet: None) -> Iterator[RealServer]:
    with RealServer("demo", kv_cache_gib=0.3, dtype="fp32") as server:
        yield server


@pytest.fixture(scope="module")
def hello(demo: RealServer) -> str:
    """The greedy answer to HELLO, by the openai client."""
    with demo.client() as client:
        answer = client.chat.completions.create(
            model="demo", messages=HELLO, max_tokens=NUM_TOKENS, temperature=0
        )
    return str(answer.choices[0].message.content)


@pytest.fixture(scope="module")
def oracle(demo_dir: Path) -> Oracle:
    return Oracle(demo_dir)


@pytest.fixture(scope="module")
def lm_eval(quiet: None) -> Any:
    return need_package("lm_eval")


@pytest.fixture(scope="module")
def evaluate(
    lm_eval: Any, demo: RealServer, oracle: Oracle, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., dict[str, Any]]:
    """lm-eval's simple_evaluate of the quiz; the last text that it is told to expect is wrong."""
    manager = need_package("lm_eval.tasks").TaskManager(include_defaults=False)
    choice, text = quiz_tasks(tmp_path_factory.mktemp("quiz"), [*oracle.texts[:-1], WRONG])

    def run(
        model: str, path: str, *, has_choice: bool = True, chat: bool = False, **args: Any
    ) -> dict[str, Any]:
        return lm_eval.simple_evaluate(
            model=model,
            model_args={"model": "demo", "base_url": demo.url + path, "max_retries": 1, **args},
            tasks=[choice, text] if has_choice else [text],
            apply_chat_template=chat,
            task_manager=manager,
            bootstrap_iters=0,
        )

    return run


@pytest.fixture(scope="module", params=LM_EVAL_MODES, ids=["one by one", "batched", "concurrent"])
def quiz(
    request: pytest.FixtureRequest, evaluate: Callable[..., dict[str, Any]], demo_dir: Path
) -> dict[str, Any]:
    return evaluate(
        "local-completions", "/v1/completions", tokenizer=str(demo_dir), add_bos_token=True, **request.param
    )


def generated(results: dict[str, Any]) -> list[str]:
    return [sample["resps"][0][0] for sample in results["samples"]["text"]]


def test_lm_eval_scores_choices_as_transformers_does(quiz: dict[str, Any], oracle: Oracle) -> None:
    for sample, expected in zip(quiz["samples"]["choice"], oracle.scores, strict=True):
        scores = [response for (response,) in sample["resps"]]
        assert [score for score, _ in scores] == pytest.approx([score for score, _ in expected], abs=1e-3)
        assert [is_greedy for _, is_greedy in scores] == [is_greedy for _, is_greedy in expected]


def test_lm_eval_counts_the_right_choices(quiz: dict[str, Any], oracle: Oracle) -> None:
    best = [scores.index(max(scores)) for scores in oracle.scores]
    right = sum(choice == row["key"] for choice, row in zip(best, QUESTIONS, strict=True))
    assert quiz["results"]["choice"]["acc,none"] == right / len(QUESTIONS) == 0.75


def test_lm_eval_generates_the_texts_of_transformers(quiz: dict[str, Any], oracle: Oracle) -> None:
    assert generated(quiz) == oracle.texts
    assert quiz["results"]["text"]["exact_match,none"] == 0.75


def test_lm_eval_generates_without_a_tokenizer(
    evaluate: Callable[..., dict[str, Any]], oracle: Oracle
) -> None:
    results = evaluate("local-completions", "/v1/completions", has_choice=False, tokenizer_backend="none")
    assert generated(results) == oracle.texts


def test_lm_eval_chats(evaluate: Callable[..., dict[str, Any]], demo: RealServer) -> None:
    results = evaluate("local-chat-completions", "/v1/chat/completions", has_choice=False, chat=True)
    with demo.client() as client:
        expected = [
            client.chat.completions.create(
                model="demo",
                messages=[{"role": "user", "content": row["question"]}],
                max_tokens=NUM_TOKENS,
                temperature=0,
                stop=STOPS,
            )
            .choices[0]
            .message.content
            for row in QUESTIONS
        ]
    assert generated(results) == expected


@pytest.fixture(scope="module")
def langchain_openai(quiet: None) -> Any:
    return need_package("langchain_openai")


@pytest.fixture(scope="module")
def chat_openai(langchain_openai: Any, demo: RealServer) -> Callable[..., Any]:
    """LangChain's model, greedy."""

    def make(**fields: Any) -> Any:
        common = {"model": "demo", "temperature": 0, "max_tokens": NUM_TOKENS, "max_retries": 0}
        return langchain_openai.ChatOpenAI(base_url=f"{demo.url}/v1", api_key="none", **{**common, **fields})

    return make


def test_langchain_invokes(chat_openai: Callable[..., Any], hello: str) -> None:
    message = chat_openai().invoke("hello")
    assert message.content == hello
    assert message.response_metadata["finish_reason"] == "length"
    usage = message.usage_metadata
    assert usage["output_tokens"] == NUM_TOKENS
    assert usage["total_tokens"] == usage["input_tokens"] + NUM_TOKENS > NUM_TOKENS


def test_langchain_streams_with_usage(chat_openai: Callable[..., Any], hello: str) -> None:
    chunks = list(chat_openai(stream_usage=True).stream("hello"))
    assert "".join(chunk.content for chunk in chunks) == hello
    assert sum(bool(chunk.content) for chunk in chunks) > 4
    usages = [chunk.usage_metadata for chunk in chunks if chunk.usage_metadata]
    assert [usage["output_tokens"] for usage in usages] == [NUM_TOKENS]


def test_langchain_batches(chat_openai: Callable[..., Any], hello: str) -> None:
    turns = [("human", "hello"), ("ai", hello), ("human", "bye")]
    first, other, last = (message.content for message in chat_openai().batch(["hello", turns, "hello"]))
    assert first == last == hello != other


def test_langchain_awaits(chat_openai: Callable[..., Any], hello: str) -> None:
    async def run() -> list[str]:
        model = chat_openai()
        whole = await model.ainvoke("hello")
        streamed = [chunk.content async for chunk in model.astream("hello")]
        await model.root_async_client.close()  # LangChain never does
        return [whole.content, "".join(streamed)]

    assert asyncio.run(run()) == [hello, hello]


def test_langchain_gets_logprobs(chat_openai: Callable[..., Any], hello: str) -> None:
    metadata = chat_openai(logprobs=True, top_logprobs=2).invoke("hello").response_metadata
    content = metadata["logprobs"]["content"]
    assert b"".join(bytes(entry["bytes"]) for entry in content).decode() == hello
    for entry in content:
        assert entry["logprob"] == entry["top_logprobs"][0]["logprob"] > entry["top_logprobs"][1]["logprob"]


def test_langchain_fills_a_schema(chat_openai: Callable[..., Any]) -> None:
    model = chat_openai(max_tokens=64).with_structured_output(Gem, method="json_schema")
    assert isinstance(model.invoke("Describe a gem."), Gem)


def test_langchain_calls_a_tool_and_goes_on(chat_openai: Callable[..., Any]) -> None:
    messages = need_package("langchain_core.messages")
    model = chat_openai(max_tokens=64)
    question = messages.HumanMessage("How hard is a ruby?")
    asked = model.bind_tools([GetHardness], strict=True, **ONE_CALL).invoke([question])
    (call,) = asked.tool_calls
    assert call["name"] == "GetHardness"
    assert GetHardness.model_validate(call["args"])
    result = messages.ToolMessage("9", tool_call_id=call["id"])
    last = model.bind_tools([GetHardness], tool_choice="none").invoke([question, asked, result])
    assert last.content
    assert not last.tool_calls


def test_langchain_streams_a_call(chat_openai: Callable[..., Any]) -> None:
    model = chat_openai(max_tokens=64).bind_tools([GetHardness], strict=True, tool_choice="GetHardness")
    first, *others = model.stream("How hard is a ruby?")
    assert len(others) > 3
    (call,) = sum(others, first).tool_calls
    assert GetHardness.model_validate(call["args"])


def test_langchain_fills_a_schema_by_a_call(chat_openai: Callable[..., Any]) -> None:
    model = chat_openai(max_tokens=64).with_structured_output(Gem, method="function_calling")
    assert isinstance(model.invoke("Describe a gem."), Gem)


def test_langchain_uses_responses(chat_openai: Callable[..., Any], hello: str) -> None:
    model = chat_openai(use_responses_api=True)
    whole = model.invoke("hello")
    assert whole.text == hello
    assert whole.usage_metadata["output_tokens"] == NUM_TOKENS
    assert "".join(chunk.text for chunk in model.stream("hello")) == hello
    asked = chat_openai(use_responses_api=True, max_tokens=64).bind_tools(
        [GetHardness], strict=True, **ONE_CALL
    )
    (call,) = asked.invoke("A ruby?").tool_calls
    assert GetHardness.model_validate(call["args"])


@pytest.mark.parametrize("uses_responses", [False, True])
@pytest.mark.parametrize("max_tokens", [NUM_TOKENS, None])
def test_langchain_tells_a_context_overflow(
    chat_openai: Callable[..., Any], max_tokens: int | None, uses_responses: bool
) -> None:
    overflow = need_package("langchain_core.exceptions").ContextOverflowError
    model = chat_openai(max_tokens=max_tokens, use_responses_api=uses_responses)
    with pytest.raises(overflow) as whole:
        model.invoke(TOO_LONG)
    assert isinstance(whole.value, openai.BadRequestError)
    with pytest.raises(overflow):
        list(model.stream(TOO_LONG))


def test_langchain_tells_an_unknown_model(chat_openai: Callable[..., Any]) -> None:
    with pytest.raises(need_package("langchain_core.exceptions").ModelNotFoundError):
        chat_openai(model="gpt-4").invoke("hello")


@pytest.fixture(scope="module")
def litellm(quiet: None) -> Any:
    return need_package("litellm")


@pytest.fixture
def loop(litellm: Any) -> Iterator[asyncio.AbstractEventLoop]:
    """LiteLLM takes the thread's event loop, makes one if there is none, and leaves all it opened open."""
    one = asyncio.new_event_loop()
    asyncio.set_event_loop(one)
    yield one
    for client in litellm.in_memory_llm_clients_cache.cache_dict.values():
        if asyncio.iscoroutine(ended := client.close()):
            one.run_until_complete(ended)
    litellm.in_memory_llm_clients_cache.flush_cache()
    asyncio.set_event_loop(None)
    one.close()


@pytest.fixture
def fields(demo: RealServer, loop: asyncio.AbstractEventLoop) -> dict[str, Any]:
    """What each call to LiteLLM gets."""
    return {
        "model": "openai/demo",
        "api_base": f"{demo.url}/v1",
        "api_key": "none",
        "temperature": 0,
        "max_tokens": NUM_TOKENS,
        "max_retries": 0,
    }


def test_litellm_completes_a_chat(litellm: Any, fields: dict[str, Any], hello: str) -> None:
    answer = litellm.completion(messages=HELLO, **fields)
    assert answer.choices[0].message.content == hello
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage.completion_tokens == NUM_TOKENS


@pytest.mark.filterwarnings(  # LiteLLM's own types, and it takes a warning for a broken stream
    "ignore:Item .* is using the `ReadOnly` qualifier:UserWarning",
    "ignore:Accessing the 'model_.*fields' attribute:DeprecationWarning",
)
def test_litellm_streams_with_usage(
    litellm: Any, fields: dict[str, Any], hello: str, loop: asyncio.AbstractEventLoop
) -> None:
    async def run() -> list[Any]:
        stream = await litellm.acompletion(
            messages=HELLO, stream=True, stream_options={"include_usage": True}, **fields
        )
        return [chunk async for chunk in stream]

    chunks = loop.run_until_complete(run())
    choices = [choice for chunk in chunks for choice in chunk.choices]
    assert "".join(choice.delta.content or "" for choice in choices) == hello
    assert sum(bool(choice.delta.content) for choice in choices) > 4
    assert chunks[-1].usage.completion_tokens == NUM_TOKENS


def test_litellm_completes_a_text(litellm: Any, fields: dict[str, Any], oracle: Oracle) -> None:
    answer = litellm.text_completion(prompt=FRANCE, stop=STOPS, **fields)
    assert answer.choices[0].text == oracle.texts[0]
    assert answer.object == "text_completion"


def test_litellm_fills_a_schema(litellm: Any, fields: dict[str, Any]) -> None:
    answer = litellm.completion(messages=HELLO, response_format=Gem, **{**fields, "max_tokens": 64})
    assert Gem.model_validate_json(answer.choices[0].message.content)


def test_litellm_calls_a_tool(litellm: Any, fields: dict[str, Any]) -> None:
    tools = [openai.pydantic_function_tool(GetHardness)]
    answer = litellm.completion(messages=HELLO, tools=tools, **ONE_CALL, **{**fields, "max_tokens": 64})
    assert answer.choices[0].finish_reason == "tool_calls"
    (call,) = answer.choices[0].message.tool_calls
    assert GetHardness.model_validate_json(call.function.arguments)


def test_litellm_uses_responses(litellm: Any, fields: dict[str, Any], hello: str) -> None:
    del fields["max_tokens"]
    answer = litellm.responses(input="hello", max_output_tokens=16, **fields)  # fewer would be sent as 16
    assert answer.output_text.startswith(hello)
    assert answer.usage.output_tokens == 16
    assert answer.status == "incomplete"


@pytest.mark.parametrize("is_stream", [False, True])
def test_litellm_tells_a_context_overflow(litellm: Any, fields: dict[str, Any], is_stream: bool) -> None:
    messages = [{"role": "user", "content": TOO_LONG}]
    with pytest.raises(litellm.ContextWindowExceededError):
        litellm.completion(messages=messages, stream=is_stream, **fields)


def test_litellm_tells_an_unknown_model(litellm: Any, fields: dict[str, Any]) -> None:
    with pytest.raises(litellm.NotFoundError, match="model must be one of demo"):
        litellm.completion(messages=HELLO, **{**fields, "model": "openai/gpt-4"})
