"""Where a text may be cut: what is before leaves, what is behind waits for more.

Never in a character as a reader sees one (a grapheme cluster), nor in a run without blanks: it may be an
address, and half of one tells the rest. Chinese, Japanese and Thai have no blanks between words: their own
punctuation is a border too, and in a run of nothing but their letters any place is good.
"""

import regex  # \X and scripts, which `re` lacks; (?r) searches backwards

MAX_RUN = 2048  # characters: the longest URL browsers take; a longer run must not hold a stream up for ever
BORDER = r"\s\u3001\u3002\u3008-\u3011\u3014-\u301b\uff01\uff08\uff09\uff0c\uff1a\uff1b\uff1f\u2026"
LETTERS = r"\p{Han}\p{Hiragana}\p{Katakana}\u30fc\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}"  # without blanks
CLUSTER = regex.compile(r"\X")
NEXT_BORDER = regex.compile(rf"[{BORDER}]")
LAST_BORDER = regex.compile(rf"(?r)[{BORDER}]")
UNSPACED = regex.compile(rf"[{LETTERS}\p{{M}}]+")
WORD = regex.compile(rf"[{LETTERS}]|[^{BORDER}{LETTERS}]+")


def safe_cut(text: str, limit: int) -> int:
    """The last place to cut `text` that is at most `limit`, below its length. 0: there is none."""
    at = limit
    while at > 0:
        outside = _before_run(text, at)
        at = _before_cluster(text, outside)
        if at == outside:
            break
    return at


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
    if at - start > MAX_RUN:
        return at
    border = NEXT_BORDER.search(text, at)
    end = len(text) if border is None else border.start()
    return at if UNSPACED.fullmatch(text, start, end) else start


def _before_cluster(text: str, at: int) -> int:
    """`at`, or the start of the cluster that it would split."""
    around = text[at - 1 : at + 1]
    if at == 0 or (around.isascii() and around != "\r\n"):
        return at
    for cluster in CLUSTER.finditer(text):  # from the start: what a cluster is depends on what is before it
        if cluster.end() > at:
            return at if at - cluster.start() > MAX_RUN else cluster.start()
    return at
