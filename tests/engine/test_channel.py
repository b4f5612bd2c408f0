"""Messages over a socket: every kind comes back as it went, with extreme values and wherever it is cut."""

import dataclasses
import math
import sys

import hypothesis.strategies as st
import msgspec
import pytest
from hypothesis import given, settings

from cabochon.engine.channel import KINDS, FrameReader, Message, encode
from cabochon.engine.config import EngineConfig
from cabochon.engine.fake import FAKE_INFO
from cabochon.engine.messages import (
    Abort,
    AdapterInfo,
    AdapterReply,
    EngineStats,
    Failed,
    GenerateRequest,
    LoadAdapter,
    Loading,
    Log,
    Publish,
    Ready,
    Refusal,
    RequestOutput,
    Start,
    StepOutput,
    Submit,
    UnloadAdapter,
)
from cabochon.engine.sampling_params import MAX_LOGIT_BIAS, MAX_SEED, MAX_TOP_K, SamplingParams

BIG = 2**63 - 1
TEXT = "no/such dir\0\n\"'\\ é 👍 \u202e \x7f"
TINY = 5e-324
LARGE = sys.float_info.max

PARAMS = SamplingParams(
    max_tokens=BIG, min_tokens=BIG, temperature=TINY, top_k=MAX_TOP_K, top_p=TINY, min_p=1.0, seed=MAX_SEED,
    repetition_penalty=100.0, presence_penalty=-2.0, frequency_penalty=2.0,
    logit_bias={token: (-1) ** token * 100.0 for token in range(MAX_LOGIT_BIAS)},
    stop_token_ids=tuple(range(256)), ignore_eos=True,
)  # fmt: skip
REQUEST = GenerateRequest(
    request_id=TEXT, prompt_ids=[0, BIG, *range(300_000)], params=PARAMS, priority=-(2**31), adapter=TEXT,
    cache_salt="x" * 256, is_private=True, arrival_s=LARGE,
)  # fmt: skip
CONFIG = EngineConfig(
    model=TEXT, revision=TEXT, cache_dir=TEXT, device="cpu", dtype="fp32", attention_backend="torch",
    max_model_len=BIG, max_seqs=BIG, step_tokens=BIG, page_tokens=2**62, kv_cache_gib=TINY,
    prefix_caching=False, threads=BIG,
)  # fmt: skip
OUTPUT = RequestOutput(
    request_id=TEXT, token_ids=[0, BIG], finish_reason="stop", stop_token_id=0, cached_tokens=BIG,
    scheduled_s=LARGE, first_token_s=-0.0,
)  # fmt: skip
SPECIAL: dict[str, object] = {
    "prefill_tokens_per_s": math.inf, "resident_adapters": [TEXT] * 8, "waiting_adapters": ["", TEXT],
}  # fmt: skip
STATS = EngineStats(**{field.name: SPECIAL.get(field.name, BIG) for field in dataclasses.fields(EngineStats)})
ADAPTER = AdapterInfo(name=TEXT, path=TEXT, rank=BIG, num_bytes=BIG, base_model=TEXT)
REFUSAL = Refusal(request_id=TEXT, error="PromptTooLong", message=TEXT, param="prompt")

LEAST: list[Message] = [
    Start(config=EngineConfig(), model_dir=""),
    Submit(request=GenerateRequest(request_id="", prompt_ids=[], params=SamplingParams())),
    Abort(request_id=""),
    Publish(request_id=""),
    LoadAdapter(reply_to=0, name="", path=""),
    UnloadAdapter(reply_to=0, name=""),
    Loading(done_bytes=0, total_bytes=0),
    Ready(info=FAKE_INFO),
    Failed(error="", message=""),
    Log(level=0, logger="", text=""),
    AdapterReply(reply_to=0),
    StepOutput(),
]
MOST: list[Message] = [
    Start(config=CONFIG, model_dir=TEXT),
    Submit(request=REQUEST),
    Abort(request_id=TEXT * 1000),
    Publish(request_id=TEXT),
    LoadAdapter(reply_to=BIG, name=TEXT, path=TEXT * 100, replace=True),
    UnloadAdapter(reply_to=BIG, name=TEXT),
    Loading(done_bytes=BIG, total_bytes=BIG),
    Ready(
        info=dataclasses.replace(
            FAKE_INFO, model=TEXT, eos_token_ids=[1, BIG], load_s=LARGE, adapters=[ADAPTER] * 3
        )
    ),
    Failed(error="ConfigError", message=TEXT),
    Log(level=50, logger="cabochon.engine", text=TEXT * 100),
    AdapterReply(reply_to=BIG, info=ADAPTER, refusal=REFUSAL),
    StepOutput(
        outputs=[OUTPUT, RequestOutput(request_id="b", token_ids=[])] * 256,
        refusals=[REFUSAL] * 3,
        stats=STATS,
    ),
]


def one(data: bytes) -> Message:
    (message,) = FrameReader().feed(data)
    return message


@pytest.mark.parametrize("messages", [LEAST, MOST], ids=["least", "most"])
def test_the_examples_are_of_every_kind(messages: list[Message]) -> None:
    assert tuple(map(type, messages)) == KINDS


@pytest.mark.parametrize("message", [*LEAST, *MOST], ids=lambda message: type(message).__name__)
def test_a_message_comes_back_as_it_went(message: Message) -> None:
    back = one(encode(message))
    assert type(back) is type(message)
    assert back == message


def test_not_a_number_comes_back_as_such() -> None:
    back = one(encode(StepOutput(stats=EngineStats(prefill_tokens_per_s=math.nan))))
    assert isinstance(back, StepOutput)
    assert math.isnan(back.stats.prefill_tokens_per_s)


@given(
    st.builds(
        SamplingParams,
        max_tokens=st.none() | st.integers(2**20, BIG),
        min_tokens=st.integers(0, 2**20),
        temperature=st.floats(0, 100),
        top_k=st.integers(0, MAX_TOP_K),
        top_p=st.floats(0, 1, exclude_min=True),
        min_p=st.floats(0, 1),
        seed=st.integers(0, MAX_SEED),
        repetition_penalty=st.floats(0, 100, exclude_min=True),
        presence_penalty=st.floats(-2, 2),
        frequency_penalty=st.floats(-2, 2),
        logit_bias=st.dictionaries(st.integers(0, BIG), st.floats(-100, 100), max_size=8),
        stop_token_ids=st.lists(st.integers(0, BIG), max_size=8).map(tuple),
        ignore_eos=st.booleans(),
    ),
    st.text(),
    st.integers(-(2**63), BIG),
)
@settings(deadline=None, max_examples=50)
def test_any_valid_request_comes_back_as_it_went(params: SamplingParams, name: str, priority: int) -> None:
    request = GenerateRequest(request_id=name, prompt_ids=[3], params=params, priority=priority)
    back = one(encode(Submit(request=request)))
    assert isinstance(back, Submit)
    assert back.request == request
    assert isinstance(back.request.params.stop_token_ids, tuple)


def test_frames_cut_at_every_byte_give_each_message_as_soon_as_it_is_whole() -> None:
    frames = [encode(message) for message in LEAST]
    ends = [sum(map(len, frames[: i + 1])) for i in range(len(frames))]
    data = b"".join(frames)
    for cut in range(len(data) + 1):
        reader = FrameReader()
        first = reader.feed(data[:cut])
        assert first == LEAST[: sum(end <= cut for end in ends)]
        assert first + reader.feed(data[cut:]) == LEAST


def test_frames_that_come_byte_by_byte_are_put_together() -> None:
    reader = FrameReader()
    data = b"".join(map(encode, LEAST))
    assert [message for i in range(len(data)) for message in reader.feed(data[i : i + 1])] == LEAST
    assert reader.feed(b"") == []


def test_a_long_message_may_come_in_parts_between_short_ones() -> None:
    reader = FrameReader()
    data = b"".join(map(encode, (LEAST[2], MOST[1], LEAST[3])))
    assert len(data) > 2**20
    got = [message for i in range(0, len(data), 65_536) for message in reader.feed(data[i : i + 65_536])]
    assert got == [LEAST[2], MOST[1], LEAST[3]]


def test_what_was_handed_out_is_not_changed_by_later_bytes() -> None:
    reader = FrameReader()
    first = reader.feed(encode(MOST[0]))
    reader.feed(encode(LEAST[0]) * 50)
    assert first == [MOST[0]]


def test_a_frame_of_another_protocol_is_refused() -> None:
    frame = bytearray(encode(Abort(request_id="a")))
    frame[4] = KINDS.index(Loading)
    with pytest.raises(msgspec.ValidationError, match="missing required field"):
        FrameReader().feed(bytes(frame))


def test_every_step_costs_little_beside_its_content() -> None:
    quiet = encode(StepOutput(outputs=[RequestOutput(request_id="0123456789abcdef-0", token_ids=[5])]))
    assert len(quiet) < 600
