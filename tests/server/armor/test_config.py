"""Options of Model Armor hold together before anything is asked."""

from pathlib import Path
from typing import Any

import pytest

from cabochon.engine.errors import ConfigError
from cabochon.server.armor.config import ArmorConfig, is_loopback
from cabochon.server.settings import as_arguments, load_arguments, load_settings, option_help

TEMPLATE = "projects/p/locations/europe-west4/templates/t"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"armor_prompt_template": "t"}, "armor_prompt_template must be projects/PROJECT/.*got 't'"),
        ({"armor_response_template": TEMPLATE + "/x"}, "armor_response_template must be projects/"),
        ({"armor_optional_filters": ("csam",)}, "must be among rai, sdp, malicious_uris, got 'csam'"),
        ({"armor_optional_filters": ("pi_and_jailbreak",)}, "got 'pi_and_jailbreak': leave it out"),
        ({"armor_policy_file": ""}, "armor_policy_file must name a file"),
        ({"armor_endpoint": "http://x"}, "armor_endpoint must be HOST or HOST:PORT, got 'http://x'"),
        ({"armor_endpoint": "x/y"}, "armor_endpoint must be HOST or HOST:PORT"),
        ({"armor_insecure": True}, "armor_insecure must go with an armor_endpoint .* got none: leave it out"),
        ({"armor_insecure": True, "armor_endpoint": "10.0.0.1:80"}, "armor_insecure must .* got 10.0.0.1:80"),
        ({"armor_prompt_timeout_s": 0}, "armor_prompt_timeout_s must be a positive number, got 0"),
        ({"armor_window_timeout_s": float("nan")}, "armor_window_timeout_s must be a positive number"),
        ({"armor_total_timeout_s": float("inf")}, "armor_total_timeout_s must be a positive number"),
        ({"armor_max_hold_s": -1}, "armor_max_hold_s must be a positive number"),
        ({"armor_prompt_timeout_s": 2.0}, "armor_prompt_timeout_s must be at most armor_total_timeout_s"),
        ({"armor_total_timeout_s": 0.9}, "armor_window_timeout_s must be at most .*got 1.0 and 0.9: lower"),
        ({"armor_cache_s": -1}, "armor_cache_s must be 0 or more seconds"),
        ({"armor_serial_queue_s": float("nan")}, "armor_serial_queue_s must be 0 or more seconds"),
        ({"armor_quota_per_min": 0}, "armor_quota_per_min must be at least 1, got 0: raise it"),
        ({"armor_max_replicas": 0}, "armor_max_replicas must be at least 1"),
        ({"armor_hold_back_chars": 0}, "armor_hold_back_chars must be at least 1"),
        ({"armor_context_chars": -1}, "armor_context_chars must be 0 or more"),
        ({"armor_max_window_chars": 100}, "armor_max_window_chars must be at least armor_first_window_chars"),
    ],
)
def test_wrong_options_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ArmorConfig(**options)


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.9.1:1", "localhost:80", "[::1]:443", "localhost"])
def test_loopback_is_this_machine(host: str) -> None:
    assert is_loopback(host)
    assert ArmorConfig(armor_insecure=True, armor_endpoint=host).armor_insecure


@pytest.mark.parametrize(
    "host",
    ["10.0.0.1:1", "localhost.evil.example", "127.0.0.1.evil.example:1", "0.0.0.0", "[::]:1", "a b", ""],
)
def test_anything_else_is_not_loopback(host: str) -> None:
    assert not is_loopback(host)


def test_without_templates_it_is_off_and_so_are_answers_without_one() -> None:
    assert not ArmorConfig().is_on
    assert ArmorConfig(armor_prompt_template=TEMPLATE).is_on
    assert ArmorConfig(armor_policy_file="policies.yaml").is_on
    assert ArmorConfig(armor_prompt_template=TEMPLATE).default_policy.mode == "off"
    assert ArmorConfig(armor_response_template=TEMPLATE).default_policy.mode == "window"


def test_flags_variables_and_arguments_reach_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CABOCHON_ARMOR_FAIL_OPEN", "true")
    flags = [
        "--armor-prompt-template",
        TEMPLATE,
        "--armor-optional-filters",
        "rai",
        "sdp",
        "--armor-mode=strict",
    ]
    settings = load_settings(flags)
    assert settings.armor == ArmorConfig(
        armor_prompt_template=TEMPLATE,
        armor_optional_filters=("rai", "sdp"),
        armor_mode="strict",
        armor_fail_open=True,
    )
    assert load_arguments(as_arguments(settings)) == settings
    assert "--armor-policy-file" in option_help()


def test_the_mode_off_of_a_file_is_no_switch(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text("armor_mode: off\n")
    assert load_settings(["--config", str(file)]).armor.armor_mode == "off"


def test_the_clients_own_log_of_payloads_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GOOGLE_SDK_PYTHON_LOGGING_SCOPE", "google")
    load_settings([])  # nothing is asked, so nothing can be logged
    for load in (lambda: load_settings([f"--armor-prompt-template={TEMPLATE}"]),
                 lambda: load_arguments({"armor_policy_file": "x.yaml"})):  # fmt: skip
        with pytest.raises(ConfigError, match="GOOGLE_SDK_PYTHON_LOGGING_SCOPE must not be set"):
            load()
