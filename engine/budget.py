"""How many tokens prefills may have in a step: a prompt that fits all of it, of a longer one a part.

Whoever comes while a step runs waits for its end. So where steps are slow, and short prompts come, a long one
gets less of each step than there is, and half of that while others have their tokens in it.
"""

from dataclasses import dataclass

RATION_STEPS = 256  # with prefills in them, after the last short prompt


@dataclass(slots=True)
class Budget:
    """What is left of a step, or of a share of it. All that is taken counts against `part`, too."""

    left: int
    part: int
    taken: int = 0

    def half(self) -> "Budget":
        """Rounded up: a single token is the oldest request's."""
        return Budget((self.left + 1) // 2, (self.part + 1) // 2)

    def most(self, remaining: int, *, has_begun: bool) -> int:
        """The tokens that a prompt may have. has_begun: in an earlier step."""
        if remaining <= self.left and not has_begun:
            return remaining
        return max(0, min(remaining, self.left, self.part))

    def take(self, tokens: int) -> None:
        self.left -= tokens
        self.part -= tokens
        self.taken += tokens


class Ration:
    """Budgets of steps. part_tokens: of prompts that do not fit, where short ones come; None: no limit."""

    def __init__(self, step_tokens: int, part_tokens: int | None) -> None:
        self._step_tokens = step_tokens
        self._part_tokens = part_tokens
        self._steps_left = 0

    def hear(self, tokens: int) -> None:
        """Of a prompt that comes, or gets its row, how many tokens are to be computed."""
        if tokens <= self._step_tokens:
            self._steps_left = RATION_STEPS

    def next_step(self, num_decodes: int) -> Budget:
        """Of a step with prefills and so many decodes."""
        self._steps_left = max(0, self._steps_left - 1)
        part = self._step_tokens
        if self._part_tokens is not None and self._steps_left:
            part = (self._part_tokens + 1) // 2 if num_decodes else self._part_tokens
        return Budget(self._step_tokens - num_decodes, part)
