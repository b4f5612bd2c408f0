"""`cabochon gateway-check URL...`: would the GKE Inference Gateway get on with this model server?

Any server may be asked: nothing here knows Cabochon. docs/gateway.md says what each check means; the modules
of `gateway/` that parse and score are also what the picker of our tests runs on.
"""

import argparse
import asyncio
import json
import os
import time
from collections.abc import Callable, Coroutine, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from cabochon.engine.errors import ConfigError
from cabochon.server.gateway.answer_checks import check_answers, check_models, check_prefix
from cabochon.server.gateway.drain_checks import check_drain
from cabochon.server.gateway.finding import OK, Finding, Result, judge
from cabochon.server.gateway.http_client import Connection, HttpFailure, Target, ask, parse_url
from cabochon.server.gateway.load_checks import check_disconnect, check_load
from cabochon.server.gateway.lora_checks import check_lora
from cabochon.server.gateway.metrics_checks import check_metrics
from cabochon.server.gateway.subject import HEALTH, MODELS, Subject, find_subject, listed_models, read_metrics

GROUP_S = 8.0  # for a group of checks, beside the load itself
BUDGET_S = 50.0  # for all of them, beside load and drain
DRAIN_GROUP_S = 45.0
MAX_SECONDS = 600.0
MAX_CELL_CHARS = 100
MAX_CONCURRENCY = 512  # each is an open file here


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What the command was told."""

    targets: tuple[Target, ...]
    model: str | None = None
    concurrency: int = 8
    seconds: float = 8.0
    drain_pid: int | None = None
    is_json: bool = False


@dataclass(slots=True)
class Report:
    """All findings about one server."""

    url: str
    model: str | None = None
    seconds: float = 0.0  # that the checks took
    findings: list[Finding] = field(default_factory=list)

    def count(self, result: Result) -> int:
        """Findings of that kind."""
        return sum(finding.result is result for finding in self.findings)


def read_options(args: Sequence[str]) -> Options:
    """Ends the process on wrong usage, as argparse does. Raises ConfigError on a bad value."""
    parser = argparse.ArgumentParser(
        prog="cabochon gateway-check",
        description="What the Inference Gateway's endpoint picker needs of a model server, checked from"
        " outside. Takes less than a minute for each URL; exit code 1 if a check fails.",
    )
    add = parser.add_argument
    add("urls", nargs="+", metavar="URL", help="of a server itself, not of a gateway: http://HOST:PORT")
    add("--model", help="the model to ask (default: the first of /v1/models)")
    add("--api-key-file", type=Path, help="file whose first line is a key")
    add("--concurrency", type=int, default=8, help="streams at once while /metrics is timed (default: 8)")
    add("--seconds", type=float, default=8.0, help="how long they run (default: 8)")
    add("--drain-pid", type=int, help="a process to end by SIGTERM, for the checks of an orderly end")
    add("--json", action="store_true", help="a JSON object instead of tables")
    given = parser.parse_args(args)
    if not 1 <= given.concurrency <= MAX_CONCURRENCY:
        raise ConfigError(
            f"concurrency must be in [1, {MAX_CONCURRENCY}], got {given.concurrency}: change it"
        )
    if not 1 <= given.seconds <= MAX_SECONDS:
        raise ConfigError(f"seconds must be in [1, {MAX_SECONDS:g}], got {given.seconds:g}: change it")
    if given.drain_pid is not None and len(given.urls) > 1:
        raise ConfigError(f"drain_pid must belong to one URL, got {len(given.urls)}: check them one by one")
    if given.drain_pid is not None:
        _check_process(given.drain_pid)
    key = _first_line(given.api_key_file) if given.api_key_file else None
    return Options(
        targets=tuple(parse_url(url, key) for url in given.urls),
        model=given.model,
        concurrency=given.concurrency,
        seconds=given.seconds,
        drain_pid=given.drain_pid,
        is_json=given.json,
    )


async def check_servers(options: Options, tell: Callable[[str], None]) -> list[Report]:
    """A report for each server, one after the other. tell: gets a line before each, for people."""
    reports = []
    at_most_s = BUDGET_S + options.seconds + (DRAIN_GROUP_S if options.drain_pid is not None else 0)
    for target in options.targets:
        tell(f"checking {target.url}, at most {at_most_s:.0f} s")
        reports.append(await check_server(target, options))
    if len(reports) > 1:
        reports[-1].findings.append(await _same_models(options.targets))
    return reports


async def check_server(target: Target, options: Options) -> Report:
    """Every check of one server; what goes wrong in a group is a finding of that group."""
    report = Report(target.url)
    start_s = time.monotonic()
    end_s = start_s + BUDGET_S + options.seconds

    async def group(name: str, checks: Coroutine[Any, Any, list[Finding]], limit_s: float = GROUP_S) -> None:
        left_s = max(0.0, end_s - time.monotonic())
        report.findings += await _guarded(name, checks, min(limit_s, left_s))

    await group("health", _health(target))
    await group("metrics", check_metrics(target))
    subject = await _find(target, options, report)
    if subject is not None:
        report.model = subject.model
        await group("model", check_models(subject))
        await group("answer", check_answers(subject))
        await group("prefix", _prefix(subject))
        await group("load", check_load(subject), subject.seconds + GROUP_S)
        await group("client", check_disconnect(subject))
        await group("lora", check_lora(subject))
        if options.drain_pid is not None:
            report.findings += await _guarded("drain", check_drain(subject, options.drain_pid), DRAIN_GROUP_S)
    report.seconds = round(time.monotonic() - start_s, 1)
    return report


def as_table(report: Report) -> str:
    """Rows for a terminal; below each that did not pass, what to do."""
    cells = [("check", "result", "measured", "limit")]
    cells += [(row.check, _SHOWN[row.result], _cell(row.measured), row.limit) for row in report.findings]
    widths = [max(len(row[column]) for row in cells) for column in range(3)]
    lines = [f"{report.url}  model {_cell(report.model or 'unknown')}  {report.seconds:g} s"]
    for number, row in enumerate(cells):
        padded = [cell.ljust(width) for cell, width in zip(row, widths, strict=False)]
        lines.append("  ".join([*padded, row[3]]))
        if number and (advice := report.findings[number - 1].advice):
            lines.append(f"    → {advice}")
    counts = [f"{report.count(result)} {word}" for result, word in _WORDS.items() if report.count(result)]
    return "\n".join([*lines, ", ".join(counts)])


def _cell(text: str) -> str:
    """Servers choose names and headers: nothing in them moves a cursor or fills a screen."""
    shown = "".join(char if char.isprintable() else "?" for char in text)
    return shown if len(shown) <= MAX_CELL_CHARS else f"{shown[: MAX_CELL_CHARS - 1]}…"


_SHOWN = {result: "FAIL" if result is Result.FAIL else result.value for result in Result}
_WORDS = {Result.PASS: "passed", Result.WARN: "warnings", Result.FAIL: "failed", Result.SKIP: "skipped"}


def as_json(reports: Sequence[Report]) -> str:
    """One object: `servers`, each with its `findings`, and `failed`, how many did in all."""
    failed = sum(report.count(Result.FAIL) for report in reports)
    return json.dumps(
        {"failed": failed, "servers": [asdict(report) for report in reports]}, indent=1, ensure_ascii=False
    )


async def _guarded(name: str, checks: Coroutine[Any, Any, list[Finding]], limit_s: float) -> list[Finding]:
    try:
        if limit_s == 0:  # a connection must not be begun only to be cancelled
            checks.close()
            raise TimeoutError
        async with asyncio.timeout(limit_s):
            return await checks
    except HttpFailure as error:
        what = str(error)
    except TimeoutError:
        what = f"no end within {limit_s:.2g} s"
    advice = "see the URL and the server's log: these checks could not be finished"
    limit = f"answers within {limit_s:.2g} s"
    return [judge(f"{name}.reached", False, measured=what, limit=limit, advice=advice)]


async def _find(target: Target, options: Options, report: Report) -> Subject | None:
    """None, and a finding, if there is no model to ask."""
    found: list[Subject | str] = []

    async def find() -> list[Finding]:
        found.append(await find_subject(target, options.model, options.concurrency, options.seconds))
        return []

    report.findings += await _guarded("model", find(), GROUP_S)
    if found and isinstance(found[0], Subject):
        return found[0]
    if found:
        advice = f"serve {MODELS} in OpenAI's shape, or name a model with --model"
        limit = "a model to ask"
        report.findings.append(
            judge("model.listed", False, measured=str(found[0]), limit=limit, advice=advice)
        )
    return None


async def _health(target: Target) -> list[Finding]:
    status = (await ask(target, "GET", HEALTH, with_key=False)).status
    advice = "answer 200 without a key while requests should come, else 503: load balancers probe it"
    return [
        judge("health.ready", status == OK, measured=str(status), limit="200 without a key", advice=advice)
    ]


async def _prefix(subject: Subject) -> list[Finding]:
    page_tokens = 0
    with suppress(HttpFailure):
        async with Connection(subject.target) as scraper:
            page_tokens = (await read_metrics(scraper)).page_tokens
    return await check_prefix(subject, page_tokens)


async def _same_models(targets: Sequence[Target]) -> Finding:
    """A request without a body goes to any replica."""
    lists = []
    for target in targets:
        try:
            async with asyncio.timeout(GROUP_S):
                body = (await ask(target, "GET", MODELS)).json()
            lists.append({entry["id"] for entry in listed_models(body)})
        except (HttpFailure, TimeoutError):
            lists.append(set())
    different = sorted(set.union(*lists) - set.intersection(*lists))
    return judge(
        "pool.models",
        not different and bool(lists[0]),
        measured=f"{different[0]} is not everywhere" if different else f"{len(lists[0])} on each",
        limit="the same on every server",
        advice="serve the same names everywhere: the picker does not know who has which model",
    )


def _check_process(pid: int) -> None:
    """0 and below are groups of processes."""
    try:
        if pid > 0:
            os.kill(pid, 0)
            return
    except OSError:
        pass
    raise ConfigError(f"drain_pid must be a process that may be ended, {pid} is none: see `ps`")


def _first_line(path: Path) -> str:
    try:
        lines = path.read_text().split()
    except OSError as error:
        raise ConfigError(f"api_key_file must be a file with a key: {error}: write it") from None
    if not lines:
        raise ConfigError(f"api_key_file must have a key, {path} has none: add one")
    return lines[0]
