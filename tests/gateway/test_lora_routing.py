"""LoRA affinity through Envoy and the picker, in front of servers that only say they have adapters."""

from collections.abc import Iterator
from contextlib import ExitStack

import pytest
from fake_server import LiveServer, wait_until
from gateway import PROBE_INTERVAL_S, SERVED, Gateway, address
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from tools import need_gateway_tools

pytestmark = pytest.mark.slow

ADAPTERS = ("red", "blue", "green")
WEIGHTS = '{"lora": 3}'  # the default profile has none; a free slot counts for more than an empty queue


class Said:
    """The LoRA line at the end of a server's /metrics; None: it says nothing."""

    def __init__(self) -> None:
        self.line: str | None = None
        self.num_scrapes = 0

    def set(self, running: str = "", waiting: str = "", max_lora: int = 2) -> None:
        labels = f'max_lora="{max_lora}",running_lora_adapters="{running}",waiting_lora_adapters="{waiting}"'
        self.line = f"# TYPE vllm:lora_requests_info gauge\nvllm:lora_requests_info{{{labels}}} 1.795e9\n"
        seen = self.num_scrapes
        wait_until(lambda: self.num_scrapes > seen + 2)  # one may be under way

    def around(self, app: ASGIApp) -> ASGIApp:
        async def saying(scope: Scope, receive: Receive, send: Send) -> None:
            async def more(message: Message) -> None:
                if message["type"] == "http.response.start":
                    kept = [pair for pair in message["headers"] if pair[0] != b"content-length"]
                    message = {**message, "headers": kept}
                elif not message.get("more_body"):
                    message = {**message, "body": message["body"] + (self.line or "").encode()}
                await send(message)

            self.num_scrapes += scope["path"] == "/metrics"
            await app(scope, receive, more if scope["path"] == "/metrics" else send)

        return saying


class Pool:
    """A gateway over three servers and what each says."""

    def __init__(self, gateway: Gateway, servers: list[LiveServer], said: list[Said]) -> None:
        self.said = said
        self._gateway = gateway
        self._order = [address(server.url) for server in servers]
        self._num_prompts = 0

    def served(self, model: str, num: int = 4) -> set[int]:
        """Which servers answer `num` requests for a model, each with a prompt of its own."""
        found = set()
        for _ in range(num):
            self._num_prompts += 1
            body = {"model": model, "prompt": f"{self._num_prompts}", "max_tokens": 1}
            answer = self._gateway.http.post("/v1/completions", json=body)
            assert (answer.status_code, answer.json()["model"]) == (200, model)
            found.add(self._order.index(answer.headers[SERVED]))
        return found


@pytest.fixture
def pool() -> Iterator[Pool]:
    need_gateway_tools()
    with ExitStack() as stack:
        said = [Said() for _ in range(3)]
        servers = [
            stack.enter_context(LiveServer(one.around, served_model_name=("demo", *ADAPTERS))) for one in said
        ]
        urls = [server.url for server in servers]
        options = {"weights": WEIGHTS, "probe_interval_s": PROBE_INTERVAL_S}
        yield Pool(stack.enter_context(Gateway(*urls, **options)), servers, said)


def test_an_adapter_is_asked_for_where_it_runs_then_where_a_slot_is_free(pool: Pool) -> None:
    full, other, roomy = pool.said
    full.set("red,blue")
    other.set("blue,green")
    roomy.set("blue")
    assert pool.served("red") == {0}
    assert pool.served("green") == {1}
    assert pool.served("blue") == {0, 1, 2}
    roomy.set("blue, red")
    assert pool.served("red") == {0, 2}
    full.set("blue", waiting="")
    other.set("blue", waiting="green", max_lora=3)
    roomy.set("red,blue")
    assert pool.served("green") == {0, 1}  # a free slot counts before a place in the queue


def test_with_no_slot_free_an_adapter_waits_where_it_waits_already(pool: Pool) -> None:
    for one in pool.said:
        one.set("red", waiting="blue")
    pool.said[1].set("red", waiting="green")
    assert pool.served("green") == {1}
    assert pool.served("blue") == {0, 2}


def test_the_base_model_and_servers_without_adapters_take_turns(pool: Pool) -> None:
    assert pool.served("demo", 6) == {0, 1, 2}  # nobody says anything of adapters
    for one in pool.said:
        one.set("red")
    assert pool.served("demo", 6) == {0, 1, 2}
