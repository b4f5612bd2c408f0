"""Text from tokens as they come: never half a character, never taken back, stop strings found across tokens.

Works on the bytes of tokens (a piece, or one byte of a byte-fallback token) with an incremental UTF-8
decoder, so a token costs the same wherever it stands. Bytes that are no UTF-8 become U+FFFD one by one, where
`tokenizers` would replace valid neighbours too. Text that may be the start of a stop string waits for the
next token.
"""

import codecs
import json
import re
from collections.abc import Sequence
from functools import cache

from tokenizers import Tokenizer

from cabochon.engine.errors import UnsupportedModel

SPACE = "▁"
BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")
GEMMA_DECODER = ["Replace", "ByteFallback", "Fuse"]


class TokenBytes:
    """What each token of a Gemma tokenizer stands for. Raises UnsupportedModel for another kind."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        decoder = json.loads(tokenizer.decoder.__getstate__()) if tokenizer.decoder is not None else {}
        kinds = [part["type"] for part in decoder.get("decoders", [])]
        if kinds != GEMMA_DECODER:
            raise UnsupportedModel(
                f"tokenizer.json must have Gemma's decoder {GEMMA_DECODER}, this one has {kinds}:"
                " use the model's own"
            )
        added = tokenizer.get_added_tokens_decoder()
        self.special_ids = frozenset(token_id for token_id, token in added.items() if token.special)
        self.of = cache(lambda token_id: _bytes_of(tokenizer, token_id))


def _bytes_of(tokenizer: Tokenizer, token_id: int) -> bytes:
    piece = tokenizer.id_to_token(token_id)
    if piece is None:
        return b""  # rows of the embedding beyond the tokenizer's vocabulary
    byte = BYTE_TOKEN.fullmatch(piece)
    return bytes([int(byte[1], 16)]) if byte else piece.replace(SPACE, " ").encode()


class Detokenizer:
    """One completion. `stop`: strings that end it; the text from the first one on is cut off."""

    def __init__(
        self,
        token_bytes: TokenBytes,
        *,
        stop: Sequence[str] = (),
        skip_special_tokens: bool = True,
        include_stop: bool = False,
        min_tokens: int = 0,
    ) -> None:
        """min_tokens: no stop string is looked for in the text of that many tokens, nor across its end."""
        self._token_bytes = token_bytes
        self._hidden = token_bytes.special_ids if skip_special_tokens else frozenset()
        self._stop = tuple(text for text in stop if text)
        self._hold = max((len(text) for text in self._stop), default=1) - 1
        self.includes_stop = include_stop
        self._unchecked = min_tokens  # tokens still to come whose text may hold a stop string
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._held = ""  # decoded, but a stop string may start in it
        self.stop_string: str | None = None  # the one that was found

    @property
    def is_behind(self) -> bool:
        """Whether tokens came whose text is not out: it is held back, or a stop string has cut it off."""
        return self.stop_string is not None or bool(self._held or self._decoder.getstate()[0])

    def feed(self, token_ids: Sequence[int]) -> str:
        """Take new tokens. Returns the text that is certain now; "" after a stop string."""
        text = ""
        for token_id in token_ids:
            if self.stop_string is not None:
                break
            piece = b"" if token_id in self._hidden else self._token_bytes.of(token_id)
            text += self._release(self._decoder.decode(piece))
            self._unchecked -= 1
        return text

    def flush(self) -> str:
        """The rest, when no more tokens come: an unfinished character becomes U+FFFD."""
        if self.stop_string is not None:
            return ""
        text = self._release(self._decoder.decode(b"", final=True))
        if self.stop_string is None:
            text, self._held = text + self._held, ""
        return text

    def _release(self, text: str) -> str:
        if not self._stop or self._unchecked > 0:
            return text
        self._held += text
        hits = [(at, -len(stop), stop) for stop in self._stop if (at := self._held.find(stop)) >= 0]
        if hits:
            at, _, self.stop_string = min(hits)
            return self._held[: at + len(self.stop_string) if self.includes_stop else at]
        keep = self._possible_start()
        end = len(self._held) - keep
        released, self._held = self._held[:end], self._held[end:]
        return released

    def _possible_start(self) -> int:
        """Length of the longest end of the held text that a stop string may start with."""
        for length in range(min(self._hold, len(self._held)), 0, -1):
            end = self._held[-length:]
            if any(stop.startswith(end) for stop in self._stop):
                return length
        return 0
