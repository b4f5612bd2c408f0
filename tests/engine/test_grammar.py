"""Grammars end to end: what comes out follows them, and nobody waits for a bad one."""

import json
import re
from pathlib import Path
from typing import Any

import psutil
import pytest
from fake_server import wait_until
from real_server import is_gone

from cabochon.engine.errors import BadGrammar, BadSampling
from cabochon.engine.llm import LLM, Completion
from cabochon.engine.messages import GenerateRequest
from cabochon.engine.sampling_params import Grammar, SamplingParams

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["a", "bc"]}, "maxItems": 2},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}


OPTIONS: dict[str, Any] = {
    "dtype": "fp32", "page_tokens": 4, "max_seqs": 16, "step_tokens": 32, "threads": 1,
}  # fmt: skip


def schema(content: object) -> Grammar:
    return Grammar(kind="json_schema", text=json.dumps(content), param="response_format")


def regex(text: str) -> Grammar:
    return Grammar(kind="regex", text=text)


@pytest.fixture(scope="module")
def llm(tiny_gemma2_dir: Path) -> LLM:
    return LLM(str(tiny_gemma2_dir), kv_cache_gib=0.01, **OPTIONS)


def run(llm: LLM, grammar: Grammar, count: int = 4, **params: object) -> list[Completion]:
    each = [
        SamplingParams(seed=seed, **{"max_tokens": 150, "grammar": grammar, **params})
        for seed in range(count)
    ]
    return llm.generate([[8, 9, 10 + seed] for seed in range(count)], each)


def test_a_schema_is_met_and_the_answer_ends(llm: LLM) -> None:
    for answer in run(llm, schema(PERSON), count=12):
        assert answer.finish_reason == "stop"
        person = json.loads(answer.text)
        assert set(person) == set(PERSON["required"])
        assert 0 <= person["age"] <= 150
        assert set(person["tags"]) <= {"a", "bc"}
        assert len(person["name"]) <= 8


@pytest.mark.parametrize("temperature", [0, 1.0])
def test_a_regex_is_matched(llm: LLM, temperature: float) -> None:
    for answer in run(llm, regex(r"[a-c]{3,5}@[xy]+\.(com|org)"), temperature=temperature):
        if answer.finish_reason == "stop":
            assert re.fullmatch(r"[a-c]{3,5}@[xy]+\.(com|org)", answer.text)


@pytest.mark.parametrize("text", ['start: "yes" | "no"', 'root ::= "yes" | "no"'], ids=["lark", "gbnf"])
def test_a_grammar_leaves_only_its_words(llm: LLM, text: str) -> None:
    answers = run(llm, Grammar(kind="lark_or_gbnf", text=text), count=8)
    assert {answer.text for answer in answers} == {"yes", "no"}
    assert {answer.finish_reason for answer in answers} == {"stop"}


def test_what_is_complete_ends_even_when_eos_is_ignored(llm: LLM) -> None:
    for answer in run(llm, regex("abc"), ignore_eos=True, min_tokens=20):
        assert (answer.text, answer.finish_reason) == ("abc", "stop")


def test_an_end_that_may_come_later_waits_for_min_tokens(llm: LLM) -> None:
    for answer in run(llm, regex("a*"), min_tokens=10, max_tokens=30):
        assert len(answer.token_ids) >= 10


def test_tokens_are_the_same_alone_and_among_others(llm: LLM) -> None:
    together = run(llm, schema(PERSON), count=8)
    mixed = llm.generate(
        [[8, 9, 10 + seed] for seed in range(8)] + [[7] * 20] * 6,
        [SamplingParams(seed=seed, max_tokens=150, grammar=schema(PERSON)) for seed in range(8)]
        + [SamplingParams(seed=9, max_tokens=40)] * 6,
    )
    assert [a.token_ids for a in mixed[:8]] == [a.token_ids for a in together]


def test_a_grammar_survives_preemption(tiny_gemma2_dir: Path, llm: LLM) -> None:
    small = LLM(str(tiny_gemma2_dir), kv_cache_gib=0.00012, max_model_len=160, **OPTIONS)
    answers = run(small, schema(PERSON), count=8)
    assert small.core.stats().preemptions > 0
    assert [a.token_ids for a in answers] == [a.token_ids for a in run(llm, schema(PERSON), count=8)]


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ({"type": "integer"}, "1" * 20),
        ({"type": "array", "items": {"type": "number"}, "minItems": 1}, "[" + "1" * 20),
        ({"type": "string", "minLength": 40, "maxLength": 40}, '"' + "1" * 40 + '"'),
        ({"type": "string", "format": "time"}, '"11:11:11.111111111'),
        ({"const": {"format": "time"}}, '{"format": "time"}'),
    ],
    ids=str,
)
def test_digits_end_where_something_else_may_follow(llm: LLM, content: object, text: str) -> None:
    one, dot = llm.tokenizer.token_to_id("1"), llm.tokenizer.token_to_id(".")
    params = SamplingParams(max_tokens=60, logit_bias={one: 100.0, dot: 50.0}, grammar=schema(content))
    (answer,) = llm.generate([[8, 9]], params)
    dense = answer.text.replace("\n", "").replace(" ", "")
    assert dense.startswith(text.replace(" ", "")), answer.text
    assert not dense.startswith(text + "1")


BAD = [
    (schema({"type": "nope"}), "response_format must be one that can be followed"),
    (schema({"$ref": "#"}), "response_format must"),
    (schema({"allOf": [{"type": "string"}, {"type": "integer"}]}), "Unsatisfiable"),
    (schema({"not": {}}), "response_format must be one that can be followed: Unimplemented keys"),
    (regex("("), "structured_outputs must be one that can be followed: .*invalid regex"),
    (regex("(?=a)b"), "structured_outputs must be one that can be followed"),
    (Grammar(kind="json_schema", text="{"), "structured_outputs must"),
    (Grammar(kind="lark", text="start: nothing"), "structured_outputs must"),
    (Grammar(kind="lark", text="::="), "structured_outputs must"),
]


@pytest.mark.parametrize(("grammar", "message"), BAD, ids=range(len(BAD)))
def test_what_cannot_be_followed_is_refused(llm: LLM, grammar: Grammar, message: str) -> None:
    llm.core.add(
        GenerateRequest(
            request_id="bad", prompt_ids=[8], params=SamplingParams(max_tokens=5, grammar=grammar)
        )
    )
    refusals = []
    while llm.core.has_work:
        refusals += llm.core.step()[1]
    (refusal,) = refusals
    assert refusal.error == BadGrammar.__name__
    assert re.match(message, refusal.message) or message in refusal.message
    assert refusal.param == grammar.param


def test_a_grammar_that_is_too_long_is_refused() -> None:
    with pytest.raises(BadSampling, match="structured_outputs must be of at most 262144 characters"):
        regex("a" * 300_000)


def grammar_processes(llm: LLM) -> list[psutil.Process]:
    """The first reads the tokenizer, the others have a grammar each."""
    host = psutil.Process(llm.core._grammars._host._process.pid)
    return [host, *host.children()]


def add(llm: LLM, name: str, params: SamplingParams) -> None:
    llm.core.add(GenerateRequest(request_id=name, prompt_ids=[8, 9], params=params))


def finish(llm: LLM) -> tuple[dict[str, list[int]], dict[str, str]]:
    """Step until nothing is left. Tokens and errors by request."""
    tokens: dict[str, list[int]] = {}
    errors: dict[str, str] = {}
    while llm.core.has_work:
        outputs, refusals = llm.core.step()
        for output in outputs:
            tokens.setdefault(output.request_id, []).extend(output.token_ids)
        errors |= {refusal.request_id: f"{refusal.error} {refusal.message}" for refusal in refusals}
    return tokens, errors


def test_who_waits_for_a_slow_mask_holds_up_nobody(llm: LLM) -> None:
    params = SamplingParams(seed=0, max_tokens=150, grammar=regex("[ab]{6}"))
    free = SamplingParams(temperature=0, max_tokens=30, ignore_eos=True)
    expected = {"slow": llm.generate([[8, 9]], params), "free": llm.generate([[8, 9]], free)}
    _, *followers = grammar_processes(llm)
    tokens: dict[str, list[int]] = {"slow": [], "free": []}
    try:
        for process in followers:
            process.suspend()
        add(llm, "slow", params)
        add(llm, "free", free)
        while len(tokens["free"]) < 30:
            for output in llm.core.step()[0]:
                tokens[output.request_id] += output.token_ids
    finally:
        for process in followers:
            process.resume()
    assert not tokens["slow"]
    tokens["slow"] = finish(llm)[0]["slow"]
    assert tokens == {name: one[0].token_ids for name, one in expected.items()}


def test_an_aborted_request_leaves_nothing(llm: LLM) -> None:
    for steps in range(6):
        params = SamplingParams(max_tokens=50, grammar=schema(PERSON))
        llm.core.add(GenerateRequest(request_id="gone", prompt_ids=[8] * 40, params=params))
        for _ in range(steps):
            llm.core.step()
        llm.core.abort("gone")
        assert not llm.core.has_work
        assert llm.core.stats().pages_used == 0


def test_what_ends_a_grammars_process_ends_its_requests_alone(llm: LLM) -> None:
    expected = llm.generate([[8, 9]], SamplingParams(max_tokens=150, grammar=schema(PERSON)))
    others = {process.pid for process in grammar_processes(llm)}
    add(llm, "lost", SamplingParams(max_tokens=100, grammar=regex("[xyz]{80}")))
    add(llm, "kept", SamplingParams(max_tokens=150, grammar=schema(PERSON)))
    tokens: list[int] = []
    while len(tokens) < 5:
        tokens += [t for o in llm.core.step()[0] if o.request_id == "kept" for t in o.token_ids]
    (victim,) = [process for process in grammar_processes(llm) if process.pid not in others]
    victim.kill()
    rest, errors = finish(llm)
    assert errors.keys() == {"lost"}
    assert errors["lost"].startswith("BadGrammar structured_outputs must give each mask within 10 s")
    assert tokens + rest["kept"] == expected[0].token_ids
    assert llm.core.stats().pages_used == 0
    assert run(llm, regex("[xyz]{80}"), count=1)[0].finish_reason == "stop"


def test_a_lost_tokenizer_process_is_replaced(llm: LLM, caplog: pytest.LogCaptureFixture) -> None:
    run(llm, regex("abc"), count=1)
    host, *_ = grammar_processes(llm)
    host.kill()
    wait_until(lambda: is_gone(host), 10)
    assert run(llm, regex("abcd"), count=1)[0].text == "abcd"
    assert grammar_processes(llm)[0].pid != host.pid
    assert "grammar process ended code=-9, starting another" in caplog.text


def test_a_request_may_be_published_while_its_grammar_compiles(llm: LLM) -> None:
    prompt = list(range(20, 60))
    one = SamplingParams(max_tokens=2, grammar=regex("ab"))
    llm.core.add(GenerateRequest(request_id="p", prompt_ids=prompt, params=one, is_private=True))
    llm.core.publish("p")
    while llm.core.has_work:
        llm.core.step()
    assert llm.generate([prompt], SamplingParams(temperature=0, max_tokens=1))[0].cached_tokens > 30
