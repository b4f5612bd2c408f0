"""The engine as the server sees it. Two implementations: EngineClient (a child process) and FakeEngine."""

from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Callable

from cabochon.engine.messages import (
    AdapterInfo,
    EngineInfo,
    EngineStats,
    GenerateRequest,
    RequestOutput,
    StepOutput,
)


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
    async def load_adapter(self, name: str, path: str, *, replace: bool = False) -> AdapterInfo:
        """Read the PEFT directory at `path`; from then on requests may name it.

        replace: it may take the name of a loaded adapter, which its open requests keep until they end.
        Raises BadAdapter, and then nothing has changed, or EngineDead. Running requests never wait for it.
        """

    @abstractmethod
    async def unload_adapter(self, name: str) -> None:
        """Take no more requests for it, and forget it when its open ones have ended.

        Raises UnknownAdapter, or EngineDead.
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
