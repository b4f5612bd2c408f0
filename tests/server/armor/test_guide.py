"""What docs/model-armor.md says of options, modes, policies, metrics and headers is what the code has."""

import json
import re
from dataclasses import fields
from pathlib import Path
from typing import get_args

from fake_server import LiveServer, events
from prometheus_client import CollectorRegistry
from scripted_checker import TEMPLATE, ScriptedChecker

from cabochon.server.armor.config import MAY_BE_OPTIONAL, ArmorConfig
from cabochon.server.armor.gate import Gate
from cabochon.server.armor.guard_metrics import GuardMetrics
from cabochon.server.armor.policies import ENTRY, Policies
from cabochon.server.armor.verdicts import Mode, Policy, Reason

GUIDE = (Path(__file__).parents[3] / "docs" / "model-armor.md").read_text()


def section(title: str) -> str:
    _, _, after = GUIDE.partition(f"## {title}\n")
    assert after, title
    return re.split(r"^## ", after, maxsplit=1, flags=re.MULTILINE)[0]


def rows(title: str) -> list[list[str]]:
    """Cells of the lines whose first one is code."""
    lines = re.findall(r"^\| (`.*) \|$", section(title), re.MULTILINE)
    return [[cell.strip() for cell in line.split(" |")] for line in lines]


def words(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


def test_the_table_of_options_is_the_config() -> None:
    shown = {
        words(name)[0]: words(default)[0] if default != "none" else None
        for name, default, _ in map(lambda row: [cell.lstrip("| ") for cell in row], rows("Options"))
    }
    defaults = {field.name: getattr(ArmorConfig(), field.name) for field in fields(ArmorConfig)}
    assert shown == {name: None if value in (None, ()) else str(value) for name, value in defaults.items()}


def test_every_option_that_the_guide_names_exists() -> None:
    names = {field.name for field in fields(ArmorConfig)}
    assert set(re.findall(r"`(armor_\w+)`", GUIDE)) <= names
    flags = {name.replace("-", "_") for name in re.findall(r"--(armor-[a-z-]+)", GUIDE)}
    assert flags <= names
    assert {"armor_endpoint", "armor_prompt_template"} <= flags


def test_every_mode_and_optional_filter_is_in_the_guide() -> None:
    modes = [words(row[0])[0] for row in rows("Modes: when an answer leaves") if len(row) == 4]
    assert modes == list(get_args(Mode))
    (optional,) = [row for row in rows("Options") if "armor_optional_filters" in row[0]]
    assert set(MAY_BE_OPTIONAL) <= set(words(optional[2]))


def test_the_table_of_metrics_is_what_a_scrape_has() -> None:
    registry = CollectorRegistry()
    metrics = GuardMetrics(registry)
    metrics.watch(lambda: 0, lambda: 0, lambda: 0)
    labels = {
        one._name: set(one._labelnames) for one in vars(metrics).values() if hasattr(one, "_labelnames")
    }
    there = {
        family.name + ("_total" if family.type == "counter" else ""): labels.get(family.name, set())
        for family in registry.collect()
    }
    shown = {words(row[0])[0]: set(words(row[1])) for row in rows("Metrics")}
    assert shown == there
    for reason in get_args(Reason):
        assert f"`{reason}`" in section("Metrics")
    named = set(re.findall(r"cabochon:guard_\w+", GUIDE))
    assert named <= shown.keys()


def test_the_policy_file_of_the_guide_is_read(tmp_path: Path) -> None:
    (example,) = re.findall(r"```yaml\n(.*?)```", section("Policies of API keys"), re.DOTALL)
    path = tmp_path / "policies.yaml"
    path.write_text(example)
    config = ArmorConfig(
        armor_prompt_template=TEMPLATE, armor_response_template=TEMPLATE, armor_policy_file=str(path)
    )
    team, batch = (Policies(config).policy_of(f"Bearer {key}") for key in ("sk-team-a", "sk-internal-only"))
    assert (team.mode, team.reveal, team.optional_filters) == ("strict", True, ("malicious_uris",))
    assert (batch.response_template, batch.mode, batch.prompt_template) == (None, "off", TEMPLATE)
    assert set(re.findall(r"^ +(?:- )?(\w+):", example, re.MULTILINE)) == ENTRY


def guarded(policy: Policy) -> LiveServer:
    server = LiveServer()
    server.service.gate = Gate(
        ScriptedChecker(),
        lambda _authorization: policy,
        ArmorConfig(),
        GuardMetrics(CollectorRegistry()),
        server.service.lifecycle.predicted_wait_s,
    )
    return server


def shown_after(command: str) -> str:
    """What the guide shows under a curl with that option."""
    (block,) = re.findall(rf"```console\n\$ {command} (.*?)```", GUIDE, re.DOTALL)
    return str(block.partition("}'\n")[2])


def test_the_blocked_prompt_of_the_guide_is_what_the_server_answers() -> None:
    head, _, body = shown_after("curl -i").partition("\n\n")
    with guarded(Policy(prompt_template=TEMPLATE)) as server:
        answer = server.complete("so bad")
    assert head.startswith(f"HTTP/1.1 {answer.status_code} ")
    assert f"\nx-guardrail: {answer.headers['x-guardrail']}\n" in head
    assert json.loads(body.replace("\n", "")) == answer.json()


def test_the_blocked_stream_of_the_guide_is_what_the_server_answers() -> None:
    event, _, done = shown_after("curl -N").strip().partition("\n\n")
    with guarded(Policy(response_template=TEMPLATE)) as server:
        answer = server.complete("so bad", max_tokens=40, stream=True)
    (said,) = events(answer)
    assert json.loads(event.removeprefix("data: ").replace("\n", ""))["choices"] == said["choices"]
    assert answer.text.endswith(f"{done}\n\n")
    with guarded(Policy(prompt_template=TEMPLATE, reveal=True)) as server:
        inner = server.complete("so bad").json()["error"]["innererror"]
    (revealed,) = re.findall(r'`"content_filter_result":(\{.*?\})`', GUIDE)
    assert json.loads(revealed).popitem()[1] == inner["content_filter_result"].popitem()[1]
