"""A client in a thread that reads one stream to its end, and remembers how it ended."""

import json
import threading

import httpx


class Stream(threading.Thread):
    """Reads one streamed completion to its end."""

    def __init__(self, url: str, num_tokens: int) -> None:
        super().__init__(daemon=True)
        self._url = url
        body = {"prompt": "a", "max_tokens": num_tokens, "stream": True, "ignore_eos": True}
        self._body = {**body, "temperature": 0}
        self.status = 0
        self.events: list[str] = []
        self.error = ""
        self.is_unwanted = False  # the client closes its page
        self.start()

    def run(self) -> None:
        try:
            with httpx.stream("POST", f"{self._url}/v1/completions", json=self._body, timeout=90) as answer:
                self.status = answer.status_code
                for line in answer.iter_lines():
                    self.events += [line] if line else []
                    if self.is_unwanted:
                        return
        except httpx.HTTPError as error:
            self.error = repr(error)

    @property
    def is_whole(self) -> bool:
        return bool(self.events) and self.events[-1] == "data: [DONE]"

    @property
    def error_code(self) -> str | None:
        """Of the last event, or of the whole answer if none was begun."""
        last = self.events[-1].removeprefix("data: ") if self.events else ""
        code: str | None = json.loads(last).get("error", {}).get("code") if last.startswith("{") else None
        return code
