"""Every error of the engine has a status, a type and a code; foreign ones keep their secrets."""

import pytest

from cabochon.engine import errors
from cabochon.engine.errors import (
    BadPrompt,
    BadSampling,
    ComputeError,
    ConfigError,
    EngineDead,
    EngineError,
    ModelNotFound,
    Overloaded,
    PromptTooLong,
    RequestError,
)
from cabochon.server.errors import HTTP, ApiError, as_api_error

CALLERS = "invalid_request_error"
ALL = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, EngineError)]


def make(kind: type[EngineError]) -> EngineError:
    return kind("what happened", 3.0) if issubclass(kind, Overloaded) else kind("what happened")


@pytest.mark.parametrize(
    ("error", "status", "kind", "code"),
    [
        (PromptTooLong("m", "prompt"), 400, CALLERS, "context_length_exceeded"),
        (BadPrompt("m", "prompt"), 400, CALLERS, "invalid_prompt"),
        (BadSampling("m", "top_k"), 400, CALLERS, "invalid_value"),
        (RequestError("m"), 400, CALLERS, "invalid_value"),
        (Overloaded("m", 3.0), 429, "rate_limit_error", "overloaded"),
        (ComputeError("m"), 500, "server_error", "model_error"),
        (EngineDead("m"), 503, "server_error", "engine_dead"),
        (ConfigError("m"), 500, "server_error", "internal_error"),
        (ModelNotFound("m"), 500, "server_error", "internal_error"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else None,
)
def test_each_error_has_its_shape(error: EngineError, status: int, kind: str, code: str) -> None:
    sent = as_api_error(error)
    assert sent.status == status
    assert sent.body() == {
        "error": {"message": "m", "type": kind, "param": getattr(error, "param", None), "code": code}
    }


@pytest.mark.parametrize("kind", ALL, ids=lambda kind: kind.__name__)
def test_every_error_of_the_engine_keeps_its_message(kind: type[EngineError]) -> None:
    sent = as_api_error(make(kind))
    assert str(sent) == "what happened"
    assert sent.status >= 400
    assert isinstance(sent.code, str)


@pytest.mark.parametrize("kind", HTTP, ids=lambda kind: kind.__name__)
def test_the_callers_errors_are_4xx_and_ours_are_5xx(kind: type[EngineError]) -> None:
    is_callers = issubclass(kind, RequestError | Overloaded)
    assert HTTP[kind].status // 100 == (4 if is_callers else 5)


def test_a_new_kind_of_error_has_the_shape_of_its_parent() -> None:
    kind = type("PromptTooOdd", (BadPrompt,), {})
    assert as_api_error(kind("m", "prompt")).code == "invalid_prompt"


@pytest.mark.parametrize("error", [RuntimeError("the secret"), KeyError("the secret"), ValueError()])
def test_a_foreign_error_says_nothing_of_itself(error: Exception) -> None:
    sent = as_api_error(error)
    assert sent.status == 500
    assert sent.body() == {
        "error": {
            "message": "the server made a mistake, its log has the details: report the request id",
            "type": "server_error",
            "param": None,
            "code": "internal_error",
        }
    }


def test_an_error_for_the_wire_passes_as_it_is() -> None:
    error = ApiError("m", status=413, headers={"Connection": "close"})
    assert as_api_error(error) is error


@pytest.mark.parametrize(
    ("wait_s", "seconds"), [(0.0, "1"), (0.2, "1"), (1.0, "1"), (3.6, "4"), (59.5, "60"), (1e6, "1000000")]
)
def test_overload_says_when_to_come_back_in_whole_seconds(wait_s: float, seconds: str) -> None:
    assert as_api_error(Overloaded("m", wait_s)).headers == {"Retry-After": seconds}


def test_other_errors_have_no_header() -> None:
    assert as_api_error(EngineDead("m")).headers == {}
    assert ApiError("m").headers == {}


def test_an_error_is_the_callers_unless_it_says_otherwise() -> None:
    error = ApiError("m", param="top_k")
    assert error.status == 400
    assert error.body()["error"] == {
        "message": "m",
        "type": CALLERS,
        "param": "top_k",
        "code": "invalid_value",
    }


def test_two_errors_do_not_share_their_headers() -> None:
    ApiError("m").headers["X"] = "y"
    assert ApiError("m").headers == {}
