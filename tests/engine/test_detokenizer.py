"""Pieces joined are the whole text, up to the first stop string; no piece holds half a character."""

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings
from tiny_tokenizer import tiny_tokenizer
from tokenizers import decoders

from cabochon.engine.detokenizer import Detokenizer, TokenBytes
from cabochon.engine.errors import UnsupportedModel

TOKENIZER = tiny_tokenizer()
BYTES = TokenBytes(TOKENIZER)
PARTS = [*"helowrdst \n", "é", "你", "👍🏽", "שלום", "\ufffd"]
TEXTS = st.lists(st.sampled_from(PARTS), max_size=30).map("".join)


def pieces_of(ids: list[int], **options: object) -> tuple[list[str], Detokenizer]:
    detokenizer = Detokenizer(BYTES, **options)
    return [*(detokenizer.feed([token_id]) for token_id in ids), detokenizer.flush()], detokenizer


@given(TEXTS)
def test_pieces_join_to_the_text(text: str) -> None:
    ids = TOKENIZER.encode(text, add_special_tokens=False).ids
    pieces, _ = pieces_of(ids)
    assert "".join(pieces) == text


@given(st.lists(st.integers(6, 261), max_size=20))
def test_any_bytes_give_what_python_decodes(ids: list[int]) -> None:
    pieces, _ = pieces_of(ids)
    assert "".join(pieces) == bytes(token_id - 6 for token_id in ids).decode(errors="replace")


@settings(max_examples=300)
@given(TEXTS, st.lists(st.text("helowrdst ", min_size=1, max_size=6), max_size=4), st.booleans())
def test_text_ends_at_the_first_stop_string(text: str, stop: list[str], include: bool) -> None:
    ids = TOKENIZER.encode(text, add_special_tokens=False).ids
    pieces, detokenizer = pieces_of(ids, stop=stop, include_stop=include)
    # The naive model: after each token, is a stop string in the whole characters so far?
    expected, found = text, None
    for count in range(1, len(ids) + 1):
        so_far = b"".join(map(BYTES.of, ids[:count])).decode(errors="ignore")
        hits = [(so_far.find(s), -len(s), s) for s in stop if s in so_far]
        if hits:
            at, _, found = min(hits)
            expected = so_far[: at + len(found) if include else at]
            break
    assert "".join(pieces) == expected
    assert detokenizer.stop_string == found


def test_an_emoji_comes_whole() -> None:
    ids = TOKENIZER.encode("a👍b", add_special_tokens=False).ids
    assert len(ids) == 6
    assert [piece for piece in pieces_of(ids)[0] if piece] == ["a", "👍", "b"]


def test_half_a_character_at_the_end_is_replaced() -> None:
    ids = TOKENIZER.encode("a👍", add_special_tokens=False).ids[:-1]
    assert "".join(pieces_of(ids)[0]) == "a\ufffd"


def test_only_a_possible_start_is_held_back() -> None:
    detokenizer = Detokenizer(BYTES, stop=["stop"])
    ids = TOKENIZER.encode("user st", add_special_tokens=False).ids
    assert detokenizer.feed(ids) == "user "
    assert detokenizer.feed(TOKENIZER.encode("er", add_special_tokens=False).ids) == "ster"


def test_it_is_behind_while_text_is_held_back_and_after_a_stop_string() -> None:
    hello, half = TOKENIZER.encode("hello st", add_special_tokens=False).ids, TOKENIZER.token_to_id("<0xF0>")
    detokenizer = Detokenizer(BYTES, stop=["stop"])
    seen = []
    for ids in (hello[:1], hello[1:], hello[:1], [half], hello[:1]):
        detokenizer.feed(ids)
        seen.append(detokenizer.is_behind)
    detokenizer.feed([half])
    detokenizer.flush()
    assert (seen, detokenizer.is_behind) == ([False, True, False, True, False], False)
    detokenizer = Detokenizer(BYTES, stop=["he"], include_stop=True)
    detokenizer.feed(hello[:1])
    detokenizer.flush()
    assert detokenizer.is_behind


def test_special_tokens_are_skipped_or_shown() -> None:
    ids = [TOKENIZER.token_to_id("<end_of_turn>"), *TOKENIZER.encode("hello", add_special_tokens=False).ids]
    assert "".join(pieces_of(ids)[0]) == "hello"
    assert "".join(pieces_of(ids, skip_special_tokens=False)[0]) == "<end_of_turn>hello"


@pytest.mark.parametrize("size", [1, 2, 5])
def test_several_tokens_at_once_give_the_same(size: int) -> None:
    ids = TOKENIZER.encode("hello world 👍 user stop", add_special_tokens=False).ids
    detokenizer = Detokenizer(BYTES)
    text = (
        "".join(detokenizer.feed(ids[i : i + size]) for i in range(0, len(ids), size)) + detokenizer.flush()
    )
    assert text == "hello world 👍 user stop"


def test_another_kind_of_tokenizer_is_refused() -> None:
    other = tiny_tokenizer()
    other.decoder = decoders.Metaspace()
    with pytest.raises(UnsupportedModel, match="must have Gemma's decoder"):
        TokenBytes(other)


def test_no_stop_string_is_looked_for_within_min_tokens() -> None:
    ids = TOKENIZER.encode("stop hello stop", add_special_tokens=False).ids
    pieces, detokenizer = pieces_of(ids, stop=["stop"], min_tokens=1)
    assert "".join(pieces) == "stop hello "
    assert detokenizer.stop_string == "stop"
    assert "".join(pieces_of(ids, stop=["stop"], min_tokens=len(ids))[0]) == "stop hello stop"


def test_of_stop_strings_at_one_place_the_longest_is_found() -> None:
    ids = [TOKENIZER.token_to_id("hello")]
    for stop in (["he", "hello"], ["hello", "he"]):
        pieces, detokenizer = pieces_of(ids, stop=stop, include_stop=True)
        assert ("".join(pieces), detokenizer.stop_string) == ("hello", "hello")
