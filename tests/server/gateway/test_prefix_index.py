"""Chunks of prompts and the index of who has them."""

from cabochon.server.gateway.prefix_index import PrefixIndex, chunk_hashes, chunk_tokens


def test_small_pages_are_raised_to_64_tokens_and_larger_ones_kept() -> None:
    assert [chunk_tokens(tokens) for tokens in (0, 16, 64, 128)] == [64, 64, 64, 128]


def test_a_name_says_all_that_came_before() -> None:
    one = chunk_hashes(b"a" * 256 + b"b" * 256 + b"c", 64, "demo")
    assert len(one) == 3
    assert one[:1] == chunk_hashes(b"a" * 256, 64, "demo")
    assert one[:2] == chunk_hashes(b"a" * 256 + b"b" * 256 + b"d", 64, "demo")[:2]
    assert not set(one) & set(chunk_hashes(b"b" * 256 + b"a" * 256 + b"c", 64, "demo"))
    assert len(set(chunk_hashes(b"a" * 1024, 64, "demo"))) == 4
    assert chunk_hashes(b"", 64, "demo") == []


def test_no_more_than_131072_tokens_are_matched() -> None:
    assert len(chunk_hashes(b"a" * (4 * 131_072 + 256), 64, "demo")) == 2048


def test_matches_end_at_the_first_chunk_that_nobody_has() -> None:
    index = PrefixIndex()
    index.add("a", [b"1", b"2"], 10)
    index.add("b", [b"1", b"4"], 10)
    assert index.matches([b"1", b"2", b"3", b"4"]) == {"a": 2, "b": 1}
    assert index.matches([b"3", b"1"]) == {}


def test_an_endpoint_forgets_what_its_pages_cannot_hold() -> None:
    index = PrefixIndex()
    index.add("a", [b"1", b"2"], 3)
    index.add("a", [b"1", b"3", b"4"], 3)  # 1 was sent again, 2 was not
    assert [bool(index.matches([name])) for name in (b"1", b"2", b"3", b"4")] == [True, False, True, True]


def test_an_endpoint_that_left_the_pool_is_forgotten() -> None:
    index = PrefixIndex()
    index.add("a", [b"1"], 0)
    index.add("b", [b"1"], 0)
    index.keep({"b"})
    assert index.matches([b"1"]) == {"b": 1}
