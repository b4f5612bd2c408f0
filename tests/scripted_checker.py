"""A Model Armor that says what a test wants, and remembers what it was asked. No network."""

import asyncio
from dataclasses import dataclass, field

from cabochon.server.armor.verdicts import Policy, Stage, Verdict

TEMPLATE = "projects/p/locations/l/templates/t"


@dataclass
class ScriptedChecker:
    """Blocks text with what is `bad`, has no verdict on text with `outage`, rewrites `secret` if it may."""

    rewrites: bool = False
    delay_s: float = 0.0
    is_held: bool = False  # no verdict on a prompt until release()
    asked: list[tuple[Stage, str, str]] = field(default_factory=list)  # stage, context, text
    num_cancelled: int = 0
    template_version: str = "1"
    bad: str = "bad"
    bad_alone: str = ""  # the end of a text that is blocked if it is sent alone
    is_down: bool = False  # it would ask nobody

    def release(self) -> None:
        """From any thread: the verdicts that are held come with the next look, a millisecond at most."""
        self.is_held = False

    async def check(self, policy: Policy, stage: Stage, text: str, *, context: str = "") -> Verdict:
        self.asked.append((stage, context, text))
        try:
            await asyncio.sleep(self.delay_s)
            while self.is_held and stage == "prompt":
                await asyncio.sleep(0.001)
        except asyncio.CancelledError:
            self.num_cancelled += 1
            raise
        is_alone = bool(self.bad_alone) and "\n" not in text
        if self.bad in text or (is_alone and text.endswith(self.bad_alone)):
            return Verdict(outcome="block", filters=("rai:harassment",))
        if "outage" in text:
            return Verdict(outcome="unchecked", reason="unavailable")
        if self.rewrites and "secret" in text:
            return Verdict(outcome="rewrite", rewritten=text.replace("secret", "hidden"), filters=("sdp",))
        return Verdict(outcome="pass")

    def may_rewrite(self, policy: Policy, stage: Stage) -> bool:
        return self.rewrites

    def prompts(self) -> list[str]:
        """The prompts' texts that it was asked about."""
        return [text for stage, _, text in self.asked if stage == "prompt"]

    def version(self, policy: Policy, stage: Stage) -> str:
        return self.template_version

    def pressure(self) -> float:
        return 0.0

    def refuses(self, policy: Policy, stage: Stage) -> bool:
        return self.is_down

    def problem(self) -> str | None:
        return None

    async def close(self) -> None:
        pass
