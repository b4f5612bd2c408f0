"""gRPC clients of Model Armor, one for each endpoint: made on the serving loop, when first needed.

No call is retried here, and each has a deadline. The client's log of requests and replies stays silent.
"""

import asyncio
import logging
from importlib.util import find_spec
from typing import Any, NamedTuple

from cabochon.engine.errors import ConfigError
from cabochon.server.armor.config import TEMPLATE, ArmorConfig
from cabochon.server.armor.verdicts import Reason, Stage

SCOPES = ("https://www.googleapis.com/auth/cloud-platform",)
# The channel's own pause before it connects again is 1 s, longer than a check has after a reset; and it grows
# to 120 s: an outage would last that much longer
CHANNEL_OPTIONS = (("grpc.initial_reconnect_backoff_ms", 50), ("grpc.max_reconnect_backoff_ms", 2000))
NOT_INSTALLED = "Model Armor needs its client, which is not installed: pip install 'cabochon[armor]'"


class Failure(NamedTuple):
    """Why a call gave no reply."""

    reason: Reason
    counts: bool = True  # as a failure of the endpoint; not if a template, a role or the quota is at fault
    may_retry: bool = False


class UnclearReply(Exception):
    """A reply that cannot be decoded, or is empty."""


FAILURES = {
    "DEADLINE_EXCEEDED": Failure("timeout"),
    "UNAVAILABLE": Failure("unavailable", may_retry=True),
    "RESOURCE_EXHAUSTED": Failure("quota", counts=False),
    "PERMISSION_DENIED": Failure("denied", counts=False),
    "UNAUTHENTICATED": Failure("denied"),
    "NOT_FOUND": Failure("invalid", counts=False),
    "INVALID_ARGUMENT": Failure("invalid", counts=False),
}


def failure_of(error: BaseException) -> Failure:
    """What an error of a call means; the error itself may hold text of the call, and goes nowhere."""
    if isinstance(error, TimeoutError):
        return Failure("timeout")
    if isinstance(error, UnclearReply):
        return Failure("malformed")
    if isinstance(error, ValueError):  # protobuf's, on a text that is not Unicode
        return Failure("invalid", counts=False)
    if type(error).__module__.startswith("google.auth"):
        return Failure("denied")
    code = getattr(error, "grpc_status_code", None)
    return FAILURES.get(getattr(code, "name", ""), Failure("unavailable"))


def check_client() -> None:
    """Raises ConfigError if the optional package is not there. Does not load it."""
    try:
        found = find_spec("google.cloud.modelarmor_v1")
    except ModuleNotFoundError:  # not even google.cloud
        found = None
    if found is None:
        raise ConfigError(NOT_INSTALLED)


class Connections:
    """Raises ConfigError if the package is not there. Methods raise what the client does."""

    def __init__(self, config: ArmorConfig) -> None:
        try:  # an optional dependency
            from google.cloud import modelarmor_v1
        except ImportError:
            raise ConfigError(NOT_INSTALLED) from None
        # Or it would put whole requests and replies into DEBUG records
        logging.getLogger("google.cloud.modelarmor_v1").setLevel(logging.INFO)
        self._armor = modelarmor_v1
        self._config = config
        self._clients: dict[str, Any] = {}
        self._credentials: Any = None
        self._lock = asyncio.Lock()
        self._is_closed = False

    def endpoint(self, template: str) -> str:
        """Where calls for the template go: its own location, since nothing else has it."""
        location = TEMPLATE.fullmatch(template)
        assert location is not None, "templates are checked where they are configured"
        return self._config.armor_endpoint or f"modelarmor.{location[1]}.rep.googleapis.com"

    async def sanitize(self, template: str, stage: Stage, text: str, timeout_s: float) -> Any | None:
        """The SanitizationResult, or None if the reply cannot be decoded."""
        armor, client = self._armor, await self._client(self.endpoint(template))
        item = armor.DataItem(text=text)
        if stage == "prompt":
            request = armor.SanitizeUserPromptRequest(name=template, user_prompt_data=item)
            reply = await client.sanitize_user_prompt(request, retry=None, timeout=timeout_s)
        else:  # without the prompt: nothing says that a filter looks at it
            request = armor.SanitizeModelResponseRequest(name=template, model_response_data=item)
            reply = await client.sanitize_model_response(request, retry=None, timeout=timeout_s)
        return None if reply is None else reply.sanitization_result

    async def get_template(self, template: str, timeout_s: float) -> Any | None:
        """The Template, or None if the reply cannot be decoded."""
        client = await self._client(self.endpoint(template))
        request = self._armor.GetTemplateRequest(name=template)
        return await client.get_template(request, retry=None, timeout=timeout_s)

    async def close(self) -> None:
        """Ends the channels; calls fail from now on."""
        self._is_closed = True
        clients, self._clients = self._clients, {}
        for client in clients.values():
            await client.transport.close()

    async def _client(self, endpoint: str) -> Any:
        if self._is_closed:
            raise ConnectionError("the connections must be open, they are closed")
        async with self._lock:
            if endpoint not in self._clients:
                self._clients[endpoint] = await self._connect(endpoint)
            return self._clients[endpoint]

    async def _connect(self, endpoint: str) -> Any:
        import grpc  # they come with the optional dependency
        from google.api_core.client_options import ClientOptions
        from google.cloud.modelarmor_v1.services.model_armor.transports import (
            ModelArmorGrpcAsyncIOTransport as Transport,
        )

        def channel(host: str, *, options: Any = (), **rest: Any) -> Any:
            return Transport.create_channel(host, options=[*options, *CHANNEL_OPTIONS], **rest)

        if self._config.armor_insecure:  # only to loopback, says the config; it has no credentials
            direct = ("grpc.enable_http_proxy", 0)  # or a proxy of the environment would read along
            plain = grpc.aio.insecure_channel(endpoint, options=[*CHANNEL_OPTIONS, direct])
            return self._armor.ModelArmorAsyncClient(transport=Transport(channel=plain))
        return self._armor.ModelArmorAsyncClient(
            credentials=await self._own_credentials(),
            client_options=ClientOptions(api_endpoint=endpoint),
            transport=lambda **given: Transport(channel=channel, **given),
        )

    async def _own_credentials(self) -> Any:
        """Application Default Credentials; finding them asks the metadata server, and blocks."""
        import google.auth

        if self._credentials is None:
            self._credentials, _ = await asyncio.to_thread(google.auth.default, default_scopes=SCOPES)
        return self._credentials
