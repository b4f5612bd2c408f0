"""How many tokens prefills may have in a step, of which long prompts may have few while short ones come.

Whoever comes while a step runs waits for its end. So where steps are slow, and after a short prompt, a long
one gets no more than `part` of a step, less what shorter ones take of it, and half of that while others have
their tokens in it. Short is what fits a step; tokens that the prefix cache has do not count.
"""

from dataclasses import dataclass

RATION_STEPS = 256  # with prefills in them, from a short prompt on


@dataclass(slots=True)
class Budget:
    """What is left of a step, or of a share of it; of `part`, too, what others than long ones take."""

    left: int
    part: int
    taken: int = 0
    has_long: bool = False  # whether a long prompt has taken any

    def half(self) -> "Budget":
        """Rounded up: a single token is the oldest request's."""
        return Budget((self.left + 1) // 2, (self.part + 1) // 2)

    def renew(self, part: int) -> None:
        """For the next priority: those before are no reason to give a long prompt nothing."""
        if not self.has_long:
            self.part = part

    def most(self, remaining: int, *, is_long: bool) -> int:
        """The tokens that a prompt may have of those that remain."""
        return max(0, min(remaining, self.left, self.part if is_long else self.left))

    def take(self, tokens: int, *, is_long: bool) -> None:
        self.left -= tokens
        self.part -= tokens
        self.taken += tokens
        self.has_long |= is_long


class Ration:
    """The budgets of steps. part_tokens: of long prompts while short ones come; None: all of a step."""

    def __init__(self, step_tokens: int, part_tokens: int | None) -> None:
        self._step_tokens = step_tokens
        self._part_tokens = part_tokens
        self._steps_left = 0

    def is_long(self, tokens: int) -> bool:
        """A prompt of which so many are to be computed."""
        return tokens > self._step_tokens

    def hear(self, tokens: int) -> None:
        """Of a prompt that has come, or has got its row, how many are to be computed."""
        if not self.is_long(tokens):
            self._steps_left = RATION_STEPS

    def next_step(self, num_decodes: int) -> Budget:
        """Of a step with prefills and so many decodes."""
        budget = Budget(self._step_tokens - num_decodes, self._step_tokens)
        if self._part_tokens is not None and self._steps_left:
            budget.part = (self._part_tokens + 1) // 2 if num_decodes else self._part_tokens
        self._steps_left = max(0, self._steps_left - 1)
        return budget
