"""LoRA adapters by name: which are served, and who may load others over HTTP, from where.

Bodies, statuses and words of success are vLLM's. What an adapter is, the engine alone knows.
"""

import asyncio
import logging
import os
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from pydantic import Field

from cabochon.engine.engine import Engine
from cabochon.engine.errors import BadAdapter, ConfigError, UnknownAdapter
from cabochon.engine.messages import AdapterInfo
from cabochon.server.body import Body
from cabochon.server.errors import ApiError

logger = logging.getLogger(__name__)

MAX_NAME_CHARS = 256
MAX_PATH_CHARS = 4096  # Linux's PATH_MAX


def _length(limit: int) -> dict[str, Any]:
    """For the document alone: what is wrong with a name or a path is told in words of our own."""
    return {"minLength": 1, "maxLength": limit}


class LoadAdapterRequest(Body):
    """POST /v1/load_lora_adapter"""

    asks_nothing: ClassVar[dict[str, tuple[Any, ...]]] = {"is_3d_lora_weight": (False,)}

    lora_name: str = Field(
        description="What requests will have as model", json_schema_extra=_length(MAX_NAME_CHARS)
    )
    lora_path: str = Field(
        description="A directory in PEFT format below --lora-dir, absolute or from there",
        json_schema_extra=_length(MAX_PATH_CHARS),
    )
    load_inplace: bool = Field(False, description="It may take the name of a loaded adapter")


class UnloadAdapterRequest(Body):
    """POST /v1/unload_lora_adapter"""

    no_effect: ClassVar = frozenset({"lora_int_id"})  # vLLM's, which ignores it, too

    lora_name: str = Field(description="The adapter")


@dataclass(frozen=True, slots=True)
class Served:
    """An adapter that requests may name."""

    info: AdapterInfo
    created: int  # when it was loaded, in Unix seconds


class Adapters:
    """The adapters of one engine. Loads come one at a time; of one name, one change at a time."""

    def __init__(self, engine: Engine, base_names: Collection[str], directory: str | None) -> None:
        """directory: adapters below it may be loaded and unloaded; None: none may."""
        self._engine = engine
        self._base_names = base_names
        self._directory = directory
        now = int(time.time())
        self._served = {info.name: Served(info, now) for info in engine.info.adapters}
        self._changing: set[str] = set()
        self._loads = asyncio.Lock()  # two at once share one disk, and need twice the memory

    def __contains__(self, name: str) -> bool:
        return name in self._served

    def __iter__(self) -> Iterator[Served]:
        return iter(self._served.values())

    def get(self, name: str) -> Served | None:
        """The adapter of that name."""
        return self._served.get(name)

    def check_is_on(self) -> None:
        """Raises ApiError if nothing may be loaded or unloaded.

        404, as from a server without these routes, which vLLM's is by default: 403 would speak of keys.
        """
        if self._directory is None:
            raise ApiError(
                "adapters can be loaded and unloaded only below lora_dir, which is not set: start the server"
                " with --lora-dir DIR",
                status=404,
                code="lora_dir_not_set",
            )

    async def load(self, body: LoadAdapterRequest) -> str:
        """Words of success. Raises ApiError, BadAdapter or EngineDead, and then nothing has changed."""
        name = body.lora_name
        if wrong := problem_of_name(name, self._base_names):
            raise ApiError(f"lora_name {wrong}: choose another", param="lora_name")
        with self._change(name):
            if name in self._served and not body.load_inplace:
                raise ApiError(
                    "lora_name must be new, it is loaded: unload it, or send load_inplace",
                    param="lora_name",
                    code="adapter_exists",
                )
            async with self._loads:
                path = await asyncio.to_thread(self._inside, body.lora_path)
                try:
                    info = await self._engine.load_adapter(name, path, replace=body.load_inplace)
                except BadAdapter as error:
                    error.param = error.param or "lora_path"
                    raise
            self._served[name] = Served(info, int(time.time()))
        logger.info("adapter loaded name=%r rank=%d bytes=%d path=%r", name, info.rank, info.num_bytes, path)
        return f"Success: LoRA adapter '{name}' added successfully."

    async def unload(self, body: UnloadAdapterRequest) -> str:
        """Words of success. Raises ApiError (404), or EngineDead."""
        name = body.lora_name
        with self._change(name):
            try:
                if name not in self._served:
                    raise UnknownAdapter("not served")
                await self._engine.unload_adapter(name)
            except UnknownAdapter:
                raise ApiError(
                    "lora_name must be a loaded adapter: see /v1/models",
                    status=404,
                    param="lora_name",
                    code="adapter_not_found",
                ) from None
            finally:
                self._served.pop(name, None)
        logger.info("adapter unloaded name=%r", name)
        return f"Success: LoRA adapter '{name}' removed successfully."

    @contextmanager
    def _change(self, name: str) -> Iterator[None]:
        if name in self._changing:
            raise ApiError(
                "lora_name must not be loading or unloading, it is: wait until that has ended",
                status=409,
                param="lora_name",
                code="adapter_busy",
            )
        self._changing.add(name)
        try:
            yield
        finally:
            self._changing.discard(name)

    def _inside(self, given: str) -> str:
        """The directory that `given` leads to. Raises ApiError if that is not below ours, existing or not.

        Who may write there could put a link in its place afterwards: they are trusted with adapters, too.
        """
        assert self._directory is not None
        if not given or len(given) > MAX_PATH_CHARS or not given.isprintable():
            raise ApiError(
                f"lora_path must have 1 to {MAX_PATH_CHARS} printable characters: correct it",
                param="lora_path",
            )
        top, root = os.path.abspath(self._directory), os.path.realpath(self._directory)
        path = Path(top, given)
        for start in (top, root):
            if path.is_relative_to(start) and not _climbs_out(path.relative_to(start)):
                break
        else:  # not even looked at: how long that takes would tell what is there
            raise _outside()
        found = _below(root, path)
        for entry in _entries(found):  # a link among its files would open what is elsewhere
            _below(root, entry)
        return found


def problem_of_name(name: str, base_names: Collection[str]) -> str | None:
    """What must hold of an adapter's name and does not, from the word "must" on."""
    # Metrics list names between commas, and their readers trim spaces
    if not 1 <= len(name) <= MAX_NAME_CHARS or not name.isprintable() or "," in name or name != name.strip():
        return f"must have 1 to {MAX_NAME_CHARS} printable characters, no comma and no space at its ends"
    if name in base_names:
        return "must not be a name of the model itself"
    return None


def check_directory(directory: str | None) -> None:
    """Raises ConfigError if lora_dir is none."""
    if directory is not None and not os.path.isdir(directory):
        raise ConfigError(f"lora_dir must be a directory, {directory} is none: make or mount it")


def _climbs_out(relative: Path) -> bool:
    depth = 0
    for part in relative.parts:
        depth += -1 if part == ".." else 1
        if depth < 0:
            return True
    return False


def _below(root: str, path: str | Path) -> str:
    found = os.path.realpath(path)
    if not Path(found).is_relative_to(root):
        raise _outside()
    return found


def _entries(directory: str) -> list[str]:
    try:
        return [os.path.join(directory, name) for name in os.listdir(directory)]
    except OSError:  # the engine says what is wrong with it
        return []


def _outside() -> ApiError:
    return ApiError("lora_path must lead to a directory below lora_dir: correct it", param="lora_path")
