"""A long outage, with budgets and breaker as they are: requests end in time, and pass again soon after it."""

import time

import pytest
from armored_server import ArmoredServer, Heard, small_windows
from fake_server import wait_until


@pytest.mark.slow
def test_while_the_service_is_down_each_request_ends_in_time_and_soon_after_it_all_pass() -> None:
    body = {"prompt": "what is new", "max_tokens": 12, "temperature": 0}
    with Heard() as emulator, ArmoredServer(small_windows(emulator.address, armor_cache_s=0)) as server:
        assert server.exchange(body).status == 200
        for is_hung in (False, True):
            emulator.emulator.set_faults("hang" if is_hung else "unavailable")
            end_s = time.monotonic() + 6  # longer than the breaker's pause
            slowest_s, num_asked, num_calls = 0.0, 0, sum(emulator.emulator.counts.values())
            while time.monotonic() < end_s:
                got = server.exchange(body)
                assert (got.status, got.error["code"]) == (503, "guardrail_unavailable")
                slowest_s, num_asked = max(slowest_s, got.seconds), num_asked + 1
                time.sleep(0.02)
            assert slowest_s < 2
            assert sum(emulator.emulator.counts.values()) - num_calls < min(num_asked, 40)  # the breaker
            server.check_idle()
            emulator.emulator.set_faults()
            wait_until(lambda: server.exchange(body).status == 200, 8)
            assert [server.exchange(body).status for _ in range(5)] == [200] * 5
