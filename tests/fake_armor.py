"""Model Armor's gRPC service with scripted replies, on a loopback port, and a checker that asks it.

Texts choose nothing here: a test says what the next replies are. `server/armor/emulator.py` has filters.
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import grpc
from armor_replies import usual
from google.cloud import modelarmor_v1 as armor
from prometheus_client import CollectorRegistry

from cabochon.server.armor.client import ArmorChecker
from cabochon.server.armor.config import ArmorConfig
from cabochon.server.armor.guard_metrics import GuardMetrics
from cabochon.server.armor.policies import Policies
from cabochon.server.armor.templates import PROBE_TEXT

TEMPLATE = "projects/p/locations/europe-west4/templates/t"
MALFORMED = b"\xff\xff\xff"
Answer = armor.SanitizationResult | grpc.StatusCode | bytes | float  # a float: sleep that long, then pass


def template(*, masks: bool = False, inspect_only: bool = False, logs: bool = False) -> armor.Template:
    """With the five usual filters on."""
    sdp = {"advanced_config": {"inspect_template": "i", "deidentify_template": "d" if masks else ""}}
    return armor.Template(
        name=TEMPLATE,
        filter_config={
            "rai_settings": {"rai_filters": [{"filter_type": 6, "confidence_level": 1}]},
            "sdp_settings": sdp,
            "pi_and_jailbreak_filter_settings": {"filter_enforcement": 1},
            "malicious_uri_filter_settings": {"filter_enforcement": 1},
        },
        template_metadata={"enforcement_type": 1 if inspect_only else 2, "log_sanitize_operations": logs},
    )


@dataclass
class FakeArmor:
    """`answers` go out in turn, the last one again and again; probes of the start get `probe`."""

    answers: list[Answer] = field(default_factory=lambda: [usual()])
    probe: Answer = field(default_factory=usual)
    template: armor.Template | grpc.StatusCode | bytes = field(default_factory=template)
    texts: list[str] = field(default_factory=list)  # that were asked about, but for probes
    stages: list[str] = field(default_factory=list)
    metadata: dict[str, Any] = field(default_factory=dict)
    num_probes: int = 0
    num_reads: int = 0

    async def _sanitize(self, stage: str, data: armor.DataItem, context: grpc.aio.ServicerContext) -> Any:
        self.metadata = dict(context.invocation_metadata())
        if data.text == PROBE_TEXT:
            self.num_probes += 1
            answer: Any = self.probe
        else:
            self.texts.append(data.text)
            self.stages.append(stage)
            answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if isinstance(answer, grpc.StatusCode):
            await context.abort(answer, f"about {data.text[:100]}")
        if isinstance(answer, float):
            await asyncio.sleep(answer)
            answer = usual()
        if isinstance(answer, bytes):
            return answer
        return armor.SanitizeUserPromptResponse(sanitization_result=answer)  # the other has the same fields

    async def prompt(self, request: armor.SanitizeUserPromptRequest, context: Any) -> Any:
        return await self._sanitize("prompt", request.user_prompt_data, context)

    async def response(self, request: armor.SanitizeModelResponseRequest, context: Any) -> Any:
        assert not request.user_prompt
        return await self._sanitize("response", request.model_response_data, context)

    async def get(self, request: armor.GetTemplateRequest, context: Any) -> Any:
        self.num_reads += 1
        if isinstance(self.template, grpc.StatusCode):
            await context.abort(self.template, "scripted")
        return self.template

    def handler(self) -> grpc.GenericRpcHandler:
        """The three methods that Cabochon calls."""
        methods = {
            "SanitizeUserPrompt": (self.prompt, armor.SanitizeUserPromptRequest),
            "SanitizeModelResponse": (self.response, armor.SanitizeModelResponseRequest),
            "GetTemplate": (self.get, armor.GetTemplateRequest),
        }
        handlers = {
            name: grpc.unary_unary_rpc_method_handler(method, kind.deserialize, _serialize)
            for name, (method, kind) in methods.items()
        }
        return grpc.method_handlers_generic_handler("google.cloud.modelarmor.v1.ModelArmor", handlers)


def _serialize(message: Any) -> bytes:
    return message if isinstance(message, bytes) else type(message).serialize(message)


@asynccontextmanager
async def serving(fake: FakeArmor, port: int = 0) -> AsyncIterator[int]:
    """Serve on loopback; gives the port."""
    server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
    server.add_generic_rpc_handlers((fake.handler(),))
    bound = server.add_insecure_port(f"127.0.0.1:{port}")
    await server.start()
    try:
        yield bound
    finally:
        await server.stop(None)


def config_for(port: int, **options: Any) -> ArmorConfig:
    """Of a checker that asks the fake."""
    return ArmorConfig(
        **{
            "armor_prompt_template": TEMPLATE,
            "armor_response_template": TEMPLATE,
            "armor_endpoint": f"127.0.0.1:{port}",
            "armor_insecure": True,
            **options,
        }
    )


@dataclass
class World:
    """A fake, a checker that asks it, and its metrics."""

    fake: FakeArmor
    config: ArmorConfig
    checker: ArmorChecker
    registry: CollectorRegistry

    def metric(self, name: str, **labels: str) -> float:
        """A sample, 0 if there is none."""
        return self.registry.get_sample_value(f"cabochon:guard_{name}", labels) or 0.0


@asynccontextmanager
async def checking(fake: FakeArmor | None = None, **options: Any) -> AsyncIterator[World]:
    """A checker, started, beside a fake that serves."""
    fake = fake or FakeArmor()
    async with serving(fake) as port:
        config, registry = config_for(port, **options), CollectorRegistry()
        checker = ArmorChecker(config, Policies(config), GuardMetrics(registry))
        try:
            await checker.start()
            yield World(fake, config, checker, registry)
        finally:
            await checker.close()
