"""Headless Chromium, driven by keys as a person would. It finds no host but this machine."""

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from fake_server import wait_until
from selenium.webdriver import Chrome, ChromeOptions, Keys
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.remote.webelement import WebElement
from tools import need_program

FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--lang=en",
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
)  # fmt: skip


class Browser:
    """One window on one page, and all that it asked for."""

    def __init__(self, driver: Chrome) -> None:
        self.driver = driver
        self.requests: list[str] = []
        self.complaints: list[str] = []

    def open(self, url: str, *, width: int = 1280, height: int = 800, scale: float = 1, **media: str) -> None:
        """media: features of CSS by name, e.g. prefers_color_scheme="dark"."""
        size = {"width": width, "height": height, "deviceScaleFactor": scale, "mobile": width < 600}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        features = [{"name": name.replace("_", "-"), "value": value} for name, value in media.items()]
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
        self.driver.get(url)

    def type(self, *keys: str) -> None:
        """To whatever has the focus."""
        ActionChains(self.driver, duration=0).send_keys(*keys).perform()

    def type_with_shift(self, key: str) -> None:
        """One key while Shift is held."""
        ActionChains(self.driver, duration=0).key_down(Keys.SHIFT).send_keys(key).key_up(Keys.SHIFT).perform()

    def tab_to(self, element_id: str, *, back: bool = False) -> None:
        """By Tab alone, or Shift and Tab. Fails if a whole round does not meet it."""
        press = self.type_with_shift if back else self.type
        for _ in range(40):
            if self.focus() == element_id:
                return
            press(Keys.TAB)
        raise AssertionError(f"Tab does not reach {element_id}")

    def focus(self) -> str:
        """Id of the element that has the focus."""
        return str(self.driver.switch_to.active_element.get_attribute("id"))

    def find(self, selector: str) -> WebElement:
        return self.driver.find_element(By.CSS_SELECTOR, selector)

    def all(self, selector: str) -> list[WebElement]:
        return self.driver.find_elements(By.CSS_SELECTOR, selector)

    def text(self, selector: str) -> str:
        """Of the last match, as it is in the document; empty if there is none."""
        code = "return [...document.querySelectorAll(arguments[0])].at(-1)?.textContent ?? ''"
        return str(self.driver.execute_script(code, selector))

    def wait_for(self, selector: str, part: str, timeout_s: float = 10) -> str:
        """The text of the last match as soon as `part` is in it."""
        wait_until(lambda: part in self.text(selector), timeout_s)
        return self.text(selector)

    def read_logs(self) -> None:
        """Take what was logged since: URLs into requests; errors and warnings into complaints."""
        for entry in self.driver.get_log("performance"):
            message: dict[str, Any] = json.loads(entry["message"])["message"]
            sent = message["params"] if message["method"] == "Network.requestWillBeSent" else None
            if sent and not sent["documentURL"].startswith("chrome:"):  # the browser's own first tab
                self.requests.append(sent["request"]["url"])
        self.complaints += [entry["message"] for entry in self.driver.get_log("browser")]

    def picture(self) -> bytes:
        """The window as PNG."""
        return self.driver.get_screenshot_as_png()


@contextmanager
def open_browser() -> Iterator[Browser]:
    """A fresh Chromium with a profile of its own. Skips where there is none."""
    options = ChromeOptions()
    options.binary_location = need_program("chromium", "/usr/bin/chromium")
    options.set_capability("goog:loggingPrefs", {"performance": "ALL", "browser": "ALL"})
    service = Service(need_program("chromedriver", "/usr/bin/chromedriver"))
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        for flag in (*FLAGS, f"--user-data-dir={profile}"):
            options.add_argument(flag)
        driver = Chrome(options=options, service=service)
        try:
            yield Browser(driver)
        finally:
            driver.quit()
