"""Names of page contents: a keyed chain hash, so that a page's hash stands for all tokens up to its end.

Keyed with a secret of the process, 128 bits: collisions cannot be constructed from outside, so a hit is not
verified against token ids. Adapter and tenant salt are mixed into the root: other tenants share nothing.
"""

from hashlib import blake2b

import numpy as np
from numpy.typing import NDArray


class PageHasher:
    """digest_bytes below 16 is for tests that force collisions."""

    def __init__(self, key: bytes, digest_bytes: int = 16) -> None:
        self._key = key
        self._digest_bytes = digest_bytes

    def root(self, adapter: str | None, salt: str | None) -> bytes:
        """Parent of a first page."""
        parts = [b"\0" if part is None else b"\1" + part.encode() for part in (adapter, salt)]
        return self._digest(b"".join(len(part).to_bytes(4, "little") + part for part in parts))

    def chain(self, parent: bytes, token_ids: NDArray[np.int32], page_tokens: int) -> list[bytes]:
        """Hashes of full pages, whose first's predecessor has the hash `parent`. token_ids: [n · P] int32."""
        data, step, hashes = token_ids.tobytes(), page_tokens * token_ids.itemsize, []
        for start in range(0, len(data), step):
            parent = self._digest(parent + data[start : start + step])
            hashes.append(parent)
        return hashes

    def _digest(self, data: bytes) -> bytes:
        return blake2b(data, digest_size=self._digest_bytes, key=self._key).digest()
