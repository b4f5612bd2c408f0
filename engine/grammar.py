"""What may follow, by llguidance: its view of a tokenizer, and a grammar compiled against it.

At 262,144 tokens a mask takes 20 to 700 µs and releases the GIL; errors are a state of the matcher and no
exception. Most of a compilation runs on bounded fuel, but not all: see grammar_process.
"""

import re
from pathlib import Path
from typing import Any

from llguidance import LLMatcher, LLParserLimits, LLTokenizer, TokenizerWrapper
from llguidance.gbnf_to_lark import GbnfToLarkError, any_to_lark
from tokenizers import Tokenizer

from cabochon.engine.detokenizer import TokenBytes
from cabochon.engine.errors import BadGrammar
from cabochon.engine.sampling_params import JSON_WHITESPACE, Grammar

JSON_OPTIONS: Any = {"whitespace_pattern": JSON_WHITESPACE}
# Verbose errors would quote the text
LIMITS = LLParserLimits(verbose_errors=False, precompute_large_lexemes=False)
REASON_CHARS = 200  # of llguidance's own words in an error


def read_tokenizer(model_dir: Path, vocab_size: int, eos_ids: list[int]) -> LLTokenizer:
    """The trie of all tokens: 3 s and 0.1 GB for 262,144 of them, the GIL held. Raises UnsupportedModel."""
    tokenizer = Tokenizer.from_file(str(model_dir / "tokenizer.json"))
    vocabulary: Any = _Vocabulary(tokenizer, vocab_size, eos_ids[0])
    wrapper = TokenizerWrapper(vocabulary)
    trie = LLTokenizer(wrapper, n_vocab=vocab_size, eos_token=eos_ids)
    wrapper.tokens = vocabulary.tokens = []  # the trie has its own
    return trie


def compile_grammar(tokenizer: LLTokenizer, grammar: Grammar) -> tuple[LLMatcher, bytes]:
    """A matcher at its start, and its first mask, a bit a token. Raises BadGrammar (no field is named)."""
    matcher = LLMatcher(tokenizer, _source(grammar), log_level=0, limits=LIMITS)
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
        raise BadGrammar(f"must be a valid {grammar.kind}: correct it") from None
