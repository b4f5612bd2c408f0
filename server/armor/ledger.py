"""What goes with the text of a guarded choice: counts of tokens, log probabilities, times, why it ended.

Log probabilities name tokens, so they are text: those of a token go out with the text that it became or
later, never before. Tokens that a stop string cut off are dropped. So are the likeliest alternatives of every
token: words that the model did not say and no check has seen. Special tokens, which no text shows, pass.
"""

from collections import deque
from dataclasses import dataclass

from cabochon.engine.messages import TokenLogprobs
from cabochon.server.generation import Delta, EndReason
from cabochon.server.logprobs import ScoredTokens


@dataclass(frozen=True, slots=True)
class _Mark:
    """A delta that came. end: characters of the choice up to its end."""

    end: int
    arrived_s: float
    scored: ScoredTokens | None


class Ledger:
    """Of one choice. Each delta is taken; each release says how many of the characters taken it is for."""

    def __init__(self) -> None:
        self._index: int | None = None
        self._marks: deque[_Mark] = deque()  # of deltas whose text is not wholly out
        self._behind = ScoredTokens()  # tokens that came before their text did
        self._num_taken = self._num_out = 0  # characters
        self._num_tokens = self._cached_tokens = 0  # num_tokens: not told yet
        self._finish_reason: EndReason | None = None
        self._is_rewritten = False

    @property
    def has_begun(self) -> bool:
        """Whether any delta was taken."""
        return self._index is not None

    @property
    def oldest_s(self) -> float | None:
        """When the first delta came whose text is not out."""
        return self._marks[0].arrived_s if self._marks else None

    def take(self, delta: Delta, now: float) -> None:
        """Enter a delta that came now."""
        self._index = delta.index
        self._num_taken += len(delta.text)
        self._num_tokens += delta.num_tokens
        self._cached_tokens = delta.cached_tokens
        self._finish_reason = delta.finish_reason
        self._marks.append(_Mark(self._num_taken, now, self._shown_with(delta)))

    def forget_scored(self) -> None:
        """The text was rewritten: from here on it is not that of the tokens."""
        self._is_rewritten = True

    def release(self, num_chars: int, text: str, *, is_last: bool = False) -> Delta:
        """`text`, for the next num_chars that were taken, with all that may go with it."""
        self._num_out += num_chars
        scored = ScoredTokens()
        while self._marks and self._marks[0].end <= self._num_out:
            shown = self._marks.popleft().scored
            if shown is not None and not self._is_rewritten:
                scored.extend(shown.token_ids, shown.logprobs)
        reason = self._finish_reason if is_last else None
        return self._delta(text, reason, scored if scored.token_ids else None)

    def blocked(self) -> Delta:
        """The end of a choice of which nothing more may be shown."""
        return self._delta("", "content_filter", None)

    def _delta(self, text: str, reason: EndReason | None, scored: ScoredTokens | None) -> Delta:
        num_tokens, self._num_tokens = self._num_tokens, 0
        return Delta(self._index or 0, text, num_tokens, self._cached_tokens, reason, scored)

    def _shown_with(self, delta: Delta) -> ScoredTokens | None:
        """The tokens whose text is whole with the delta's; others wait for a delta that is not behind."""
        if delta.scored is None or self._is_rewritten:
            return None
        self._behind.extend(delta.scored.token_ids, [_alone(one) for one in delta.scored.logprobs])
        if delta.is_behind:
            return None
        shown, self._behind = self._behind, ScoredTokens()
        return shown


def _alone(one: TokenLogprobs | None) -> TokenLogprobs | None:
    return None if one is None else TokenLogprobs(one.logprob, [], [])
