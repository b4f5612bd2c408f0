"""A Model Armor of our own for tests: `running_emulator` on the test's loop, `EmulatorThread` beside it."""

import asyncio
import threading
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from typing import Any, TypeVar

import grpc
from google.cloud import modelarmor_v1 as armor
from google.cloud.modelarmor_v1.services.model_armor.transports import ModelArmorGrpcAsyncIOTransport

from cabochon.server.armor.emulator import Emulator

PROMPT_TEMPLATE = "projects/demo/locations/local/templates/prompt"
RESPONSE_TEMPLATE = "projects/demo/locations/local/templates/response"
T = TypeVar("T")


@asynccontextmanager
async def running_emulator(**options: Any) -> AsyncIterator[Emulator]:
    """options: of Emulator. `emulator.address` is what a client connects to, without TLS."""
    emulator = Emulator(**options)
    await emulator.start()
    try:
        yield emulator
    finally:
        await emulator.stop()


@asynccontextmanager
async def connected(address: str) -> AsyncIterator[armor.ModelArmorAsyncClient]:
    """Google's client, without TLS and credentials; it connects again after 20 ms, not 1 s."""
    options = [
        ("grpc.initial_reconnect_backoff_ms", 20),
        ("grpc.max_reconnect_backoff_ms", 100),
        ("grpc.use_local_subchannel_pool", 1),  # a connection of its own, whoever else goes there
    ]
    async with grpc.aio.insecure_channel(address, options=options) as channel:
        yield armor.ModelArmorAsyncClient(transport=ModelArmorGrpcAsyncIOTransport(channel=channel))


class EmulatorThread:
    """An emulator on a loop in a thread of its own, for tests without a loop.

    `emulator.set_faults(...)` and the like may be called from here, coroutines only by `run`.
    """

    def __init__(self, **options: Any) -> None:
        """options: of Emulator."""
        self.emulator = Emulator(**options)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Such as `run(thread.emulator.refuse())`."""
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(10)

    def __enter__(self) -> "EmulatorThread":
        self._thread.start()
        self.run(self.emulator.start())
        self.address = self.emulator.address
        return self

    def __exit__(self, *_: object) -> None:
        self.run(self.emulator.stop())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()
