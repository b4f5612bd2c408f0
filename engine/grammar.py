"""What may follow, by llguidance: its view of a tokenizer, and a grammar compiled against it.

At 262,144 tokens a mask takes 20 to 700 µs and releases the GIL; errors are a state of the matcher and no
exception. Most of a compilation runs on bounded fuel, but not all: see grammar_process. JSON is bounded where
models run away, until their tokens are used up: white space, digits of numbers, fractions of seconds.
"""

import json
import re
from pathlib import Path
from typing import Any, NamedTuple

from llguidance import LLMatcher, LLParserLimits, LLTokenizer, TokenizerWrapper
from llguidance.gbnf_to_lark import GbnfToLarkError, any_to_lark
from tokenizers import Tokenizer

from cabochon.engine.detokenizer import TokenBytes
from cabochon.engine.errors import BadGrammar
from cabochon.engine.json_schema import rewritten
from cabochon.engine.sampling_params import JSON_WHITESPACE, Grammar

JSON_OPTIONS: Any = {"whitespace_pattern": JSON_WHITESPACE}
MAX_DIGITS = 20  # in a row outside of strings, where something else may follow: 2^64 has 20
TIMES = ("time", "date-time")
SHORT_FRACTION = r"^[^.]*(\.[0-9]{1,9})?[^.0-9][^.]*$"  # of a second: nanoseconds, then the zone
LIMITS = LLParserLimits(verbose_errors=False, precompute_large_lexemes=False)  # verbose ones quote the text
REASON_CHARS = 200  # of llguidance's own words in an error


class Vocabulary(NamedTuple):
    """trie: of the bytes of all tokens. digits: a bit for each token that starts with a digit."""

    trie: LLTokenizer
    digits: int


def read_vocabulary(model_dir: Path, vocab_size: int, eos_ids: list[int]) -> Vocabulary:
    """3 s and 0.2 GB for 262,144 tokens, the GIL held. Raises UnsupportedModel."""
    tokenizer = Tokenizer.from_file(str(model_dir / "tokenizer.json"))
    asked: Any = _Asked(tokenizer, vocab_size, eos_ids[0])
    wrapper = TokenizerWrapper(asked)
    trie = LLTokenizer(wrapper, n_vocab=vocab_size, eos_token=eos_ids)
    digits = "".join("1" if token[:1].isdigit() else "0" for token in reversed(asked.tokens))
    wrapper.tokens = asked.tokens = []  # the trie has its own
    return Vocabulary(trie, int(digits, 2))


def compile_grammar(vocabulary: Vocabulary, grammar: Grammar) -> tuple[LLMatcher, bytes]:
    """A matcher at its start, and its first mask, a bit a token. Raises BadGrammar (no field is named)."""
    matcher = LLMatcher(vocabulary.trie, _source(grammar), log_level=0, limits=LIMITS)
    mask = matcher.compute_bitmask()
    if matcher.is_error():
        raise BadGrammar(f"must be one that can be followed: {reason(matcher)}: simplify it")
    if not any(mask):
        raise BadGrammar("must allow some text, it allows none: correct it")
    return matcher, mask


def reason(matcher: LLMatcher) -> str:
    """Why it cannot go on, in a line; what it quotes is the client's, and is left out."""
    line = matcher.get_error().strip().partition("\n")[0]
    return re.sub(r"'[^']*'|\"[^\"]*\"|`[^`]*`|\S*://\S*", "…", line)[:REASON_CHARS]


class DigitRun:
    """How many digits a JSON text ends in, outside of strings."""

    def __init__(self) -> None:
        self._length = 0
        self._is_in_string = False
        self._is_escaped = False

    @property
    def is_full(self) -> bool:
        return self._length >= MAX_DIGITS

    def feed(self, text: bytes) -> None:
        """The bytes of the next token."""
        for byte in text:
            if self._is_in_string:
                is_quote = byte == 0x22 and not self._is_escaped
                self._is_in_string = not is_quote
                self._is_escaped = byte == 0x5C and not self._is_escaped
            elif 0x30 <= byte <= 0x39:
                self._length += 1
            else:
                self._length = 0
                self._is_in_string = byte == 0x22


class _Asked:
    """What llguidance asks of a tokenizer: the bytes of each token, and how forced text is tokenized."""

    bos_token_id = None

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, eos_token_id: int) -> None:
        of = TokenBytes(tokenizer)
        self._tokenizer = tokenizer
        self.eos_token_id = eos_token_id
        self.special_token_ids = sorted(of.special_ids)
        self.tokens = [of.of(token_id) for token_id in range(vocab_size)]

    def __call__(self, text: str | bytes) -> list[int]:
        string = text.decode(errors="replace") if isinstance(text, bytes) else text
        return self._tokenizer.encode(string, add_special_tokens=False).ids


def _source(grammar: Grammar) -> str:
    try:
        match grammar.kind:
            case "json_schema":
                schema = json.dumps(rewritten(json.loads(grammar.text), _with_short_fraction))
                return LLMatcher.grammar_from_json_schema(schema, overrides=JSON_OPTIONS)
            case "regex":
                return LLMatcher.grammar_from_regex(grammar.text)
            case "lark":
                return LLMatcher.grammar_from_lark(grammar.text)
            case "lark_or_gbnf":  # told apart by their looks, so never for text of our own making
                return LLMatcher.grammar_from_lark(any_to_lark(grammar.text))
    except (ValueError, RecursionError, GbnfToLarkError):
        raise BadGrammar(f"must be a valid {grammar.kind}: correct it") from None


def _with_short_fraction(schema: dict[str, Any]) -> dict[str, Any]:
    """A time has at most nine digits after the second; a pattern of the client's own stays."""
    return {"pattern": SHORT_FRACTION, **schema} if schema.get("format") in TIMES else schema
