"""`cabochon armor-emulator`: a local Model Armor in the terminal. The service itself is loaded late."""

import argparse
import asyncio
import signal
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path

from cabochon.engine.errors import ConfigError
from cabochon.server.armor.emulator_faults import (
    KINDS,
    NO_LATENCY,
    Fault,
    Latency,
    make_fault,
    parse_latency,
)
from cabochon.server.armor.emulator_templates import (
    ANY,
    FILTERS,
    FLAGS,
    TemplateSpec,
    parse_template,
    read_templates,
)

PORT = 8686
STOP_GRACE_S = 1.0  # that calls in flight have after a signal
MAX_PORT = 65_535
DEMO = "projects/demo/locations/local/templates"
_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_EVERYWHERE = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}  # to listen on, to connect to


@dataclass(frozen=True, slots=True, kw_only=True)
class EmulatorOptions:
    """What the command was told."""

    host: str = "127.0.0.1"
    port: int = PORT
    control_port: int | None = None
    templates: tuple[TemplateSpec, ...] = (TemplateSpec(),)
    latency: Latency = NO_LATENCY
    faults: tuple[Fault, ...] = ()
    seed: int | None = None


def read_emulator_options(args: Sequence[str]) -> EmulatorOptions:
    """Ends the process on wrong usage, as argparse does. Raises ConfigError on a bad value."""
    parser = argparse.ArgumentParser(
        prog="cabochon armor-emulator",
        description="A local Google Cloud Model Armor over gRPC without TLS, for tests, demos and benchmarks:"
        " documented words match its filters, faults are made at will. docs/model-armor.md describes it.",
    )
    add = parser.add_argument
    add("--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1)")
    add("--port", type=int, default=PORT, help=f"default: {PORT}; 0: a free one")
    add(
        "--control-port",
        type=int,
        metavar="PORT",
        help="HTTP: state, calls, faults while it runs; 0: a free one",
    )
    add("--template", action="append", default=[], metavar="NAME[:WORD,...]",
        help="or * for all others (the default); words: " + ", ".join((*FILTERS, *FLAGS)))  # fmt: skip
    add("--template-file", type=Path, metavar="FILE", help="YAML: a list of words by each template's name")
    add("--latency", default="0", metavar="SECONDS",
        help="of every call, or lognormal:median=SECONDS,p99=SECONDS (default: 0)")  # fmt: skip
    add("--fault", action="append", default=[], metavar="'KIND NAME=VALUE ...'",
        help=f"may be given several times; kinds: {', '.join(KINDS)}")  # fmt: skip
    add("--seed", type=int, help="draw latencies and probabilities in the same order each time")
    given = parser.parse_args(args)
    for name in ("port", "control_port"):
        value = getattr(given, name)
        if value is not None and not 0 <= value <= MAX_PORT:
            raise ConfigError(f"{name} must be in [0, {MAX_PORT}], got {value}: change it")
    templates = [parse_template(text) for text in given.template]
    templates += read_templates(given.template_file) if given.template_file else []
    return EmulatorOptions(
        host=given.host,
        port=given.port,
        control_port=given.control_port,
        templates=tuple(templates) or (TemplateSpec(),),
        latency=parse_latency(given.latency),
        faults=tuple(make_fault(text) for text in given.fault),
        seed=given.seed,
    )


async def run_emulator(options: EmulatorOptions, tell: Callable[[str], None]) -> int:
    """Serve until SIGINT or SIGTERM. tell: gets the lines for people. Returns the exit code.

    Raises ConfigError without the packages of the extra `armor`, or if a port is not free.
    """
    try:
        from cabochon.server.armor.emulator import Emulator  # an optional dependency
    except ModuleNotFoundError as error:
        if not (error.name or "").startswith(("grpc", "google")):
            raise
        raise ConfigError(
            f"armor-emulator needs Model Armor's packages, {error.name} is not installed:"
            " pip install 'cabochon[armor]'"
        ) from None
    from cabochon.server.armor.emulator_control import (
        serve_control,  # with uvicorn, which nobody else needs here
    )

    emulator = Emulator(
        host=options.host,
        port=options.port,
        templates=options.templates,
        latency=options.latency,
        faults=options.faults,
        seed=options.seed,
    )
    is_over = asyncio.Event()
    for number in _SIGNALS:
        asyncio.get_running_loop().add_signal_handler(number, is_over.set)
    async with AsyncExitStack() as stack:
        stack.push_async_callback(emulator.stop, STOP_GRACE_S)
        await emulator.start()
        if options.control_port is not None:
            control = serve_control(emulator, options.host, options.control_port)
            port = await stack.enter_async_context(control)
            tell(f"control at http://{_shown(options.host)}:{port}/")
        tell(_serve_line(emulator.address, options))
        await is_over.wait()
    return 0


def _serve_line(address: str, options: EmulatorOptions) -> str:
    """The command that uses it: the first two templates, or the one there is."""
    names = [spec.name for spec in options.templates if spec.name != ANY] or [
        f"{DEMO}/prompt",
        f"{DEMO}/response",
    ]
    port = address.rpartition(":")[2]
    return (
        f"cabochon serve --armor-endpoint {_shown(options.host)}:{port} --armor-insecure"
        f" --armor-prompt-template {names[0]} --armor-response-template {names[:2][-1]}"
    )


def _shown(host: str) -> str:
    return _EVERYWHERE.get(host, f"[{host}]" if ":" in host else host)
