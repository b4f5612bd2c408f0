"""Chain hashes: equal for equal prefixes, different for everything else that must not share pages."""

from hashlib import blake2b

import numpy as np
import pytest
from numpy.typing import NDArray

from cabochon.engine.hashing import PageHasher

PAGE = np.arange(16, dtype=np.int32)


def extend(hasher: PageHasher, parent: bytes, page: NDArray[np.int32]) -> bytes:
    (name,) = hasher.chain(parent, page, len(page))
    return name


def test_the_hash_is_keyed_blake2b_over_parent_and_tokens() -> None:
    hasher = PageHasher(b"secret")
    root = hasher.root(None, None)
    expected = blake2b(
        root + b"".join(i.to_bytes(4, "little") for i in range(16)), digest_size=16, key=b"secret"
    )
    assert extend(hasher, root, PAGE) == expected.digest()


def test_equal_prefixes_have_equal_hashes() -> None:
    one, two = PageHasher(b"secret"), PageHasher(b"secret")
    assert extend(one, one.root("a", "s"), PAGE) == extend(two, two.root("a", "s"), PAGE.copy())


def test_tokens_may_be_a_slice_of_a_larger_array() -> None:
    hasher = PageHasher(b"secret")
    known = np.stack([np.zeros(32, np.int32), np.concatenate([PAGE, PAGE])])
    assert extend(hasher, b"parent", known[1, 16:32]) == extend(hasher, b"parent", PAGE)


def test_a_chain_is_one_page_after_the_other() -> None:
    hasher, tokens = PageHasher(b"secret"), np.arange(48, dtype=np.int32)
    names = [b"parent"]
    for start in range(0, 48, 16):
        names.append(extend(hasher, names[-1], tokens[start : start + 16]))
    assert hasher.chain(b"parent", tokens, 16) == names[1:]
    assert hasher.chain(b"parent", tokens[:0], 16) == []


def test_another_process_has_other_hashes() -> None:
    assert PageHasher(b"one").root(None, None) != PageHasher(b"two").root(None, None)


def test_no_two_tenants_or_adapters_share_a_root() -> None:
    hasher = PageHasher(b"secret")
    parts = [None, "", "a", "b", "ab", "a\0", "\0", "\1", "é"]
    roots = {hasher.root(adapter, salt) for adapter in parts for salt in parts}
    assert len(roots) == len(parts) ** 2


def test_a_page_under_another_parent_has_another_hash() -> None:
    hasher = PageHasher(b"secret")
    first = extend(hasher, hasher.root(None, None), PAGE)
    assert len({first, extend(hasher, first, PAGE), extend(hasher, hasher.root(None, "x"), PAGE)}) == 3


def test_the_order_of_tokens_counts() -> None:
    hasher = PageHasher(b"secret")
    assert extend(hasher, b"parent", PAGE) != extend(hasher, b"parent", PAGE[::-1])


@pytest.mark.parametrize("digest_bytes", [1, 2, 16])
def test_digests_have_the_length_asked_for(digest_bytes: int) -> None:
    hasher = PageHasher(b"secret", digest_bytes)
    assert len(hasher.root(None, None)) == len(extend(hasher, b"", PAGE)) == digest_bytes
