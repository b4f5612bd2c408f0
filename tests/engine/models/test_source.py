"""Where models come from: directories, and a stand-in of the Hub that huggingface_hub talks to over HTTP."""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from hub_stand_in import Cut, HubStandIn, Repository

from cabochon.engine.errors import BadCheckpoint, ModelNotFound
from cabochon.engine.models import source
from cabochon.engine.models.source import locate

REPO = "house/gemma-2-tiny"
SINGLE = {
    "config.json": b'{"model_type": "gemma2"}',
    "generation_config.json": b"{}",
    "tokenizer.json": b'{"model": {}}',
    "model.safetensors": b"the weights",
    "chat_template.jinja": b"{{ messages }}",
}
SHARDED = {
    "config.json": b'{"model_type": "gemma2"}',
    "tokenizer.json": b'{"model": {}}',
    "model-00001-of-00002.safetensors": b"one half",
    "model-00002-of-00002.safetensors": b"the other half",
    "model.safetensors.index.json": b'{"weight_map": {}}',
}
DOWNLOAD_CHUNK = 10 * 2**20  # huggingface_hub's: it resumes at a multiple of it

# huggingface_hub reads HF_ENDPOINT and HF_HOME at import: hence a process for each start.
LOCATE = """
import json, sys
from cabochon.engine.errors import ModelError
from cabochon.engine.models.source import locate
try:
    print(json.dumps({"directory": str(locate(sys.argv[1], revision=json.loads(sys.argv[2])))}))
except ModelError as error:
    print(json.dumps({"error": type(error).__name__, "message": str(error)}))
"""


@dataclass
class Machine:
    """Starts of Cabochon on one machine: they share a Hugging Face cache."""

    home: Path
    endpoint: str

    def locate(self, model: str = REPO, revision: str | None = None, **environment: str) -> dict[str, str]:
        clean = {k: v for k, v in os.environ.items() if not k.startswith("HF_") and "proxy" not in k.lower()}
        clean |= {"HF_ENDPOINT": self.endpoint, "HF_HOME": str(self.home), "HF_HUB_DISABLE_TELEMETRY": "1"}
        run = subprocess.run(
            [sys.executable, "-c", LOCATE, model, json.dumps(revision)],
            env=clean | environment,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert run.returncode == 0, run.stderr
        answer: dict[str, str] = json.loads(run.stdout)
        return answer


@pytest.fixture
def hub() -> Iterator[HubStandIn]:
    with HubStandIn() as hub:
        yield hub


@pytest.fixture
def machine(hub: HubStandIn, tmp_path: Path) -> Machine:
    return Machine(tmp_path / "hf", hub.url)


def content_of(directory: str) -> dict[str, bytes]:
    files = [path for path in Path(directory).rglob("*") if path.is_file()]
    return {str(path.relative_to(directory)): path.read_bytes() for path in files}


def write(directory: Path, *names: str) -> Path:
    for name in names:
        (directory / name).write_bytes(b"{}")
    return directory


def test_a_directory_is_its_own_location(tmp_path: Path) -> None:
    write(tmp_path, "config.json", "tokenizer.json", "model.safetensors")
    assert locate(str(tmp_path)) == tmp_path


@pytest.mark.parametrize("missing", ["config.json", "tokenizer.json"])
def test_a_file_that_the_directory_lacks_is_named(tmp_path: Path, missing: str) -> None:
    write(tmp_path, "config.json", "tokenizer.json", "model.safetensors")
    (tmp_path / missing).unlink()
    message = rf"a model directory must have {missing}, {tmp_path} has none: complete it"
    with pytest.raises(BadCheckpoint, match=message):
        locate(str(tmp_path))


@pytest.mark.parametrize(
    ("weights", "shown"),
    [
        (["pytorch_model.bin"], "pytorch_model.bin"),
        (["b.pt", "a.pth"], "a.pth, b.pt"),
        (["gemma.gguf"], "gemma.gguf"),
        ([], "no weights"),
    ],
)
def test_weights_of_another_format_are_named_with_the_way_to_convert_them(
    tmp_path: Path, weights: list[str], shown: str
) -> None:
    write(tmp_path, "config.json", "tokenizer.json", *weights)
    message = (
        rf"weights must be in \*\.safetensors, {tmp_path} has {shown}: convert it with transformers'"
        r" save_pretrained\(safe_serialization=True\)"
    )
    with pytest.raises(BadCheckpoint, match=message):
        locate(str(tmp_path))


@pytest.mark.parametrize("model", ["/no/such/directory", "./gemma", "a/b/c", "gemma 2", "google/gemma--2"])
def test_what_is_neither_directory_nor_hub_id_is_refused(model: str) -> None:
    message = "a model must be `demo`, a directory, or a Hub id such as google/gemma-2-2b-it, got "
    with pytest.raises(ModelNotFound, match=message):
        locate(model)


@pytest.mark.parametrize("files", [SINGLE, SHARDED], ids=["single file", "shards"])
def test_a_public_repository_is_downloaded(
    hub: HubStandIn, machine: Machine, files: dict[str, bytes]
) -> None:
    hub.repositories[REPO] = Repository(files)
    assert content_of(machine.locate()["directory"]) == files


def test_neither_pickles_nor_documents_nor_folders_are_downloaded(hub: HubStandIn, machine: Machine) -> None:
    unwanted = [
        "pytorch_model.bin",
        "model.pt",
        "consolidated.00.pth",
        "gemma.gguf",
        "tokenizer.model",
        "README.md",
        "handler.py",
        "checkpoint-500/model.safetensors",
        "checkpoint-500/trainer_state.json",
    ]
    hub.repositories[REPO] = Repository({**SINGLE, **dict.fromkeys(unwanted, b"unwanted")})
    assert content_of(machine.locate()["directory"]) == SINGLE
    assert hub.fetched() == sorted(SINGLE)


def test_a_second_start_downloads_nothing(hub: HubStandIn, machine: Machine) -> None:
    hub.repositories[REPO] = Repository(SINGLE)
    first = machine.locate()
    hub.requests.clear()
    assert machine.locate() == first
    assert hub.fetched() == []


def test_a_revision_is_downloaded_and_an_unknown_one_is_named(hub: HubStandIn, machine: Machine) -> None:
    hub.repositories[REPO] = Repository(SINGLE, revisions=("main", "v2"))
    assert "directory" in machine.locate(revision="v2")
    assert any(request.path.endswith("/revision/v2") for request in hub.requests)
    assert machine.locate(revision="v3") == {
        "error": "ModelNotFound",
        "message": f"{REPO} has no revision v3: see https://huggingface.co/{REPO}/tree for those it has",
    }


def test_a_repository_of_pickles_only_is_refused(hub: HubStandIn, machine: Machine) -> None:
    hub.repositories[REPO] = Repository(
        {"config.json": b"{}", "tokenizer.json": b"{}", "model.bin": b"pickle"}
    )
    answer = machine.locate()
    assert answer["error"] == "BadCheckpoint"
    assert "weights must be in *.safetensors" in answer["message"]
    assert "model.bin" not in hub.fetched()


@pytest.mark.parametrize("status", [401, 403])
@pytest.mark.parametrize("is_listed", [True, False])
def test_a_gated_repository_names_its_terms_and_the_token(
    hub: HubStandIn, machine: Machine, status: int, is_listed: bool
) -> None:
    refusal = (status, "GatedRepo", "Access to this model is restricted")
    hub.repositories[REPO] = Repository(SINGLE, refusal=refusal, is_listed=is_listed)
    assert machine.locate(HF_TOKEN="hf_of_somebody_else") == {
        "error": "ModelNotFound",
        "message": f"{REPO} is gated and this account may not read it: accept its terms at"
        f" https://huggingface.co/{REPO}, then set HF_TOKEN to a token of that account"
        " (or run `hf auth login`)",
    }
    assert {request.token for request in hub.requests} == {"hf_of_somebody_else"}


@pytest.mark.parametrize("status", [401, 404])
def test_a_private_or_unknown_repository_says_what_to_check(
    hub: HubStandIn, machine: Machine, status: int
) -> None:
    hub.repositories[REPO] = Repository({}, refusal=(status, "RepoNotFound", ""), is_listed=False)
    assert machine.locate() == {
        "error": "ModelNotFound",
        "message": f"{REPO} is neither a directory here nor a repository of the Hub that this account may"
        " see: check the name; a private or gated one needs HF_TOKEN",
    }


@pytest.mark.parametrize(
    ("status", "reason"),
    [
        (401, "Invalid credentials in Authorization header"),
        (403, "Please enable access to public gated repositories in your fine-grained token settings"),
    ],
)
@pytest.mark.parametrize("is_listed", [True, False])
def test_a_token_that_the_hub_refuses_is_blamed_and_not_the_network(
    hub: HubStandIn, machine: Machine, status: int, reason: str, is_listed: bool
) -> None:
    hub.repositories[REPO] = Repository(SINGLE, refusal=(status, "", reason), is_listed=is_listed)
    assert machine.locate(HF_TOKEN="hf_expired") == {
        "error": "ModelNotFound",
        "message": f"the Hub must let this account read {REPO}, it answered {status} ({reason}):"
        " set HF_TOKEN to a valid token that may read it",
    }


def test_a_hub_that_fails_is_said_to_be_out_of_reach(hub: HubStandIn, machine: Machine) -> None:
    hub.repositories[REPO] = Repository({}, refusal=(500, "", "Internal Error"), is_listed=False)
    answer = machine.locate()
    assert answer["error"] == "ModelNotFound"
    assert f"{REPO} is not whole in the local cache and the Hub cannot be reached (" in answer["message"]
    assert "check the network, or pass a directory, or `demo`" in answer["message"]


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


def test_without_a_network_the_message_says_so(tmp_path: Path) -> None:
    answer = Machine(tmp_path, f"http://127.0.0.1:{free_port()}").locate()
    assert answer == {
        "error": "ModelNotFound",
        "message": f"{REPO} is not whole in the local cache and the Hub cannot be reached (ConnectError):"
        " check the network, or pass a directory, or `demo`",
    }


@pytest.mark.parametrize("revision", [None, "v2"])
def test_without_a_network_a_downloaded_repository_is_served(
    hub: HubStandIn, machine: Machine, revision: str | None
) -> None:
    hub.repositories[REPO] = Repository(SINGLE, revisions=("main", "v2"))
    online = machine.locate(revision=revision)
    offline = Machine(machine.home, f"http://127.0.0.1:{free_port()}")
    assert offline.locate(revision=revision) == online
    assert offline.locate(revision=revision, HF_HUB_OFFLINE="1") == online


def test_a_dropped_connection_is_resumed_where_it_broke(hub: HubStandIn, machine: Machine) -> None:
    weights = b"".join(i.to_bytes(4, "big") for i in range(3 * 2**20))  # 12 MiB without repetition
    hub.repositories[REPO] = Repository({**SINGLE, "model.safetensors": weights})
    hub.cuts["model.safetensors"] = Cut(after=11 * 2**20)
    assert content_of(machine.locate()["directory"]) == {**SINGLE, "model.safetensors": weights}
    assert hub.ranges("model.safetensors") == [None, f"bytes={DOWNLOAD_CHUNK}-"]


def test_an_interrupted_start_is_completed_by_the_next(hub: HubStandIn, machine: Machine) -> None:
    hub.repositories[REPO] = Repository(SHARDED)
    last = "model-00002-of-00002.safetensors"
    hub.cuts[last] = Cut(after=3, is_reset=True, behind=frozenset(SHARDED) - {last})
    answer = machine.locate()
    assert answer["error"] == "ModelNotFound"
    assert "the Hub cannot be reached (ReadError): check the network" in answer["message"]
    hub.requests.clear()
    assert content_of(machine.locate()["directory"]) == SHARDED
    assert hub.fetched() == [last]


def test_without_a_network_an_interrupted_download_is_not_served(hub: HubStandIn, machine: Machine) -> None:
    hub.repositories[REPO] = Repository(SHARDED)
    hub.cuts["model-00002-of-00002.safetensors"] = Cut(after=3, is_reset=True)
    machine.locate()
    answer = Machine(machine.home, f"http://127.0.0.1:{free_port()}").locate()
    assert answer["error"] == "ModelNotFound"
    assert f"{REPO} is not whole in the local cache" in answer["message"]


def test_a_cache_that_cannot_be_written_is_blamed_and_not_the_network(
    hub: HubStandIn, machine: Machine
) -> None:
    hub.repositories[REPO] = Repository(SINGLE)
    machine.home.write_text("a file where the cache should be")
    answer = machine.locate()
    assert answer["error"] == "ModelNotFound"
    assert answer["message"].startswith(f"{REPO} must be stored in the local cache, that failed (")
    assert answer["message"].endswith("): check disk space and permissions, or set HF_HOME to another folder")


def test_a_failure_of_xet_storage_says_how_to_do_without(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> str:
        raise RuntimeError("Task error: CAS Client Error")  # seen when only the Hub itself can be reached

    monkeypatch.setattr(source, "snapshot_download", fail)
    message = (
        rf"{REPO} must be fetched from the Hub's Xet storage, that failed \(Task error: CAS Client Error\):"
        " check the network, or set HF_HUB_DISABLE_XET=1 to fetch it over plain HTTP"
    )
    with pytest.raises(ModelNotFound, match=message):
        locate(REPO)
