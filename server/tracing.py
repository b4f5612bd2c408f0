"""The switch of OpenTelemetry traces. Off, nothing of it is imported; on, `spans` does the work."""

from typing import TYPE_CHECKING

from cabochon.engine.errors import ConfigError

if TYPE_CHECKING:
    from cabochon.server.spans import Tracing


def start_tracing(endpoint: str | None) -> "Tracing | None":
    """endpoint: a collector's OTLP/HTTP URL, its path /v1/traces unless it has one; None: no tracing.

    Raises ConfigError without the packages of the extra `otel`.
    """
    if endpoint is None:
        return None
    try:
        from cabochon.server.spans import Tracing  # an optional dependency
    except ModuleNotFoundError as error:
        if not (error.name or "").startswith("opentelemetry"):
            raise
        raise ConfigError(
            f"otlp_endpoint needs OpenTelemetry's packages, {error.name} is not installed:"
            " pip install 'cabochon[otel]', or leave the option out"
        ) from None
    return Tracing.to(endpoint)
