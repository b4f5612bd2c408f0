"""The page with answers of the demo, as a picture: python tests/screenshot.py docs/images/ui.png

Needs `make system-packages`. The rates in it are this machine's.
"""

import os
import sys
from pathlib import Path

from browser import Browser, Keys, open_browser
from fake_server import wait_until
from real_server import RealServer

WIDTH, HEIGHT = 1200, 700  # pixels
SEED = "7"
PROMPTS = ("The capital of France is", "A cabochon is a gemstone that")


def main() -> None:
    """Two texts: one is whole, one is being written."""
    path = Path(sys.argv[1])
    with RealServer("demo", threads=os.cpu_count()) as server, open_browser() as browser:
        browser.open(f"{server.url}/", width=WIDTH, height=HEIGHT, prefers_color_scheme="light")
        browser.wait_for("#context", "Up to")
        browser.tab_to("max_tokens", back=True)
        browser.type("64")
        browser.tab_to("seed")
        browser.type(SEED)
        browser.tab_to("prompt")
        for index, prompt in enumerate(PROMPTS):
            browser.type(prompt, Keys.ENTER)
            wait_until(lambda: len(browser.all(".said")) == index + 1)  # noqa: B023  # called at once
            if index < len(PROMPTS) - 1:
                browser.wait_for(".stats", "at max", 60)
        _wait_until_seen_running(browser)
        path.write_bytes(browser.picture())


def _wait_until_seen_running(browser: Browser) -> None:
    wait_until(lambda: len(browser.text(".said").split()) > 25, 60)
    wait_until(lambda: browser.text("#running") == "1")


if __name__ == "__main__":
    main()
