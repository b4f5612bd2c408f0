"""The page with answers of the demo, as a picture: python tests/screenshot.py docs/images/ui.png

Needs `make system-packages`. The rates in it are this machine's, on one thread, with two others being served.
"""

import sys
from contextlib import ExitStack
from pathlib import Path

from browser import Keys, open_browser
from fake_server import wait_until
from real_server import RealServer

WIDTH, HEIGHT = 1200, 640  # pixels
SEED = "3"
PROMPTS = ("The capital of France is", "A cabochon is a gemstone that")
OTHERS = ("Pearls are found in the sea. " * 60, "Amber was a resin once. " * 60)  # what the gauges show


def main() -> None:
    """One text is whole, one is being written."""
    with ExitStack() as stack:
        server = stack.enter_context(RealServer("demo", kv_cache_gib=0.1))
        browser = stack.enter_context(open_browser())
        for prompt in OTHERS:
            body = {"prompt": prompt, "max_tokens": 500, "ignore_eos": True, "stream": True}
            stack.enter_context(server.http.stream("POST", "/v1/completions", json=body))
        browser.open(f"{server.url}/", width=WIDTH, height=HEIGHT, prefers_color_scheme="light")
        browser.wait_for("#context", "Up to")
        browser.tab_to("max_tokens", back=True)
        browser.type("64")  # what was there is selected
        browser.tab_to("seed")
        browser.type(SEED)
        browser.tab_to("prompt")
        browser.type(PROMPTS[0], Keys.ENTER)
        browser.wait_for(".stats", "at max tokens", 60)
        browser.type(PROMPTS[1], Keys.ENTER)
        browser.wait_for(".text", PROMPTS[1])
        wait_until(lambda: len(browser.text(".said").split()) > 25, 60)
        Path(sys.argv[1]).write_bytes(browser.picture())


if __name__ == "__main__":
    main()
