"""A local Google Cloud Model Armor: a gRPC server with the real protos, foreseeable filters, faults at will.

For tests, demos and benchmarks, through the client code that asks the real service; in the extra `armor`.
Texts are neither logged nor kept; only `on_text`, which is given in code, sees them.
"""

import asyncio
import time
from collections import Counter, deque
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from random import Random
from typing import Any, NoReturn

import grpc
from google.cloud import modelarmor_v1 as armor

from cabochon.engine.errors import ConfigError
from cabochon.server.armor.emulator_catalog import Catalog
from cabochon.server.armor.emulator_faults import (
    CONTENT,
    STATUSES,
    Fault,
    Faults,
    Latency,
    Target,
    make_fault,
    parse_latency,
)
from cabochon.server.armor.emulator_filters import raw, sanitize
from cabochon.server.armor.emulator_front import Front
from cabochon.server.armor.emulator_templates import TemplateSpec
from cabochon.server.armor.verdicts import Stage

SERVICE = "google.cloud.modelarmor.v1.ModelArmor"
MAX_LOGGED_CALLS = 10_000
DRAIN_S = 60.0  # that calls in flight have after the fault `drain`
NOTICE_S = 0.02  # that a GOAWAY goes before the answer to a call in flight
MALFORMED = b"\xff\xff\xff"
_PLAIN = (armor.ByteDataItem.ByteItemType.PLAINTEXT_UTF8, armor.ByteDataItem.ByteItemType.TXT)
_METHODS: dict[Stage, str] = {"prompt": "SanitizeUserPrompt", "response": "SanitizeModelResponse"}
_INVALID = grpc.StatusCode.INVALID_ARGUMENT

# Of protobuf, all of them: proto-plus costs time that a benchmark would count as ours
PromptRequest, ResponseRequest = raw(armor.SanitizeUserPromptRequest), raw(armor.SanitizeModelResponseRequest)
PromptReply, ResponseReply = raw(armor.SanitizeUserPromptResponse), raw(armor.SanitizeModelResponseResponse)


@dataclass(slots=True)
class Call:
    """A call, or one chunk of a streaming one. Never its text."""

    method: str
    template: str
    num_chars: int
    start_s: float  # since the emulator was made
    seconds: float | None = None  # it took; None: in flight
    fault: str | None = None  # that struck it
    result: str = "open"  # then `ok`, a gRPC status in lower case, or `cancelled` (client or connection gone)


class Emulator:
    """The service on one address. What is no coroutine may be called from any thread."""

    def __init__(
        self,
        *,
        host: str = "127.0.0.1",
        port: int = 0,
        templates: Iterable[TemplateSpec | str] = ("*",),
        latency: Latency | str = "0",
        faults: Iterable[Fault | str | Mapping[str, Any]] = (),
        seed: int | None = None,
        on_text: Callable[[Stage, str], None] | None = None,
    ) -> None:
        """port: 0 takes a free one. templates, latency, faults: objects, or words as on the command line.

        on_text: is told every text that is checked. Raises ConfigError.
        """
        self.catalog = Catalog(templates)
        self.on_text = on_text
        self.last_metadata: dict[str, str | bytes] = {}  # of the call that began last
        self._random = Random(seed)
        self._front = Front(host, port)
        self._servers: list[grpc.aio.Server] = []  # the last one takes new connections
        self._tasks: set[asyncio.Task[None]] = set()
        self._made_s = time.monotonic()
        self.num_in_flight = 0
        self.set_latency(latency)
        self.set_faults(*faults)
        self.forget_calls()

    @property
    def address(self) -> str:
        """HOST:PORT of clients, once started."""
        host = f"[{self._front.host}]" if ":" in self._front.host else self._front.host
        return f"{host}:{self._front.port}"

    @property
    def is_listening(self) -> bool:
        """Whether connections are taken."""
        return self._front.is_listening

    @property
    def calls(self) -> list[Call]:
        """The last MAX_LOGGED_CALLS, by their start."""
        return list(self._calls)

    async def start(self) -> None:
        """Serve; after `stop`, on the same port again. Raises ConfigError if the port is not free."""
        await self._add_server()
        try:
            await self._front.listen()
        except ConfigError:
            await self.stop()
            raise

    async def stop(self, grace_s: float = 0.0) -> None:
        """Take no more connections, and cut calls that are open after grace_s. Start again as you like."""
        self._front.stop_listening()
        while self._servers:  # a fault may be adding one
            await self._end_servers(self._servers, grace_s)
        await asyncio.gather(*self._tasks)
        await self._front.close()

    async def refuse(self) -> None:
        """Reset all connections and refuse others, as if the process were gone."""
        self._front.refuse()

    async def listen(self) -> None:
        """Take connections again."""
        await self._front.listen()

    def set_latency(self, latency: Latency | str) -> None:
        """Of every call from now on. Raises ConfigError."""
        self.latency = parse_latency(latency) if isinstance(latency, str) else latency

    def set_faults(self, *faults: Fault | str | Mapping[str, Any]) -> None:
        """Instead of all before; what they count begins at 0. Raises ConfigError."""
        self._faults = Faults([make_fault(fault) for fault in faults], self._random)

    def forget_calls(self) -> None:
        """Begin counting anew."""
        self.counts: Counter[str] = Counter()  # by method; each chunk of a streaming call counts
        self._calls: deque[Call] = deque(maxlen=MAX_LOGGED_CALLS)
        self.peak_in_flight = self.num_in_flight

    def state(self) -> dict[str, Any]:
        """What may be known from outside, for JSON."""
        return {
            "address": self.address,
            "is_listening": self.is_listening,
            "latency": str(self.latency),
            "faults": self._faults.as_dicts(),
            "counts": dict(self.counts),
            "in_flight": self.num_in_flight,
            "peak_in_flight": self.peak_in_flight,
        }

    async def _add_server(self) -> None:
        server = grpc.aio.server(options=(("grpc.so_reuseport", 0),))
        server.add_generic_rpc_handlers((self._handler(),))
        port = server.add_insecure_port("127.0.0.1:0")
        self._servers.append(server)
        await server.start()
        self._front.upstream_port = port

    async def _end_servers(self, servers: Sequence[grpc.aio.Server], grace_s: float) -> None:
        """GOAWAY on all their connections; calls that are open are cut after grace_s."""
        await asyncio.gather(*(server.stop(grace_s) for server in servers))
        self._servers = [server for server in self._servers if server not in servers]

    def _handler(self) -> grpc.GenericRpcHandler:
        unary, stream = grpc.unary_unary_rpc_method_handler, grpc.stream_stream_rpc_method_handler
        prompt, response = PromptRequest.FromString, ResponseRequest.FromString
        get, list_ = armor.GetTemplateRequest.deserialize, armor.ListTemplatesRequest.deserialize
        methods = {  # without a serializer: bytes are sent as they are, malformed ones too
            "SanitizeUserPrompt": unary(self._sanitize_unary, prompt),
            "SanitizeModelResponse": unary(self._sanitize_unary, response),
            "StreamSanitizeUserPrompt": stream(self._sanitize_stream, prompt),
            "StreamSanitizeModelResponse": stream(self._sanitize_stream, response),
            "GetTemplate": unary(self._get_template, get),
            "ListTemplates": unary(self._list_templates, list_),
        }
        return grpc.method_handlers_generic_handler(SERVICE, methods)

    async def _sanitize_unary(self, request: Any, context: Any) -> bytes:
        return await self._check(request, request.name, None, context)

    async def _sanitize_stream(self, requests: AsyncIterator[Any], context: Any) -> AsyncIterator[bytes]:
        """REALTIME judges each chunk by itself, BUFFERED (and no mode) with all before it."""
        name, mode, before = "", armor.StreamingMode.STREAMING_MODE_UNSPECIFIED, ""
        async for request in requests:
            name, mode = request.name or name, request.streaming_mode or mode  # the first one's hold
            yield await self._check(request, name, before, context)
            if mode != armor.StreamingMode.STREAMING_MODE_REALTIME:
                before += _text(request) or ""

    async def _check(self, request: Any, name: str, before: str | None, context: Any) -> bytes:
        """before: the text that is judged with the request's; None: it is no chunk of a stream."""
        is_prompt, is_stream, text = isinstance(request, PromptRequest), before is not None, _text(request)
        stage: Stage = "prompt" if is_prompt else "response"
        method = ("Stream" if is_stream else "") + _METHODS[stage]
        with self._logged(method, name, len(text or ""), context) as call:
            if text is None:
                await _abort(context, call, _INVALID, "data must be text: the emulator reads no documents")
            if self.on_text is not None:
                self.on_text(stage, text)
            fault = await self._struck(call, stage, text, context)
            if fault is not None and fault.kind == "malformed":
                return MALFORMED
            template = await self._find(name, context, call)
            result = sanitize((before or "") + text, template, fault, is_stream=is_stream)
            if is_stream:
                result.sanitization_metadata.stream_chunk_processed.text = text
            reply = PromptReply if is_prompt else ResponseReply
            return bytes(reply(sanitization_result=result).SerializeToString())

    async def _get_template(self, request: armor.GetTemplateRequest, context: Any) -> bytes:
        with self._logged("GetTemplate", request.name, 0, context) as call:
            fault = await self._struck(call, "template", "", context)
            if fault is not None and fault.kind == "malformed":
                return MALFORMED
            template = await self._find(request.name, context, call)
            return bytes(armor.Template.serialize(self.catalog.message(request.name, template)))

    async def _list_templates(self, request: armor.ListTemplatesRequest, context: Any) -> bytes:
        with self._logged("ListTemplates", request.parent, 0, context) as call:
            fault = await self._struck(call, "template", "", context)
            if fault is not None and fault.kind == "malformed":
                return MALFORMED
            reply = self.catalog.page(request)
            if reply is None:
                await _abort(context, call, _INVALID, "page_token must be one of an earlier page")
            return bytes(armor.ListTemplatesResponse.serialize(reply))

    async def _find(self, name: str, context: Any, call: Call) -> TemplateSpec:
        if not self.catalog.is_name(name):
            await _abort(context, call, _INVALID, "name must be projects/P/locations/L/templates/T")
        template = self.catalog.find(name)
        if template is None:
            await _abort(context, call, grpc.StatusCode.NOT_FOUND, "there is no template of that name")
        return template

    async def _struck(self, call: Call, stage: Target, text: str, context: Any) -> Fault | None:
        """Wait as long as the call takes, and do what the reply has no part in. Returns the other faults."""
        fault = self._faults.strike(stage, text)
        wait_s = self.latency.draw(self._random)
        if fault is not None:
            call.fault = fault.kind
            wait_s += fault.latency.draw(self._random)
        await asyncio.sleep(wait_s)
        if fault is None or fault.kind in CONTENT or fault.kind in ("slow", "malformed"):
            return fault
        if fault.kind in STATUSES:
            await _abort(context, call, grpc.StatusCode[fault.kind.upper()], "a fault of the emulator")
        if fault.kind in ("goaway", "drain"):
            await self._go_away(DRAIN_S if fault.kind == "drain" else 0.0)
        if fault.kind == "drain":
            await asyncio.sleep(NOTICE_S)
            return fault
        if fault.kind == "reset":
            self._front.reset(int(context.peer().rpartition(":")[2]))
        return await asyncio.Future()  # hang, reset, goaway: until the call is cancelled

    async def _go_away(self, grace_s: float) -> None:
        old = list(self._servers)
        await self._add_server()
        task = asyncio.create_task(self._end_servers(old, grace_s))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    @contextmanager
    def _logged(self, method: str, template: str, num_chars: int, context: Any) -> Iterator[Call]:
        self.last_metadata = dict(context.invocation_metadata())
        start_s = time.monotonic()
        call = Call(method, template, num_chars, start_s - self._made_s)
        self._calls.append(call)
        self.counts[method] += 1
        self.num_in_flight += 1
        self.peak_in_flight = max(self.peak_in_flight, self.num_in_flight)
        try:
            yield call
            call.result = "ok"
        except asyncio.CancelledError:
            call.result = "cancelled"
            raise
        finally:
            call.seconds = time.monotonic() - start_s
            self.num_in_flight -= 1


def _text(request: Any) -> str | None:
    """None if it has none that the emulator reads."""
    is_prompt = isinstance(request, PromptRequest)
    item = request.user_prompt_data if is_prompt else request.model_response_data
    if item.WhichOneof("data_item") == "text":
        return str(item.text)
    if item.byte_item.byte_data_type in _PLAIN:
        return bytes(item.byte_item.byte_data).decode(errors="replace")
    return None


async def _abort(context: Any, call: Call, status: grpc.StatusCode, why: str) -> NoReturn:
    call.result = status.name.lower()
    await context.abort(status, why)
    raise AssertionError("abort raises")
