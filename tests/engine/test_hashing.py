"""Chain hashes: equal for equal prefixes, different for everything else that must not share pages."""

from hashlib import blake2b

import numpy as np
import pytest

from cabochon.engine.hashing import PageHasher

PAGE = np.arange(16, dtype=np.int32)


def test_the_hash_is_keyed_blake2b_over_parent_and_tokens() -> None:
    hasher = PageHasher(b"secret")
    root = hasher.root(None, None)
    expected = blake2b(
        root + b"".join(i.to_bytes(4, "little") for i in range(16)), digest_size=16, key=b"secret"
    )
    assert hasher.extend(root, PAGE) == expected.digest()


def test_equal_prefixes_have_equal_hashes() -> None:
    one, two = PageHasher(b"secret"), PageHasher(b"secret")
    assert one.extend(one.root("a", "s"), PAGE) == two.extend(two.root("a", "s"), PAGE.copy())


def test_tokens_may_be_a_slice_of_a_larger_array() -> None:
    hasher = PageHasher(b"secret")
    known = np.stack([np.zeros(32, np.int32), np.concatenate([PAGE, PAGE])])
    assert hasher.extend(b"parent", known[1, 16:32]) == hasher.extend(b"parent", PAGE)


def test_another_process_has_other_hashes() -> None:
    assert PageHasher(b"one").root(None, None) != PageHasher(b"two").root(None, None)


def test_no_two_tenants_or_adapters_share_a_root() -> None:
    hasher = PageHasher(b"secret")
    parts = [None, "", "a", "b", "ab", "a\0", "\0", "\1", "é"]
    roots = {hasher.root(adapter, salt) for adapter in parts for salt in parts}
    assert len(roots) == len(parts) ** 2


def test_a_page_under_another_parent_has_another_hash() -> None:
    hasher = PageHasher(b"secret")
    first = hasher.extend(hasher.root(None, None), PAGE)
    assert len({first, hasher.extend(first, PAGE), hasher.extend(hasher.root(None, "x"), PAGE)}) == 3


def test_the_order_of_tokens_counts() -> None:
    hasher = PageHasher(b"secret")
    assert hasher.extend(b"parent", PAGE) != hasher.extend(b"parent", PAGE[::-1])


@pytest.mark.parametrize("digest_bytes", [1, 2, 16])
def test_digests_have_the_length_asked_for(digest_bytes: int) -> None:
    hasher = PageHasher(b"secret", digest_bytes)
    assert len(hasher.root(None, None)) == len(hasher.extend(b"", PAGE)) == digest_bytes
