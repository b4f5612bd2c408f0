"""How many tokens prefills may have in a step: all of a prompt's rest, or a part of it, which is rationed.

Whoever comes while a step runs waits for its end. So where steps are slow a long prompt gets less of each
than the step may have: prompts that it ends count against all of it, chunks of others against `part`.
"""

from dataclasses import dataclass


@dataclass(slots=True)
class Budget:
    """What is left of a step, or of a share of it. All that is taken counts against `part`, too."""

    left: int
    part: int
    taken: int = 0

    def half(self) -> "Budget":
        """Rounded up: a single token is the oldest request's."""
        return Budget((self.left + 1) // 2, (self.part + 1) // 2)

    def most(self, remaining: int) -> int:
        """The tokens that a prompt may have of which so many are left."""
        return remaining if remaining <= self.left else max(0, min(self.left, self.part))

    def take(self, tokens: int) -> None:
        self.left -= tokens
        self.part -= tokens
        self.taken += tokens
