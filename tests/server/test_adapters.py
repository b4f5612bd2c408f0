"""LoRA adapters over HTTP: their names in every route, and loading that stays within --lora-dir."""

import logging
import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from fake_server import CHAT, COMPLETIONS, LiveServer, wait_until

from cabochon.engine.errors import ConfigError
from cabochon.engine.fake import FAKE_INFO, FakeEngine
from cabochon.engine.messages import AdapterInfo
from cabochon.server.adapters import check_directory, problem_of_name
from cabochon.server.lifecycle import Phase

LOAD, UNLOAD = "/v1/load_lora_adapter", "/v1/unload_lora_adapter"
FIRST = AdapterInfo(name="first", path="/models/first", rank=8, num_bytes=1, base_model=None)
INFO = replace(FAKE_INFO, max_loras=2, adapters=[FIRST])


def make_home(parent: Path) -> Path:
    """lora_dir with the adapters a and group/b, beside a directory that is none of it, and links to there."""
    for name in (
        "loras/a",
        "loras/group/b",
        "loras2/a",
        "elsewhere/a",
        "loras/linked_file",
        "loras/linked_dir",
    ):
        (parent / name).mkdir(parents=True)
        (parent / name / "adapter_config.json").write_text("{}")
    home = parent / "loras"
    for link, target in (
        ("link", parent / "elsewhere"),
        ("link2", parent / "loras2"),
        ("broken_link", parent / "nowhere"),
        ("etc", "/etc"),
        ("loop", "loop"),
        ("linked_file/adapter_model.safetensors", parent / "elsewhere/a/adapter_config.json"),
        ("linked_dir/adapter_model.safetensors", parent / "elsewhere"),
    ):
        (home / link).symlink_to(target)
    return home


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return make_home(tmp_path)


@pytest.fixture
def lora(home: Path) -> Iterator[LiveServer]:
    with LiveServer(engine=FakeEngine(INFO), lora_dir=home, served_model_name=("gemma", "alias")) as server:
        yield server


@pytest.fixture(scope="module")
def kept_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_home(tmp_path_factory.mktemp("kept"))


@pytest.fixture(scope="module")
def refusing(kept_home: Path) -> Iterator[LiveServer]:
    """For tests that load nothing."""
    names = ("gemma", "alias")
    with LiveServer(engine=FakeEngine(INFO), lora_dir=kept_home, served_model_name=names) as server:
        yield server
        assert list(server.engine.adapters) == ["first"]


def load(server: LiveServer, name: Any = "new", path: Any = "a", **fields: Any) -> httpx.Response:
    return server.post(LOAD, {"lora_name": name, "lora_path": path, **fields})


def unload(server: LiveServer, name: str, **fields: Any) -> httpx.Response:
    return server.post(UNLOAD, {"lora_name": name, **fields})


def names(server: LiveServer) -> list[str]:
    return [model["id"] for model in server.http.get("/v1/models").json()["data"]]


def error(answer: httpx.Response, status: int) -> dict[str, Any]:
    assert answer.status_code == status, answer.text
    return dict(answer.json()["error"])


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (CHAT, {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 1}),
        (COMPLETIONS, {"prompt": "hello", "max_tokens": 1}),
        ("/v1/responses", {"input": "hello", "max_output_tokens": 1}),
    ],
)
def test_an_adapters_name_reaches_the_engine_and_is_echoed(
    lora: LiveServer, path: str, body: dict[str, Any]
) -> None:
    for name, adapter in (("first", "first"), ("gemma", None), ("alias", None), (None, None)):
        answer = lora.post(path, {**body, "model": name})
        assert answer.json()["model"] == (name or "gemma")
        assert lora.engine.seen[-1].adapter == adapter
    streamed = lora.post(path, {**body, "model": "first", "stream": True})
    assert '"model":"first"' in streamed.text
    assert error(lora.post(path, {**body, "model": "second"}), 404)["code"] == "model_not_found"


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (CHAT + "/render", {"messages": [{"role": "user", "content": "hello"}]}),
        (COMPLETIONS + "/render", {"prompt": "hello"}),
        ("/tokenize", {"prompt": "hello"}),
        ("/detokenize", {"tokens": [7]}),
    ],
)
def test_routes_that_do_not_generate_know_the_names_too(
    lora: LiveServer, path: str, body: dict[str, Any]
) -> None:
    assert lora.post(path, {**body, "model": "first"}).status_code == 200
    assert error(lora.post(path, {**body, "model": "second"}), 404)["code"] == "model_not_found"


def test_models_and_adapters_are_listed_with_their_parent(lora: LiveServer, home: Path) -> None:
    before = int(time.time())
    assert load(lora, "new", "group/b").status_code == 200
    base, _, first, new = lora.http.get("/v1/models").json()["data"]
    assert (base["id"], base["parent"], base["root"]) == ("gemma", None, "fake")
    assert first == {
        "id": "first",
        "object": "model",
        "created": lora.service.started,
        "owned_by": "cabochon",
        "root": "/models/first",
        "parent": "gemma",
        "max_model_len": 1024,
    }
    assert (new["id"], new["parent"], new["root"]) == ("new", "gemma", str(home / "group/b"))
    assert before <= new["created"] <= time.time()
    assert lora.http.get("/v1/models/new").json() == new
    assert error(lora.http.get("/v1/models/other"), 404)["message"] == (
        "model must be one of gemma, alias, first, new: see /v1/models"
    )


def test_an_error_does_not_list_names_without_end() -> None:
    many = [replace(FIRST, name=f"adapter-{i}") for i in range(100)]
    with LiveServer(engine=FakeEngine(replace(INFO, adapters=many))) as live:
        message = error(live.chat(model="x"), 404)["message"]
        assert message.count("adapter-") == 31
        assert message.endswith("adapter-30, ...: see /v1/models")


def test_load_and_unload_answer_in_vllms_words(lora: LiveServer) -> None:
    loaded = load(lora, "it's new")
    assert (loaded.status_code, loaded.text) == (200, "Success: LoRA adapter 'it's new' added successfully.")
    assert loaded.headers["content-type"] == "text/plain; charset=utf-8"
    assert lora.complete(model="it's new", max_tokens=1).status_code == 200
    unloaded = unload(lora, "it's new", lora_int_id=7)
    assert unloaded.text == "Success: LoRA adapter 'it's new' removed successfully."
    assert unloaded.status_code == 200
    assert error(lora.complete(model="it's new"), 404)["code"] == "model_not_found"
    assert error(unload(lora, "it's new"), 404) == {
        "message": "lora_name must be a loaded adapter: see /v1/models",
        "type": "invalid_request_error",
        "param": "lora_name",
        "code": "adapter_not_found",
    }
    assert "it's new" not in lora.engine.adapters


def test_a_name_is_loaded_twice_only_in_place(lora: LiveServer, home: Path) -> None:
    load(lora, "new", "a")
    refused = error(load(lora, "new", "group/b"), 400)
    assert (refused["code"], refused["param"]) == ("adapter_exists", "lora_name")
    assert lora.engine.adapters["new"].path == str(home / "a")
    assert load(lora, "new", "group/b", load_inplace=True).status_code == 200
    assert lora.engine.adapters["new"].path == str(home / "group/b")
    assert lora.http.get("/v1/models/new").json()["root"] == str(home / "group/b")
    assert load(lora, "newer", "a", load_inplace=True).status_code == 200


def test_a_path_may_be_relative_or_absolute(lora: LiveServer, home: Path) -> None:
    for given in ("a", "./a/", "group/../a", "group/b/../../a", f"{home}/a", f"{home}//group/../a"):
        assert load(lora, path=given, load_inplace=True).status_code == 200
        assert lora.engine.adapters["new"].path == str(home / "a")


@pytest.mark.parametrize(
    "given",
    [
        "../elsewhere/a", "../loras2/a", "a/../../elsewhere/a", "../loras/a", "a/../../loras/a", "..", "/",
        "/etc", "//etc", "HOME/../elsewhere/a", "link/a", "link", "link/../elsewhere/a", "HOME2/a",
        "HOME/link/a", "link2/a", "etc/passwd", "linked_file",
        "linked_dir", "../nowhere", "/nowhere", "a/../../nowhere", "link/nowhere", "broken_link",
    ],
)  # fmt: skip
def test_a_path_out_of_the_directory_is_refused_alike_whether_it_exists(
    refusing: LiveServer, kept_home: Path, given: str
) -> None:
    given = given.replace("HOME", str(kept_home))
    assert error(load(refusing, path=given), 400) == {
        "message": "lora_path must lead to a directory below lora_dir: correct it",
        "type": "invalid_request_error",
        "param": "lora_path",
        "code": "invalid_value",
    }


def test_what_lies_outside_by_its_spelling_is_not_even_looked_at(
    refusing: LiveServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked: list[str] = []
    lstat = os.lstat  # what realpath looks with
    monkeypatch.setattr(os, "lstat", lambda path, **_: looked.append(str(path)) or lstat(path))
    load(refusing, path="link/a")
    assert [path for path in looked if "elsewhere" in path]
    looked.clear()
    load(refusing, path="../elsewhere/a")
    assert not [path for path in looked if "elsewhere" in path]


def test_links_within_the_directory_are_followed(lora: LiveServer, home: Path) -> None:
    (home / "current").symlink_to("group/b")
    (home / "group/b/adapter_model.safetensors").symlink_to("../../a/adapter_config.json")
    assert load(lora, path="current").status_code == 200
    assert lora.engine.adapters["new"].path == str(home / "group/b")


def test_the_directory_itself_may_be_a_link_that_moves(tmp_path: Path, home: Path) -> None:
    link = tmp_path / "served"
    link.symlink_to(home)
    with LiveServer(engine=FakeEngine(INFO), lora_dir=link) as live:
        for given in ("a", str(link / "a"), str(home / "a")):
            assert load(live, path=given, load_inplace=True).status_code == 200
            assert live.engine.adapters["new"].path == str(home / "a")
        link.unlink()
        link.symlink_to(tmp_path / "loras2")
        assert load(live, path="a", load_inplace=True).status_code == 200
        assert live.engine.adapters["new"].path == str(tmp_path / "loras2/a")
        assert error(load(live, "old", str(home / "a")), 400)["param"] == "lora_path"


@pytest.mark.parametrize("given", ["", "a\0b", "\0", "a\n", "x" * 4097, "\x7f", "../" * 1000])
def test_strange_paths_are_refused(refusing: LiveServer, given: str) -> None:
    assert error(load(refusing, path=given), 400)["param"] == "lora_path"


@pytest.mark.parametrize("given", ["x" * 4000, "a/" * 2000, "loop/a", "a/adapter_config.json", "é" * 300])
def test_paths_that_cannot_be_opened_are_left_to_the_engine(refusing: LiveServer, given: str) -> None:
    """Which refuses them: FakeEngine only knows `bad`."""
    assert error(load(refusing, path=given + "/bad"), 400)["code"] == "invalid_adapter"


@pytest.mark.parametrize(
    "name", ["", " ", " a", "a ", "a,b", "a\nb", "a\0", "\x7f", "\u202ea", "x" * 257, "gemma", "alias"]
)
def test_names_that_cannot_be_served_are_refused(refusing: LiveServer, name: str) -> None:
    refused = error(load(refusing, name), 400)
    assert refused["param"] == "lora_name"
    assert refused["message"].endswith(": choose another")


def test_other_names_are_served(lora: LiveServer) -> None:
    for name in ("a", "x" * 256, "org/a:v1@2", "a b", "é 宝石", 'quo"te\\', "A=B", "fake"):
        assert problem_of_name(name, ("gemma",)) is None
        assert load(lora, name).status_code == 200
        assert lora.complete(model=name, max_tokens=1).json()["model"] == name
        assert names(lora)[-1] == name


def test_missing_and_wrong_fields_are_named(lora: LiveServer) -> None:
    for path, body, param, code in (
        (LOAD, {"lora_name": "a"}, "lora_path", "missing_required_parameter"),
        (LOAD, {"lora_path": "a"}, "lora_name", "missing_required_parameter"),
        (UNLOAD, {}, "lora_name", "missing_required_parameter"),
        (LOAD, {"lora_name": 5, "lora_path": "a"}, "lora_name", "invalid_value"),
        (LOAD, {"lora_name": "a", "lora_path": "a", "load_inplace": "yes"}, "load_inplace", "invalid_value"),
        (LOAD, {"lora_name": "a", "lora_path": "a", "pinned": True}, "pinned", "unknown_parameter"),
        (
            LOAD,
            {"lora_name": "a", "lora_path": "a", "is_3d_lora_weight": True},
            "is_3d_lora_weight",
            "unsupported_parameter",
        ),
    ):
        refused = error(lora.post(path, body), 400)
        assert (refused["param"], refused["code"]) == (param, code)
    assert load(lora, is_3d_lora_weight=False).status_code == 200


def test_bodies_have_the_limits_of_all_bodies(home: Path) -> None:
    with LiveServer(engine=FakeEngine(INFO), lora_dir=home, max_body_bytes=100) as live:
        assert error(load(live, "x" * 200), 413)["code"] == "body_too_large"
        assert live.http.post(LOAD, content=b"{}").status_code == 415


def test_what_the_engine_refuses_is_a_400_and_changes_nothing(lora: LiveServer, home: Path) -> None:
    (home / "bad").mkdir()
    refused = error(load(lora, "new", "bad"), 400)
    assert (refused["code"], refused["param"]) == ("invalid_adapter", "lora_path")
    load(lora, "new", "a")
    assert error(load(lora, "new", "bad", load_inplace=True), 400)["code"] == "invalid_adapter"
    assert lora.http.get("/v1/models/new").json()["root"] == str(home / "a")
    assert lora.complete(model="new", max_tokens=1).status_code == 200


@pytest.mark.parametrize("path", [LOAD, UNLOAD])
@pytest.mark.parametrize("body", [{}, {"lora_name": "first", "lora_path": "/etc"}])
def test_without_the_option_nothing_is_loaded_or_unloaded(path: str, body: dict[str, str]) -> None:
    with LiveServer(engine=FakeEngine(INFO)) as live:
        refused = error(live.post(path, body), 404)
        assert refused["code"] == "lora_dir_not_set"
        assert refused["message"].endswith("start the server with --lora-dir DIR")
        assert live.complete(model="first", max_tokens=1).status_code == 200


def test_a_key_is_asked_for(tmp_path: Path, home: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("key\n")
    with LiveServer(engine=FakeEngine(INFO), lora_dir=home, api_key_file=str(keys)) as live:
        assert error(load(live), 401)["code"] == "invalid_api_key"
        assert error(unload(live, "first"), 401)["code"] == "invalid_api_key"
        live.http.headers["Authorization"] = "Bearer key"
        assert load(live).status_code == 200
        assert unload(live, "first").status_code == 200


def test_a_server_that_drains_or_is_dead_changes_nothing(lora: LiveServer) -> None:
    for phase, status in ((Phase.LAME_DUCK, 200), (Phase.DRAINING, 503), (Phase.ENDED, 503)):
        lora.service.lifecycle.phase = phase
        assert load(lora, f"in {phase.value}").status_code == status
    assert error(unload(lora, "first"), 503)["code"] == "engine_dead"
    lora.service.lifecycle.phase = Phase.SERVING
    lora.engine.die()
    assert error(load(lora), 503)["code"] == "engine_dead"
    assert error(unload(lora, "first"), 503)["code"] == "engine_dead"


def test_an_engine_that_dies_while_it_loads_is_a_503(lora: LiveServer) -> None:
    lora.faults.load_s = 0.2
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(load, lora)
        time.sleep(0.05)
        lora.engine.die()
        assert error(answer.result(), 503)["code"] == "engine_dead"


def test_one_name_has_one_change_at_a_time(lora: LiveServer) -> None:
    lora.faults.load_s = 0.3
    with ThreadPoolExecutor(1) as pool:
        loading = pool.submit(load, lora, "new")
        wait_until(lambda: "new" in lora.service.adapters._changing)
        assert error(lora.complete(model="new"), 404)["code"] == "model_not_found"
        for answer in (load(lora, "new"), load(lora, "new", load_inplace=True), unload(lora, "new")):
            assert error(answer, 409)["code"] == "adapter_busy"
        assert unload(lora, "first").status_code == 200, "another name does not wait"
        assert loading.result().status_code == 200
    assert unload(lora, "new").status_code == 200


def test_many_at_once_are_loaded_one_by_one(lora: LiveServer, monkeypatch: pytest.MonkeyPatch) -> None:
    lora.faults.load_s = 0.01
    now, most = 0, 0
    real = lora.engine.load_adapter

    async def counted(*args: Any, **fields: Any) -> AdapterInfo:
        nonlocal now, most
        now, most = now + 1, max(most, now + 1)
        try:
            return await real(*args, **fields)
        finally:
            now -= 1

    monkeypatch.setattr(lora.engine, "load_adapter", counted)
    all_names = [f"adapter-{i}" for i in range(32)]
    with ThreadPoolExecutor(32) as pool:
        streams = [pool.submit(lora.complete, model="first", max_tokens=20) for _ in range(4)]
        statuses = [a.status_code for a in pool.map(lambda name: load(lora, name), all_names * 2)]
        assert statuses.count(200) == 32
        assert set(statuses) <= {200, 400, 409}
        assert all(stream.result().status_code == 200 for stream in streams)
        assert most == 1
        assert sorted(names(lora)[3:]) == sorted(all_names)
        assert all(a.status_code == 200 for a in pool.map(lambda name: unload(lora, name), all_names))
    assert names(lora) == ["gemma", "alias", "first"]
    assert list(lora.engine.adapters) == ["first"]


def test_a_client_that_goes_while_it_loads_loses_nothing(lora: LiveServer) -> None:
    lora.faults.load_s = 0.1
    with pytest.raises(httpx.ReadTimeout):
        lora.post(LOAD, {"lora_name": "new", "lora_path": "a"}, timeout=0.03)
    wait_until(lambda: "new" in lora.engine.adapters)
    wait_until(lambda: "new" in names(lora))
    assert unload(lora, "new").status_code == 200


def test_an_adapter_unloaded_between_check_and_start_is_a_404(lora: LiveServer) -> None:
    del lora.engine.adapters["first"]
    for fields in ({}, {"n": 2}, {"stream": True}):
        refused = error(lora.complete(model="first", max_tokens=1, **fields), 404)
        assert (refused["code"], refused["param"]) == ("model_not_found", "model")
    assert unload(lora, "first").status_code == 404
    assert names(lora) == ["gemma", "alias"], "the engine's word is the last"


def test_an_open_request_keeps_an_unloaded_adapter(lora: LiveServer) -> None:
    lora.faults.is_paused = True
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(lora.complete, model="first", max_tokens=3)
        wait_until(lambda: lora.engine.open)
        assert unload(lora, "first").status_code == 200
        lora.faults.is_paused = False
        assert answer.result().json()["model"] == "first"


def test_the_openai_client_knows_the_errors(lora: LiveServer) -> None:
    with openai.OpenAI(base_url=lora.url + "/v1", api_key="k", max_retries=0) as client:
        assert [model.id for model in client.models.list()] == ["gemma", "alias", "first"]
        assert client.completions.create(model="first", prompt="hello", max_tokens=1).model == "first"
        with pytest.raises(openai.NotFoundError) as caught:
            client.completions.create(model="second", prompt="hello")
        assert caught.value.code == "model_not_found"


def test_no_path_of_a_refused_load_is_logged_or_told(
    lora: LiveServer, home: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    for given in ("link/a", str(home.parent / "elsewhere"), "../elsewhere"):
        answer = load(lora, path=given)
        assert "elsewhere" not in answer.text
        assert str(home) not in answer.text
    load(lora, "new", "a")
    said = [record.getMessage() for record in caplog.records if record.name.startswith("cabochon")]
    assert not [line for line in said if "elsewhere" in line]
    assert f"adapter loaded name='new' rank=8 bytes=4096 path='{home / 'a'}'" in said


def test_a_directory_that_is_none_is_found_at_the_start(tmp_path: Path) -> None:
    check_directory(None)
    check_directory(str(tmp_path))
    (tmp_path / "file").touch()
    for wrong in ("file", "nowhere"):
        with pytest.raises(ConfigError, match=rf"lora_dir must be a directory, .*{wrong} is none"):
            check_directory(str(tmp_path / wrong))
