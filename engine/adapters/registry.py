"""The adapters that an engine has, by name. They are read aside, so that no step waits for a file.

Knows nothing of slots: whoever unloads an adapter tells those.
"""

import itertools
import logging
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from cabochon.engine.adapters.adapter import Adapter
from cabochon.engine.adapters.slots import LoadedAdapter
from cabochon.engine.errors import BadAdapter, EngineError, UnknownAdapter
from cabochon.engine.messages import AdapterInfo, AdapterReply, LoadAdapter, Refusal

logger = logging.getLogger(__name__)

Read = Callable[[Path], Adapter]  # raises BadAdapter


class Adapters:
    """Loaded ones, and those that are being read."""

    def __init__(self, read: Read | None) -> None:
        """read: None if the engine has no slots for adapters."""
        self._read = read or _no_slots
        self._by_name: dict[str, LoadedAdapter] = {}
        self._uids = itertools.count(1)
        self._reader = ThreadPoolExecutor(1, "adapters")  # one: reading must leave cores for steps
        self._reading: list[tuple[LoadAdapter, Future[Adapter]]] = []
        self._replies: list[AdapterReply] = []

    @property
    def is_busy(self) -> bool:
        """Whether a load or a reply is on its way."""
        return bool(self._reading or self._replies)

    def get(self, name: str | None) -> LoadedAdapter | None:
        """None is the base model. Raises UnknownAdapter."""
        if name is None:
            return None
        if name not in self._by_name:
            raise UnknownAdapter(
                f"the adapter must be loaded, {name} is not: see /v1/models for those that are", "model"
            )
        return self._by_name[name]

    def load(self, name: str, path: str) -> AdapterInfo:
        """At once, before the engine serves. Raises BadAdapter."""
        return self._enter(LoadAdapter(reply_to=0, name=name, path=path), self._read_or_refuse(path))[0]

    def start_load(self, message: LoadAdapter) -> None:
        """Answered by a later `finish_loads`."""
        if not message.replace and self._is_taken(message.name):
            self.refuse(message.reply_to, _taken(message.name))
            return
        self._reading.append((message, self._reader.submit(self._read_or_refuse, message.path)))

    def finish_loads(self) -> list[LoadedAdapter]:
        """Enter what has been read. Returns those that were replaced."""
        replaced: list[LoadedAdapter] = []
        while self._reading and self._reading[0][1].done():
            message, reading = self._reading.pop(0)
            try:
                info, old = self._enter(message, reading.result())
            except BadAdapter as error:
                self.refuse(message.reply_to, error)
                continue
            self.reply(message.reply_to, info)
            replaced += [old] if old is not None else []
        return replaced

    def remove(self, name: str) -> LoadedAdapter:
        """From now on requests cannot name it. Raises UnknownAdapter."""
        if name not in self._by_name:
            raise UnknownAdapter(
                f"lora_name must be a loaded adapter, {name} is not: see /v1/models", "lora_name"
            )
        return self._by_name.pop(name)

    def reply(self, reply_to: int, info: AdapterInfo | None = None) -> None:
        """A message was followed."""
        self._replies.append(AdapterReply(reply_to=reply_to, info=info))

    def refuse(self, reply_to: int, error: EngineError) -> None:
        """A message was not."""
        self._replies.append(AdapterReply(reply_to=reply_to, refusal=Refusal.of("", error)))

    def take_replies(self) -> list[AdapterReply]:
        """Since the last call."""
        replies, self._replies = self._replies, []
        return replies

    def _read_or_refuse(self, path: str) -> Adapter:
        """Raises BadAdapter, whatever happens: a disk or mount that fails must not end the engine."""
        try:
            return self._read(Path(path))
        except BadAdapter:
            raise
        except Exception as error:
            logger.warning("adapter not read reason=%r", error)
            raise BadAdapter(
                f"lora_path must lead to an adapter that can be read, reading it failed with"
                f" {type(error).__name__}: the server's log says why",
                "lora_path",
            ) from error

    def _is_taken(self, name: str) -> bool:
        return name in self._by_name or any(message.name == name for message, _ in self._reading)

    def _enter(self, message: LoadAdapter, weights: Adapter) -> tuple[AdapterInfo, LoadedAdapter | None]:
        old = self._by_name.get(message.name)
        if old is not None and not message.replace:
            raise _taken(message.name)
        self._by_name[message.name] = LoadedAdapter(message.name, next(self._uids), weights)
        info = AdapterInfo(
            name=message.name,
            path=message.path,
            rank=weights.rank,
            num_bytes=weights.num_bytes,
            base_model=weights.base_model,
        )
        return info, old


def _no_slots(_: Path) -> Adapter:
    raise BadAdapter(
        "an engine must be started with slots for adapters, this one was not: start it with lora_modules or"
        " lora_dir"
    )


def _taken(name: str) -> BadAdapter:
    return BadAdapter(
        f"lora_name must be new, {name} is loaded: unload it first, or set load_inplace to replace it",
        "lora_name",
    )
