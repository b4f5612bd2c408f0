"""The command: cabochon serve | generate | verify | adapters | gateway-check | ... See `cabochon --help`."""

import asyncio
import contextlib
import dataclasses
import json
import logging
import os
import sys
import time
from collections.abc import Callable
from uuid import uuid4

import uvloop
import yaml

from cabochon.engine.detokenizer import Detokenizer
from cabochon.engine.errors import ConfigError, EngineError, ModelError
from cabochon.engine.messages import GenerateRequest
from cabochon.engine.sampling_params import SamplingParams
from cabochon.server.armor.emulator_command import read_emulator_options, run_emulator
from cabochon.server.config import RayConfig
from cabochon.server.gateway.finding import Result
from cabochon.server.gateway_check import as_json, as_table, check_servers, read_options
from cabochon.server.logs import set_up_logging
from cabochon.server.prompts import load_prompts
from cabochon.server.serve import find_model, serve, start_engine
from cabochon.server.service import VERSION
from cabochon.server.settings import Settings, load_settings, option_help, set_process_environment

USAGE = """cabochon COMMAND [--option VALUE ...]

  serve              OpenAI-compatible server at http://HOST:PORT/v1
  generate PROMPT    continue a prompt in the terminal
  verify [MODEL]     compare logits and greedy tokens with transformers, on this machine and these weights
  adapters [PATH ..] check LoRA adapters: rank, base model, bytes, or why one is refused
  gateway-check URL  does a model server fit behind the GKE Inference Gateway? (gateway-check --help)
  armor-emulator     a local Model Armor for tests and demos (armor-emulator --help)
  config             print the settings that the options give, as YAML
  version            print the version

Options (also as CABOCHON_* variables, or in a YAML file given with --config FILE):
"""
GENERATE_TOKENS = 128


def main() -> None:
    """Exit codes: 0 done, 1 failed, 2 wrong usage."""
    set_process_environment()
    command, *args = sys.argv[1:] or ["--help"]
    if command == "gateway-check":  # has options of its own, and asks any server
        sys.exit(_guarded(lambda: _gateway_check(args)))
    if command == "armor-emulator":  # so has this
        sys.exit(_guarded(lambda: _armor_emulator(args)))
    if command in ("--help", "-h", "help") or "--help" in args:
        print(USAGE + option_help())
        sys.exit(0)
    if command in ("version", "--version"):
        print(VERSION)
        sys.exit(0)
    if command == "verify":  # needs torch and transformers, which this process never loads
        os.execv(sys.executable, [sys.executable, "-m", "cabochon.engine.models.verify", *args])
    sys.exit(_guarded(lambda: _run(command, args)))


def _guarded(work: Callable[[], int]) -> int:
    """The exit code of a command; errors as a line for people."""
    try:
        return work()
    except ConfigError as error:
        return _complain(error, 2)
    except (ModelError, EngineError) as error:
        return _complain(error, 1)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # `cabochon generate ... | head`: nobody reads on
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # so that the flush at exit is silent
        return 1


def _gateway_check(args: list[str]) -> int:
    options = read_options(args)
    reports = asyncio.run(check_servers(options, lambda line: print(line, file=sys.stderr)))
    print(as_json(reports) if options.is_json else "\n\n".join(map(as_table, reports)))
    return int(any(report.count(Result.FAIL) for report in reports))


def _armor_emulator(args: list[str]) -> int:
    options = read_emulator_options(args)
    return asyncio.run(run_emulator(options, lambda line: print(line, flush=True)))


def _run(command: str, args: list[str]) -> int:
    if command == "adapters":
        num_paths = next((i for i, arg in enumerate(args) if arg.startswith("-")), len(args))
        paths, flags = args[:num_paths], args[num_paths:]
        options = json.dumps(dataclasses.asdict(load_settings(flags).engine))
        # Needs torch, as verify does
        os.execv(sys.executable, [sys.executable, "-m", "cabochon.engine.adapters.show", options, *paths])
    prompt = args.pop(0) if command == "generate" and args and not args[0].startswith("--") else ""
    settings = load_settings(args)
    if command == "config":
        merged = {name: value for config in settings for name, value in dataclasses.asdict(config).items()}
        print(yaml.safe_dump(merged, sort_keys=False), end="")
        return 0
    if command == "serve":
        if settings.ray != RayConfig():
            raise ConfigError(
                "options of replicas must be given to Ray Serve, cabochon serve is one server:"
                " leave num_replicas, num_gpus, num_cpus and replicas_per_node out"
            )
        set_up_logging(settings.server.log_format, settings.server.log_level)
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            return runner.run(serve(settings))
    if command == "generate":
        if not prompt:
            raise ConfigError('generate must be followed by a prompt: cabochon generate "Once upon a time"')
        set_up_logging("plain", "warning")
        return asyncio.run(_generate(prompt, settings))
    raise ConfigError(f"{command} is not a command: see `cabochon --help`")


async def _generate(prompt: str, settings: Settings) -> int:
    directory = await find_model(settings)
    engine = await start_engine(settings, directory)
    try:
        prompts = load_prompts(directory, settings.server)
        request = GenerateRequest(
            request_id=uuid4().hex,
            prompt_ids=await prompts.encode(prompt, limit=engine.info.max_model_len),
            params=SamplingParams(temperature=0, max_tokens=GENERATE_TOKENS),
            arrival_s=time.monotonic(),
        )
        detokenizer = Detokenizer(prompts.token_bytes)
        print(prompt, end="", flush=True)
        async for output in engine.submit(request):
            print(detokenizer.feed(output.token_ids), end="", flush=True)
        print(detokenizer.flush())
        return 0
    finally:
        await engine.shutdown()


def _complain(error: Exception, code: int) -> int:
    logging.getLogger(__name__).debug("failed", exc_info=error)
    with contextlib.suppress(BrokenPipeError):
        print(f"cabochon: {error}", file=sys.stderr)
    return code


if __name__ == "__main__":
    main()
