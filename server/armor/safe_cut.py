"""Where a text may be cut: what is before leaves, what is behind waits for more.

Never in a character as a reader sees one (a grapheme cluster), nor in a run without blanks: it may be an
address, and half of one tells the rest. Chinese, Japanese and Thai have no blanks between words: their own
punctuation is a border too, and in a run of nothing but their letters any place is good.
"""

from collections.abc import Iterator
from itertools import takewhile

import regex  # \X and scripts, which `re` lacks; (?r) searches backwards

MAX_RUN = 2048  # characters: the longest URL browsers take; a longer run must not hold a stream up for ever
BORDER = r"\s\u3001\u3002\u3008-\u3011\u3014-\u301b\uff01\uff08\uff09\uff0c\uff1a\uff1b\uff1f\u2026"
LETTERS = r"\p{Han}\p{Hiragana}\p{Katakana}\u30fc\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}"  # without blanks
FLAG = r"\p{GCB=Prepend}*+\p{GCB=RI}{2}[\p{GCB=Extend}\p{GCB=ZWJ}\p{GCB=SpacingMark}]*+"
CLUSTER = regex.compile(rf"{FLAG}|\X")  # among flags alone \X counts them from the first, for each again
NEXT_BORDER = regex.compile(rf"[{BORDER}]")
LAST_BORDER = regex.compile(rf"(?r)[{BORDER}]")
UNSPACED = regex.compile(rf"[{LETTERS}\p{{M}}]+")
WORD = regex.compile(rf"[{LETTERS}]|[^{BORDER}{LETTERS}]+")


def safe_cut(text: str, limit: int) -> int:
    """The last place to cut `text` that is at most `limit`, below its length. 0: there is none.

    If the last MAX_RUN characters have none, it is between any two clusters there, and if it is all one
    cluster, at `limit`. The work is linear in the text.
    """
    oldest = limit - MAX_RUN
    last_border: int | None = None
    run_start = limit + 1  # of a run that must not be split; all behind has been looked at
    for at in takewhile(lambda at: at >= oldest, _cluster_borders(text, limit)):
        if last_border is None:
            last_border = at
        if at < run_start:
            run_start = _before_run(text, at)
        if at == run_start:
            return at
    return limit if last_border is None else last_border


def has_words(text: str, count: int) -> bool:
    """Whether it has that many words; a letter of a script without blanks is one."""
    words = WORD.finditer(text)
    return all(next(words, None) is not None for _ in range(count))


def _before_run(text: str, at: int) -> int:
    """`at`, or the start of the run that it would split."""
    border = LAST_BORDER.search(text, 0, at)
    start = 0 if border is None else border.end()
    if start == at or NEXT_BORDER.match(text, at):
        return at
    border = NEXT_BORDER.search(text, at)
    end = len(text) if border is None else border.start()
    return at if UNSPACED.fullmatch(text, start, end) else start


def _cluster_borders(text: str, at: int) -> Iterator[int]:
    """Those at or before `at`, the last one first. All up to what is not ASCII cost one pass together."""
    while at > 0 and (around := text[at - 1 : at + 1]).isascii() and around != "\r\n":
        yield at
        at -= 1
    starts = (cluster.start() for cluster in CLUSTER.finditer(text))  # each depends on what is before it
    yield from reversed(list(takewhile(lambda start: start <= at, starts)))
