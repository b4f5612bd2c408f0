"""What the emulator may be told over HTTP while it runs, and what it says of itself; in tests one calls it.

GET /, GET /calls, DELETE /calls, PUT /faults, PUT /latency, PUT /listening: docs/model-armor.md.
"""

import asyncio
import dataclasses
import json
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import TYPE_CHECKING, Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from cabochon.engine.errors import ConfigError
from cabochon.server.armor.emulator_front import bind

if TYPE_CHECKING:
    from cabochon.server.armor.emulator import Emulator

START_POLL_S = 0.005


def control_app(emulator: "Emulator") -> Starlette:
    """The routes. What is wrong with a body comes back as 400 `{"error": MESSAGE}`."""

    async def state(_request: Request) -> Response:
        return JSONResponse(emulator.state())

    async def calls(request: Request) -> Response:
        if request.method == "DELETE":
            emulator.forget_calls()
            return Response(status_code=204)
        return JSONResponse([dataclasses.asdict(call) for call in emulator.calls])

    async def faults(request: Request) -> Response:
        given = await _body(request, list, 'a list: ["unavailable times=3"]')
        emulator.set_faults(*given)
        return JSONResponse(emulator.state())

    async def latency(request: Request) -> Response:
        given = await _body(request, (int, float, str), "seconds, or a string as of --latency")
        emulator.set_latency(str(given))
        return JSONResponse(emulator.state())

    async def listening(request: Request) -> Response:
        given = await _body(request, bool, "true or false")
        await (emulator.listen() if given else emulator.refuse())
        return JSONResponse(emulator.state())

    async def refused(_request: Request, error: Exception) -> Response:
        return JSONResponse({"error": str(error)}, 400)

    routes = [
        Route("/", state),
        Route("/calls", calls, methods=["GET", "DELETE"]),
        Route("/faults", faults, methods=["PUT"]),
        Route("/latency", latency, methods=["PUT"]),
        Route("/listening", listening, methods=["PUT"]),
    ]
    return Starlette(routes=routes, exception_handlers={ConfigError: refused})


@asynccontextmanager
async def serve_control(emulator: "Emulator", host: str, port: int) -> AsyncIterator[int]:
    """Answer on that port while the context lasts. Yields the port. Raises ConfigError if it is not free."""
    sock = bind(host, port)
    config = uvicorn.Config(control_app(emulator), lifespan="off", log_config=None, access_log=False)
    server = _Uvicorn(config)
    task = asyncio.create_task(server.serve(sockets=[sock]))
    try:
        yield sock.getsockname()[1]
    finally:
        server.should_exit = server.force_exit = True
        await task
        sock.close()


class _Uvicorn(uvicorn.Server):
    """Leaves signals to the command."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


async def _body(request: Request, kind: Any, wanted: str) -> Any:
    try:
        given = json.loads(await request.body())
    except ValueError:
        given = None
    if not isinstance(given, kind):
        raise ConfigError(f"the body must be {wanted}, in JSON, got something else: correct it")
    return given
