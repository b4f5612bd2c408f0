"""`cabochon armor-emulator` as a process and its control port, options, and what it says of wrong ones."""

import asyncio
import builtins
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from armor_world import connected, running_emulator
from google.api_core import exceptions
from google.cloud import modelarmor_v1 as armor

from cabochon.engine.errors import ConfigError
from cabochon.server import cli
from cabochon.server.armor.config import ArmorConfig
from cabochon.server.armor.emulator_command import EmulatorOptions, read_emulator_options, run_emulator
from cabochon.server.armor.emulator_control import serve_control
from cabochon.server.armor.emulator_faults import Fault, Latency
from cabochon.server.armor.emulator_templates import parse_template

NAME = "projects/p/locations/eu/templates/"
CANARY = "canary@x.com"


class Process:
    """The command as a child, until the context ends."""

    def __init__(self, *args: str) -> None:
        command = [sys.executable, "-m", "cabochon.server.cli", "armor-emulator", "--port=0", *args]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True)

    def __enter__(self) -> "Process":
        assert self.process.stdout is not None
        self.lines = []
        for line in self.process.stdout:
            self.lines.append(line.strip())
            if line.startswith("cabochon serve"):
                break
        options = shlex.split(self.lines[-1])[2:]
        assert options[2] == "--armor-insecure"
        self.options = {options[0]: options[1], options[3]: options[4], options[5]: options[6]}
        self.address = self.options["--armor-endpoint"]
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.communicate()

    def end(self, number: int) -> tuple[int, str, str]:
        """Exit code, further stdout, stderr."""
        self.process.send_signal(number)
        out, err = self.process.communicate(timeout=20)
        return self.process.returncode, out, err


@pytest.fixture(scope="module")
def running() -> Iterator[Process]:
    with Process("--control-port=0", f"--template={NAME}a:deidentify", f"--template={NAME}b") as process:
        yield process


def ask(process: Process, text: str, timeout_s: float = 5) -> armor.SanitizationResult:
    async def run() -> armor.SanitizationResult:
        async with connected(process.address) as client:
            name = process.options["--armor-prompt-template"]
            request = armor.SanitizeUserPromptRequest(name=name, user_prompt_data=armor.DataItem(text=text))
            reply = await client.sanitize_user_prompt(request, retry=None, timeout=timeout_s)
            return reply.sanitization_result

    return asyncio.run(run())


def test_the_line_it_prints_is_what_the_server_is_given(running: Process) -> None:
    assert running.options == {
        "--armor-endpoint": running.address,
        "--armor-prompt-template": f"{NAME}a",
        "--armor-response-template": f"{NAME}b",
    }
    assert running.address.startswith("127.0.0.1:")
    sdp = ask(running, f"mail {CANARY}").filter_results["sdp"].sdp_filter_result
    assert sdp.deidentify_result.data.text == "mail [EMAIL_ADDRESS]"


def test_a_process_is_told_of_faults_over_http(running: Process) -> None:
    with httpx.Client(base_url=running.lines[0].split()[-1], timeout=10, verify=False) as http:
        http.delete("/calls")
        state = http.put("/faults", json=["unavailable times=1"]).json()
        assert state["faults"][0]["kind"] == "unavailable"
        with pytest.raises(exceptions.ServiceUnavailable):
            ask(running, CANARY)
        ask(running, CANARY)
        state = http.get("/").json()
        assert state["address"] == running.address
        assert state["counts"] == {"SanitizeUserPrompt": 2}
        assert (state["in_flight"], state["peak_in_flight"], state["faults"][0]["struck"]) == (0, 1, 1)
        calls = http.get("/calls")
        assert [call["result"] for call in calls.json()] == ["unavailable", "ok"]
        assert [call["num_chars"] for call in calls.json()] == [len(CANARY)] * 2
        assert CANARY not in calls.text


def test_a_signal_ends_it_though_calls_hang() -> None:
    with Process("--fault=hang") as process:
        assert process.options["--armor-prompt-template"] == "projects/demo/locations/local/templates/prompt"
        with pytest.raises(exceptions.DeadlineExceeded):
            ask(process, CANARY, timeout_s=0.1)
        assert process.end(signal.SIGTERM) == (0, "", "")


def control(work: Any) -> None:
    """work: gets an emulator and a client of its control port."""

    async def run() -> None:
        async with (
            running_emulator() as emulator,
            serve_control(emulator, "127.0.0.1", 0) as port,
            httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=10, verify=False) as http,
        ):
            await work(emulator, http)

    asyncio.run(run())


def test_latency_and_listening_are_changed_over_http() -> None:
    async def work(emulator: Any, http: httpx.AsyncClient) -> None:
        for given, shown in [
            (0.25, "0.25"),
            ("lognormal:median=0.1,p99=0.5", "lognormal:median=0.1,p99=0.5"),
        ]:
            assert (await http.put("/latency", json=given)).json()["latency"] == shown
            assert str(emulator.latency) == shown
        for is_listening in (False, True):
            answer = await http.put("/listening", json=is_listening)
            assert answer.json()["is_listening"] is emulator.is_listening is is_listening
        assert (await http.delete("/calls")).status_code == 204

    control(work)


@pytest.mark.parametrize(
    ("path", "body", "said"),
    [
        ("/faults", b'["explode"]', "kind of a fault must be one of"),
        ("/faults", b'"hang"', "the body must be a list"),
        ("/faults", b"[", "the body must be a list"),
        ("/faults", b"\xff", "the body must be a list"),
        ("/latency", b"-1", "latency must be in [0, 3600] s"),
        ("/latency", b"[]", "the body must be seconds"),
        ("/listening", b"1", "the body must be true or false"),
    ],
)
def test_a_wrong_body_changes_nothing(path: str, body: bytes, said: str) -> None:
    async def work(emulator: Any, http: httpx.AsyncClient) -> None:
        before = emulator.state()
        answer = await http.put(path, content=body)
        assert answer.status_code == 400
        assert said in answer.json()["error"]
        assert emulator.state() == before

    control(work)


def test_options_are_read(tmp_path: Path) -> None:
    assert read_emulator_options([]) == EmulatorOptions()
    (tmp_path / "t.yaml").write_text(f"{NAME}c: [rai]")
    options = read_emulator_options([
        "--host=::1", "--port=1", "--control-port=2", "--latency=0.25", "--seed=7",
        f"--template={NAME}a:sdp", f"--template-file={tmp_path}/t.yaml",
        "--fault", "hang times=1", "--fault", "slow latency=2 probability=0.01",
    ])  # fmt: skip
    assert options == EmulatorOptions(
        host="::1", port=1, control_port=2, latency=Latency(median_s=0.25), seed=7,
        templates=(parse_template(f"{NAME}a:sdp"), parse_template(f"{NAME}c:rai")),
        faults=(
            Fault(kind="hang", times=1),
            Fault(kind="slow", latency=Latency(median_s=2), probability=0.01),
        ),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--port=65536"], "port must be in [0, 65535], got 65536"),
        (["--control-port=-1"], "control_port must be in [0, 65535], got -1"),
        (["--latency=soon"], "latency must be seconds"),
        (["--fault=explode"], "kind of a fault must be one of"),
        (["--template=t"], "a template must be"),
        (["--template-file=/nonexistent"], "template_file must be a YAML file"),
        (["--template=*", "--template=*", "--port=0"], "templates must differ in name"),
        (["--host=256.0.0.1"], "host must be an address of this machine"),
    ],
)
def test_wrong_options_exit_with_2(
    args: list[str], said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["cabochon", "armor-emulator", *args])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert caught.value.code == 2
    assert said in capsys.readouterr().err


def test_without_the_extra_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def no_grpc(name: str, *args: Any, **options: Any) -> Any:
        if name == "cabochon.server.armor.emulator":
            raise ModuleNotFoundError("No module named 'grpc'", name="grpc")
        return real(name, *args, **options)

    monkeypatch.setattr(builtins, "__import__", no_grpc)
    with pytest.raises(ConfigError, match=r"needs Model Armor's packages, grpc is not .*'cabochon\[armor\]'"):
        asyncio.run(run_emulator(EmulatorOptions(), print))


@pytest.mark.parametrize(
    ("host", "templates", "name", "number"),
    [
        ("0.0.0.0", ("*",), "projects/demo/locations/local/templates/prompt", signal.SIGTERM),
        ("127.0.0.1", ("*:sdp", f"{NAME}a"), f"{NAME}a", signal.SIGINT),
    ],
)
def test_the_endpoint_is_one_to_connect_to_and_templates_are_ones_it_knows(
    host: str, templates: tuple[str, ...], name: str, number: int
) -> None:
    lines: list[str] = []

    async def run() -> int:
        options = EmulatorOptions(host=host, port=0, templates=tuple(map(parse_template, templates)))

        def tell(line: str) -> None:
            lines.append(line)
            signal.raise_signal(number)

        return await run_emulator(options, tell)

    assert asyncio.run(run()) == 0
    words = shlex.split(lines[0])
    assert words[:3] == ["cabochon", "serve", "--armor-endpoint"]
    assert words[3].rpartition(":")[0] == "127.0.0.1"
    assert words[6] == name
    ArmorConfig(armor_prompt_template=words[6], armor_response_template=words[8])
