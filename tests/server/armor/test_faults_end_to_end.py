"""What can go wrong with Model Armor, at every place of a request: the real client, a real socket."""

import gc
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from armored_server import ArmoredServer, Exchange, Heard, policy_file, read_all, small_windows
from fake_server import wait_until

from cabochon.server.armor import breaker, quota
from cabochon.server.armor.emulator_faults import STATUSES

BUDGET_S = 0.3  # of a call; the whole check has 0.45 s
WORDS = [f"w{number:02}" for number in range(90)]
PLACES = {"first": 1, "middle": 45, "last": 89}  # of the struck word in prompt and answer
POLICIES = ("closed", "open")
UNCHECKED = (
    "slow latency=0.4",
    "hang",
    "malformed",
    "empty",
    "partial",
    "partial filter=csam",
    "failure",
    "missing",
    "missing filter=rai",
    "unknown_enum",
    "unknown_filter",
    *STATUSES,
)
OF_THE_CONNECTION = ("reset", "goaway")  # they end other calls as well
Bodies = dict[str, tuple[dict[str, Any], str]]
STRUCK, REFUSED = "struck", "refused"  # words that a fault looks for, in an answer and in a prompt


@pytest.fixture(scope="module")
def emulator() -> Iterator[Heard]:
    with Heard() as thread:
        yield thread


@pytest.fixture(scope="module")
def server(emulator: Heard, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ArmoredServer]:
    """Its breaker never opens, and it keeps no verdict, so that each request meets its own fault."""
    path = tmp_path_factory.mktemp("policies") / "policies.yaml"
    nothing = {"prompt_template": None, "response_template": None}
    config = small_windows(
        emulator.address,
        armor_policy_file=policy_file(path, open={"on_unchecked": "open"}, unguarded=nothing),
        armor_prompt_timeout_s=BUDGET_S,
        armor_window_timeout_s=BUDGET_S,
        armor_total_timeout_s=1.5 * BUDGET_S,
        armor_cache_s=0,
        armor_quota_per_min=10**8,
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(breaker, "IN_A_ROW", 10**9)
        patch.setattr(breaker, "MIN_CALLS", 10**9)
        patch.setattr(quota, "RESERVE", 0)  # or answers would wait for calls 2 s after one RESOURCE_EXHAUSTED
        gc.collect()
        gc.freeze()  # as a server does: in a process full of tests a collection would outlast a budget
        with ArmoredServer(config) as live:
            yield live
        gc.unfreeze()


@pytest.fixture(scope="module")
def bodies(server: ArmoredServer) -> Bodies:
    """For each place of a fault a body, and the whole answer to it."""
    return {place: request_for(server, place) for place in ("prompt", *PLACES)}


@pytest.fixture(autouse=True)
def fresh(emulator: Heard) -> Iterator[None]:
    emulator.forget()
    yield
    emulator.emulator.set_faults()


def request_for(server: ArmoredServer, place: str) -> tuple[dict[str, Any], str]:
    """A body with the word of a fault at that place, and the whole answer, whose words all differ."""
    words = list(WORDS)
    if place == "prompt":
        words[45] = REFUSED
    else:
        words[PLACES[place]] = STRUCK
    body = {"prompt": " ".join(words), "temperature": 0}
    num_tokens = len(server.post("/tokenize", {"prompt": body["prompt"]}).json()["tokens"])
    whole = server.exchange({**body, "max_tokens": num_tokens}, key="unguarded").text
    assert whole.split() == words
    return {**body, "max_tokens": num_tokens, "stream": True}, whole


def strike(emulator: Heard, fault: str) -> None:
    emulator.emulator.set_faults(
        f"{fault} stage=response containing={STRUCK}", f"{fault} stage=prompt containing={REFUSED}"
    )


def check_approved(got: Exchange, whole: str, approved: list[str]) -> int:
    """No byte of the answer on the socket that no check has approved. Returns how much has been."""
    end = max((whole.find(text) + len(text) for text in approved if text in whole), default=0)
    assert whole[:end].startswith(got.text)
    for word in whole[end:].split()[1:]:  # the first one may be cut
        assert word.encode() not in got.raw
    return end


def check_outage(got: Exchange, whole: str, place: str, approved: list[str]) -> None:
    assert got.error["code"] == "guardrail_unavailable"
    if place in ("prompt", "first"):
        assert (got.status, got.text) == (503, "")
        assert int(got.header("retry-after") or 0) > 0
    else:
        assert got.status == 200
        assert None not in got.events  # no [DONE]
        assert STRUCK not in got.text
        assert len(got.text) < len(whole)
    if place != "prompt":  # nobody has asked about its answer, or not in vain
        check_approved(got, whole, approved)


def run_all(
    server: ArmoredServer, bodies: Bodies, *, together: bool
) -> dict[tuple[str, str], tuple[Exchange, str]]:
    """A request for each place and policy: what came, and the whole answer."""
    cases = [(place, policy) for place in ("prompt", *PLACES) for policy in POLICIES]
    found: dict[tuple[str, str], tuple[Exchange, str]] = {}

    def ask(place: str, policy: str) -> None:
        body, whole = bodies[place]
        found[place, policy] = server.exchange(body, key=policy), whole

    threads = [threading.Thread(target=ask, args=case) for case in cases]
    for thread in threads:
        thread.start()
        if not together:
            thread.join()
    for thread in threads:
        thread.join()
    assert len(found) == len(cases)
    return found


@pytest.mark.parametrize("fault", [*UNCHECKED, "reset", "goaway"])
def test_without_a_verdict_nothing_passes_or_all_does_as_the_policy_says(
    server: ArmoredServer, emulator: Heard, bodies: Bodies, fault: str
) -> None:
    strike(emulator, fault)
    found = run_all(server, bodies, together=fault not in OF_THE_CONNECTION)
    approved = emulator.passed("response")
    for (place, policy), (got, whole) in found.items():
        assert got.seconds < (2 if policy == "closed" else 10)
        if policy == "open":
            assert (got.status, got.text, got.events[-1]) == (200, whole, None)
        else:
            check_outage(got, whole, place, approved)
    server.check_idle()


def test_a_verdict_that_is_late_but_in_time_changes_no_answer(
    server: ArmoredServer, emulator: Heard, bodies: Bodies
) -> None:
    strike(emulator, "slow latency=0.05")
    found = run_all(server, bodies, together=False)
    approved = emulator.passed("response")
    for got, whole in found.values():
        assert (got.status, got.text, got.events[-1]) == (200, whole, None)
        assert check_approved(got, whole, approved) == len(whole)
    server.check_idle()


@pytest.mark.parametrize("place", ["middle", "last"])
def test_a_connection_that_the_service_drains_changes_no_answer(
    server: ArmoredServer, emulator: Heard, bodies: Bodies, place: str
) -> None:
    strike(emulator, "drain")
    body, whole = bodies[place]
    got = server.exchange(body)
    assert (got.status, got.text, got.events[-1]) == (200, whole, None)
    assert "drain" in {call.fault for call in emulator.emulator.calls}
    assert check_approved(got, whole, emulator.passed("response")) == len(whole)


@pytest.mark.parametrize("fault", ["unavailable", *OF_THE_CONNECTION])
@pytest.mark.parametrize("place", ["prompt", *PLACES])
def test_one_call_that_does_not_arrive_is_made_again(
    server: ArmoredServer, emulator: Heard, bodies: Bodies, place: str, fault: str
) -> None:
    emulator.emulator.set_faults(
        f"{fault} containing={REFUSED} times=1",
        f"{fault} containing={STRUCK} times=1 stage=response",
    )
    body, whole = bodies[place]
    got = server.exchange(body)
    assert got.seconds < 2
    if fault in OF_THE_CONNECTION and (got.status, got.text) != (200, whole):
        # The second call may find the channel still between two connections: refused, and nothing let through
        check_approved(got, whole, emulator.passed("response"))
        got = server.exchange(body)
    assert (got.status, got.text, got.events[-1]) == (200, whole, None)


@pytest.mark.parametrize("policy", POLICIES)
def test_a_service_that_is_gone_and_comes_back_in_mid_answer(
    server: ArmoredServer, emulator: Heard, bodies: Bodies, policy: str
) -> None:
    body, whole = bodies["first"]
    server.faults.is_paused = True
    with server.open_post({**body, "stream": True}, key=policy) as sock:
        wait_until(lambda: server.engine.open)
        emulator.run(emulator.emulator.refuse())
        server.faults.is_paused = False
        got = read_all(sock)
    emulator.run(emulator.emulator.listen())
    if policy == "open":
        assert (got.status, got.text, got.events[-1]) == (200, whole, None)
    else:
        assert got.error["code"] == "guardrail_unavailable"
        assert got.text == ""
    wait_until(lambda: server.exchange(body).text == whole)  # connected again
    server.check_idle()


def test_a_flapping_service_never_lets_through_what_it_has_not_approved(
    server: ArmoredServer, emulator: Heard, bodies: Bodies
) -> None:
    emulator.emulator.set_faults("unavailable probability=0.4", "partial stage=response probability=0.1")
    (body, whole), ends = bodies["middle"], set()
    for _ in range(12):
        got = server.exchange(body)
        ends.add(got.error["code"] if got.events[-1:] != [None] else "whole")
        check_approved(got, whole, emulator.passed("response"))
        assert got.seconds < 2
        assert server.exchange(body, key="open").text == whole
    assert ends <= {"whole", "guardrail_unavailable"}
    emulator.emulator.set_faults()
    assert server.exchange(body).text == whole
    server.check_idle()
