"""Completions as clients of a gateway ask for them, and who has answered."""

from collections.abc import Iterable, Sequence
from itertools import count
from typing import Any, Protocol

import openai
from fake_server import wait_until
from gateway import SERVED, Gateway, address

NAME = "demo"
PREFIX = (
    "Each replica keeps the pages of what it has read. " * 12
)  # two whole chunks of the picker's, and more
LONG: dict[str, Any] = {"max_tokens": 800, "extra_body": {"ignore_eos": True}}  # seconds
STALE_S = 0.4  # the picker's threshold and what a busy machine adds
NUMBERS = count()


class Server(Protocol):
    """Whoever it is that answers there."""

    @property
    def url(self) -> str: ...


def complete(client: openai.OpenAI, prompt: str | None = None, **fields: Any) -> Any:
    """Greedy, of a prompt that nobody has seen if none is given."""
    prompt = f"{next(NUMBERS)} is a number" if prompt is None else prompt
    given = {"model": NAME, "max_tokens": 1, "temperature": 0, **fields}
    return client.completions.create(prompt=prompt, **given)


def server_of(client: openai.OpenAI, prompt: str | None = None, **fields: Any) -> str:
    """The address that answered a short request."""
    prompt = f"{next(NUMBERS)} is a number" if prompt is None else prompt
    given = {"model": NAME, "max_tokens": 1, "temperature": 0, **fields}
    raw = client.completions.with_raw_response.create(prompt=prompt, **given)
    assert raw.parse().choices[0].finish_reason is not None
    return str(raw.headers[SERVED])


def addresses(servers: Iterable[Server]) -> list[str]:
    return [address(server.url) for server in servers]


def text_of(stream: Any) -> str:
    return "".join(chunk.choices[0].text for chunk in stream if chunk.choices)


def wait_until_seen(gateway: Gateway, *servers: Server) -> None:
    """Until the picker sends requests to these and to no others; before that it may refuse them."""
    wanted = set(addresses(servers))

    def seen() -> bool:
        try:
            return {server_of(client) for _ in servers} == wanted
        except openai.InternalServerError as error:
            if error.status_code != 503:
                raise
            return False  # not one of them has been scraped yet, or lately enough

    with gateway.client() as client:
        wait_until(seen, 10)


def with_prefix_on(gateway: Gateway, client: openai.OpenAI, server: Server, others: Sequence[Server]) -> None:
    """From now on requests that begin with PREFIX go to that server, as long as it gets any."""
    gateway.set_pool(server.url)
    wait_until_seen(gateway, server)
    complete(client, PREFIX)
    gateway.set_pool(server.url, *(other.url for other in others))
    wait_until_seen(gateway, server, *others)
    assert {server_of(client, PREFIX) for _ in range(3)} == {address(server.url)}
