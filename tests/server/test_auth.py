"""API keys guard what costs compute, and nothing a probe needs."""

import os
from pathlib import Path

import pytest
from fake_server import CHAT, COMPLETIONS, LiveServer, fake_app
from starlette.applications import Starlette
from starlette.routing import Mount
from starlette.testclient import TestClient

from cabochon.engine.errors import ConfigError
from cabochon.server.auth import ApiKeys
from cabochon.server.config import ServerConfig
from cabochon.server.errors import ApiError

KEY = {"Authorization": "Bearer key-one"}


@pytest.fixture
def key_file(tmp_path: Path) -> Path:
    path = tmp_path / "keys"
    path.write_text("# the team's\nkey-one\n\n  key-two  \n")
    return path


def test_guarded_paths_need_a_key(key_file: Path) -> None:
    with LiveServer(api_key_file=str(key_file)) as live:
        for path in (CHAT, COMPLETIONS, "/tokenize", "/detokenize"):
            answer = live.post(path, {})
            assert answer.status_code == 401
            assert answer.json()["error"]["code"] == "invalid_api_key"
            assert answer.headers["x-request-id"]
            assert live.post(path, {}, headers=KEY).status_code == 400
        assert live.http.get("/v1/models").status_code == 401
        for path in ("/health", "/-/healthz", "/metrics", "/version", "/docs", "/"):
            assert live.http.get(path).status_code == 200


@pytest.mark.parametrize(
    "given", [None, "", "Bearer", "Bearer ", "Bearer key", "key-three", "Bearer # the team's", "Bearer é"]
)
def test_other_keys_are_refused(key_file: Path, given: str | None) -> None:
    with pytest.raises(Exception, match="Authorization header must be"):
        ApiKeys(str(key_file)).check(CHAT, given)


@pytest.mark.parametrize("given", ["Bearer key-one", "Bearer key-two"])
def test_each_line_is_a_key(key_file: Path, given: str) -> None:
    ApiKeys(str(key_file)).check(CHAT, given)


def test_the_file_is_read_again_when_it_changes(key_file: Path) -> None:
    keys = ApiKeys(str(key_file))
    key_file.write_text("key-new\n")
    os.utime(key_file, ns=(1, 1))
    keys.check(CHAT, "Bearer key-new")
    with pytest.raises(Exception, match="must be"):
        keys.check(CHAT, "Bearer key-one")


def test_a_file_that_vanishes_leaves_the_keys(key_file: Path, caplog: pytest.LogCaptureFixture) -> None:
    keys = ApiKeys(str(key_file))
    key_file.unlink()
    keys.check(CHAT, "Bearer key-one")
    assert "api key file cannot be read" in caplog.text
    assert "key-one" not in caplog.text


def test_without_a_file_everybody_may() -> None:
    ApiKeys(None).check(CHAT, None)


def test_a_file_without_keys_is_an_error_at_start(tmp_path: Path) -> None:
    empty = tmp_path / "keys"
    with pytest.raises(ConfigError, match="must be a file with keys"):
        ApiKeys(str(empty))
    empty.write_text("# none\n")
    with pytest.raises(ConfigError, match="has none: add one"):
        ApiKeys(str(empty))


def test_a_prefix_that_the_app_is_mounted_at_opens_nothing(key_file: Path) -> None:
    inner = fake_app(api_key_file=str(key_file))
    outer = Starlette(routes=[Mount("/app", inner)])
    with TestClient(outer) as client:
        assert client.get("/app/v1/models").status_code == 401
        assert client.get("/app/v1/models", headers=KEY).status_code == 200
        assert client.get("/app/health").status_code == 200


def test_what_is_not_known_to_be_open_is_guarded(key_file: Path) -> None:
    for path in ("/v2/models", "//v1/models", "/V1/models", "/health/x", ""):
        with pytest.raises(ApiError, match="Authorization header must be"):
            ApiKeys(str(key_file)).check(path, None)


def test_the_scheme_is_read_in_any_case_and_keys_may_be_of_any_letters(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_text("schlüssel\n", encoding="utf-8-sig")
    header = "schlüssel".encode().decode("latin-1")  # as ASGI hands it on
    for scheme in ("Bearer", "bearer", "BEARER"):
        ApiKeys(str(path)).check(CHAT, f"{scheme} {header}")


def test_a_file_that_is_emptied_leaves_the_keys(key_file: Path, caplog: pytest.LogCaptureFixture) -> None:
    keys = ApiKeys(str(key_file))
    key_file.write_text("")
    keys.check(CHAT, "Bearer key-one")
    assert "api key file has no key" in caplog.text


def test_an_empty_name_is_no_way_to_start_without_keys() -> None:
    with pytest.raises(ConfigError, match="api_key_file must name a file with keys"):
        ServerConfig(api_key_file="")
