"""Grammars that bind what a request generates: compiled aside, a mask over the vocabulary for each token.

llguidance parses: at 262,144 tokens a mask takes 20 to 700 µs and releases the GIL, errors are a state of the
matcher and no exception, and compilation runs on bounded fuel. Knows nothing of rows.
"""

from collections import OrderedDict
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
from llguidance import LLMatcher, LLParserLimits, LLTokenizer, TokenizerWrapper
from llguidance.gbnf_to_lark import GbnfToLarkError, any_to_lark
from numpy.typing import NDArray
from tokenizers import Tokenizer

from cabochon.engine.detokenizer import TokenBytes
from cabochon.engine.errors import BadGrammar
from cabochon.engine.sampling_params import JSON_WHITESPACE, Grammar

KEPT_GRAMMARS = 64  # compiled ones, the least recently used goes first
THREADS = 8  # more than cores: one that takes seconds must not hold up the others
JSON_OPTIONS: Any = {"whitespace_pattern": JSON_WHITESPACE}
# Verbose errors would quote the text
LIMITS = LLParserLimits(verbose_errors=False, precompute_large_lexemes=False)


class Matcher:
    """How far one output is in its grammar."""

    def __init__(self, matcher: LLMatcher, vocab_size: int) -> None:
        self._matcher = matcher
        self._vocab_size = vocab_size

    def mask(self) -> NDArray[np.bool_]:
        """[V], the tokens that may come next; none if the grammar has become too complex to follow."""
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        if self._matcher.is_error():
            return np.zeros(self._vocab_size, np.bool_)
        return np.unpackbits(bits, bitorder="little", count=self._vocab_size).view(np.bool_)

    def advance(self, token_id: int) -> bool:
        """Take a token that the mask allowed. Returns whether only the end may follow."""
        self._matcher.consume_token(token_id)
        return self._matcher.is_stopped() and not self._matcher.is_error()

    def error(self) -> str:
        """Why it cannot go on, in a line, or nothing."""
        return self._matcher.get_error().strip().partition("\n")[0][:200]

    def copy(self) -> "Matcher":
        """An independent one in the same state."""
        return Matcher(self._matcher.deep_copy(), self._vocab_size)


class Grammars:
    """Compiles each grammar once, for the tokenizer in a directory, which is read at the first use."""

    def __init__(self, model_dir: Path, vocab_size: int, eos_ids: list[int]) -> None:
        self._model_dir = model_dir
        self._vocab_size = vocab_size
        self._eos_ids = eos_ids
        self._pool = ThreadPoolExecutor(THREADS, "grammar")
        self._tokenizer: LLTokenizer | None = None
        self._kept: OrderedDict[Grammar, Matcher] = OrderedDict()
        self._lock = Lock()

    def compile(self, grammar: Grammar) -> Future[Matcher]:
        """A matcher at its start. The future raises BadGrammar."""
        return self._pool.submit(self._compile, grammar)

    def next_mask(self, matcher: Matcher) -> Future[NDArray[np.bool_]]:
        """Its mask, computed aside."""
        return self._pool.submit(matcher.mask)

    def _compile(self, grammar: Grammar) -> Matcher:
        with self._lock:  # threads that come meanwhile wait for the one that reads the tokenizer
            self._tokenizer = self._tokenizer or self._read_tokenizer()
            kept = self._kept.get(grammar)
            if kept is not None:
                self._kept.move_to_end(grammar)
                return kept.copy()
        source = _source(grammar)
        first = Matcher(LLMatcher(self._tokenizer, source, log_level=0, limits=LIMITS), self._vocab_size)
        allows_any = first.mask().any()
        if reason := first.error():
            raise BadGrammar(
                f"{grammar.param} must be one that can be followed: {reason}: simplify it", grammar.param
            )
        if not allows_any:
            raise BadGrammar(
                f"{grammar.param} must allow some text, it allows none: correct it", grammar.param
            )
        with self._lock:
            self._kept[grammar] = first
            if len(self._kept) > KEPT_GRAMMARS:
                self._kept.popitem(last=False)
            return first.copy()

    def _read_tokenizer(self) -> LLTokenizer:
        tokenizer = Tokenizer.from_file(str(self._model_dir / "tokenizer.json"))
        vocabulary: Any = _Vocabulary(tokenizer, self._vocab_size, self._eos_ids[0])
        return LLTokenizer(TokenizerWrapper(vocabulary), n_vocab=self._vocab_size, eos_token=self._eos_ids)


class _Vocabulary:
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
                return LLMatcher.grammar_from_json_schema(grammar.text, overrides=JSON_OPTIONS)
            case "regex":
                return LLMatcher.grammar_from_regex(grammar.text)
            case "lark":
                return LLMatcher.grammar_from_lark(grammar.text)
            case "lark_or_gbnf":  # told apart by their looks, so never for text of our own making
                return LLMatcher.grammar_from_lark(any_to_lark(grammar.text))
    except (ValueError, RecursionError, GbnfToLarkError):
        raise BadGrammar(
            f"{grammar.param} must be a valid {grammar.kind}: correct it", grammar.param
        ) from None
