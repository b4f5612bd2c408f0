"""The engine as the server sees it. Two implementations: EngineClient (a child process) and FakeEngine."""

from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Callable

from cabochon.engine.messages import EngineInfo, EngineStats, GenerateRequest, RequestOutput, StepOutput


class Engine(ABC):
    """Generates tokens for many requests at once.

    Contract: every submitted request ends, with an output that has a finish_reason or with an exception.
    """

    @property
    @abstractmethod
    def info(self) -> EngineInfo:
        """The loaded model. Raises EngineDead before the engine is ready."""

    @abstractmethod
    def submit(self, request: GenerateRequest) -> AsyncIterator[RequestOutput]:
        """Start a request at once (not at the first `anext`) and yield its outputs as they come.

        The last output has a finish_reason. Closing the iterator early aborts the request.
        The iterator raises RequestError if the engine refuses the request, EngineDead if the engine ends.
        """

    @abstractmethod
    def publish(self, request_id: str) -> None:
        """Let other requests share the pages of a private one. Unknown ids are ignored: it may have ended."""

    @abstractmethod
    def abort(self, request_id: str) -> None:
        """End a request and free its pages within one step; who still reads it gets Aborted.

        Unknown ids are ignored: it may have ended.
        """

    @abstractmethod
    def stats(self) -> EngineStats:
        """The last snapshot; never waits."""

    @abstractmethod
    def on_step(self, listener: Callable[[StepOutput], None]) -> None:
        """Call `listener` with every step's message (for metrics)."""

    @abstractmethod
    def dead_reason(self) -> str | None:
        """Why the engine serves no more, or None while it does. A hang counts."""

    @abstractmethod
    async def shutdown(self) -> None:
        """End the engine. Open requests raise EngineDead. Idempotent."""
