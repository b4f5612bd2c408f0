"""An endpoint picker for tests: Envoy's ext_proc in front of the published scheduling (`scheduling`, `pool`).

Runs in the environment that `make gateway-tools` makes. Prints its port, then a line of JSON per request.
Left out of a real one: objectives and priorities, rewrites of models, plug-ins beyond the default profile.
Source: llm-d-router, pkg/epp/handlers and pkg/epp/requestcontrol.
"""

import argparse
import asyncio
import json
import logging
import random
import time
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import grpc
from envoy.config.core.v3 import base_pb2
from envoy.service.ext_proc.v3 import external_processor_pb2 as ext_proc
from envoy.service.ext_proc.v3 import external_processor_pb2_grpc as ext_proc_grpc
from envoy.type.v3 import http_status_pb2
from pool import Pool, http_client

from cabochon.server.gateway.openai_request import BadBody, read_request, read_usage
from cabochon.server.gateway.scheduling import Scheduler, Weights, saturation

DESTINATION = "x-gateway-destination-endpoint"
SERVED = "x-gateway-destination-endpoint-served"
DROPPED = "x-llm-d-request-dropped-reason"
CONTROL_HEADERS = (  # for the picker alone
    *("x-llm-d-inference-objective", "x-llm-d-inference-fairness-id", "x-llm-d-model-name-rewrite"),
    *("x-llm-d-slo-ttft-ms", "x-llm-d-slo-tpot-ms", "x-slo-ttft-ms", "x-slo-tpot-ms"),
    *("x-gateway-inference-objective", "x-gateway-inference-fairness-id", "x-gateway-model-name-rewrite"),
)
PIECE_BYTES = 62_000  # of a body: messages to Envoy stay under 64 KiB
HOLD_INTERVAL_S = 0.005  # between looks at a saturated pool


class Refused(Exception):
    """Envoy answers the client itself."""

    def __init__(self, status: int, reason: str, message: str) -> None:
        super().__init__(message)
        self.status, self.reason = status, reason


class Picker:
    """Admission as with flow control: a saturated pool holds requests until `queue_ttl_s`."""

    def __init__(self, pool: Pool, weights: Weights, queue_ttl_s: float) -> None:
        self._pool = pool
        self._scheduler = Scheduler(weights)
        self._queue_ttl_s = queue_ttl_s

    def pick_any(self) -> str:
        """For a request without a body. Raises Refused."""
        self._must_have_endpoints()
        return random.choice(sorted(self._pool.ready()))

    async def pick(self, path: str, body: bytes, record: dict[str, Any]) -> str:
        """The endpoint for a body. Raises Refused."""
        try:
            request = read_request(path, body)
        except BadBody as error:
            raise Refused(400, "", str(error)) from None
        record["model"] = request.model
        deadline = time.monotonic() + self._queue_ttl_s
        self._must_have_endpoints()
        while saturation(self._pool.ready(), time.monotonic()) >= 1:
            if time.monotonic() >= deadline:
                raise Refused(429, "rejected-ttl-expired", "the pool is saturated: retry later")
            await asyncio.sleep(HOLD_INTERVAL_S)
            self._must_have_endpoints()
        self._scheduler.index.keep(self._pool.addresses())
        return self._scheduler.pick(request, self._pool.ready(), time.monotonic())

    def _must_have_endpoints(self) -> None:
        if not self._pool.ready():
            raise Refused(503, "rejected-no-endpoints", "no endpoint is ready: retry later")


class ExternalProcessor(ext_proc_grpc.ExternalProcessorServicer):
    """One call of Process per HTTP request; its headers are answered when its body is whole."""

    def __init__(self, picker: Picker) -> None:
        self._picker = picker

    async def Process(
        self, messages: AsyncIterator[ext_proc.ProcessingRequest], context: grpc.aio.ServicerContext
    ) -> AsyncIterator[ext_proc.ProcessingResponse]:
        record: dict[str, Any] = {"path": "", "picked": None, "status": None, "usage": None}
        try:
            async for answer in self._answers(messages, record):
                yield answer
        except Refused as refusal:
            record["status"] = refusal.status
            yield immediate(refusal)
        finally:
            print(json.dumps(record), flush=True)

    async def _answers(
        self, messages: AsyncIterator[ext_proc.ProcessingRequest], record: dict[str, Any]
    ) -> AsyncIterator[ext_proc.ProcessingResponse]:
        body = bytearray()
        async for message in messages:
            kind = message.WhichOneof("request")
            if kind == "request_headers":
                record["path"] = header(message.request_headers, ":path")
                if message.request_headers.end_of_stream:
                    record["picked"] = self._picker.pick_any()
                    yield to_endpoint(record["picked"])
            elif kind == "request_body":
                body += message.request_body.body
                if message.request_body.end_of_stream:
                    record["picked"] = await self._picker.pick(record["path"], bytes(body), record)
                    yield to_endpoint(record["picked"])
                    for piece in pieces(bytes(body), is_last=True):
                        yield ext_proc.ProcessingResponse(request_body=ext_proc.BodyResponse(response=piece))
            elif kind == "response_headers":
                record["status"] = int(header(message.response_headers, ":status"))
                common = ext_proc.CommonResponse(header_mutation=set_headers({SERVED: record["picked"]}))
                yield ext_proc.ProcessingResponse(response_headers=ext_proc.HeadersResponse(response=common))
            elif kind == "response_body":
                record["usage"] = read_usage(message.response_body.body) or record["usage"]
                is_last = message.response_body.end_of_stream
                for piece in pieces(message.response_body.body, is_last=is_last):
                    yield ext_proc.ProcessingResponse(response_body=ext_proc.BodyResponse(response=piece))
            elif kind == "request_trailers":
                yield ext_proc.ProcessingResponse(request_trailers=ext_proc.TrailersResponse())
            elif kind == "response_trailers":
                yield ext_proc.ProcessingResponse(response_trailers=ext_proc.TrailersResponse())


def header(headers: ext_proc.HttpHeaders, name: str) -> str:
    """The value of a header, which Envoy sends as bytes."""
    for one in headers.headers.headers:
        if one.key == name:
            return one.value or one.raw_value.decode("latin-1")
    return ""


def set_headers(values: dict[str, str], remove: Sequence[str] = ()) -> ext_proc.HeaderMutation:
    """Overwrites: a client could have sent them."""
    return ext_proc.HeaderMutation(
        remove_headers=remove,
        set_headers=[
            base_pb2.HeaderValueOption(
                header=base_pb2.HeaderValue(key=name, raw_value=value.encode()),
                append_action=base_pb2.HeaderValueOption.OVERWRITE_IF_EXISTS_OR_ADD,
            )
            for name, value in values.items()
        ],
    )


def to_endpoint(address: str) -> ext_proc.ProcessingResponse:
    """The answer to request headers: the address in the header and in the metadata of `envoy.lb`."""
    common = ext_proc.CommonResponse(
        header_mutation=set_headers({DESTINATION: address}, remove=CONTROL_HEADERS), clear_route_cache=True
    )
    answer = ext_proc.ProcessingResponse(request_headers=ext_proc.HeadersResponse(response=common))
    answer.dynamic_metadata.update({"envoy.lb": {DESTINATION: address}})
    return answer


def pieces(body: bytes, *, is_last: bool) -> list[ext_proc.CommonResponse]:
    """A body cut for Envoy; an empty one is one empty piece."""
    starts = range(0, max(len(body), 1), PIECE_BYTES)
    return [
        ext_proc.CommonResponse(
            body_mutation=ext_proc.BodyMutation(
                streamed_response=ext_proc.StreamedBodyResponse(
                    body=body[start : start + PIECE_BYTES], end_of_stream=is_last and start == starts[-1]
                )
            )
        )
        for start in starts
    ]


def immediate(refusal: Refused) -> ext_proc.ProcessingResponse:
    """An error in OpenAI's shape, with the picker's reason in its header."""
    headers = {"content-type": "application/json"} | ({DROPPED: refusal.reason} if refusal.reason else {})
    error = {"message": str(refusal), "type": "gateway_error", "param": None, "code": refusal.reason or None}
    return ext_proc.ProcessingResponse(
        immediate_response=ext_proc.ImmediateResponse(
            status=http_status_pb2.HttpStatus(code=refusal.status),
            headers=set_headers(headers),
            body=json.dumps({"error": error}).encode(),
        )
    )


async def main() -> None:
    """Serve until killed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pool-file", type=Path, required=True)
    parser.add_argument("--weights", type=json.loads, default={}, help='JSON, e.g. {"lora": 3}')
    parser.add_argument("--queue-ttl-s", type=float, default=60)
    parser.add_argument("--probe-interval-s", type=float, default=1)
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO)
    logging.getLogger("httpx").setLevel(logging.WARNING)
    async with http_client() as client:
        pool = Pool(args.pool_file, client, args.probe_interval_s)
        await pool.open()
        server = grpc.aio.server()
        picker = Picker(pool, Weights(**args.weights), args.queue_ttl_s)
        ext_proc_grpc.add_ExternalProcessorServicer_to_server(ExternalProcessor(picker), server)
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        print(json.dumps({"port": port}), flush=True)
        await server.wait_for_termination()


if __name__ == "__main__":
    asyncio.run(main())
