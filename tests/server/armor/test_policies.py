"""A key has its policy, everybody else that of the options, and no key ever leaves the file."""

import hashlib
import os
from pathlib import Path
from typing import Any

import pytest
import yaml

from cabochon.engine.errors import ConfigError
from cabochon.server.armor.config import ArmorConfig
from cabochon.server.armor.policies import Policies
from cabochon.server.armor.templates import Use
from cabochon.server.armor.verdicts import Policy

PROMPT, ANSWER, OTHER = (f"projects/p/locations/eu/templates/{name}" for name in ("p", "a", "o"))
KEY = "sk-canary-4471"


def options(path: Path | str | None, **more: Any) -> ArmorConfig:
    given = {"armor_prompt_template": PROMPT, "armor_response_template": ANSWER, **more}
    return ArmorConfig(armor_policy_file=str(path) if path else None, **given)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "policies.yaml"
    write(path, {"name": "a", "key": KEY, "prompt_template": OTHER, "mode": "strict"})
    return path


def write(path: Path, *entries: Any) -> None:
    path.write_text(yaml.safe_dump({"keys": list(entries)}))


def bearer(key: str) -> str:
    return f"Bearer {key}"


def test_without_a_file_everybody_has_the_policy_of_the_options() -> None:
    config = options(None)
    policies = Policies(config)
    assert policies.policy_of(None) == policies.policy_of(bearer(KEY)) == config.default_policy
    assert policies.uses() == {Use(PROMPT, "prompt"), Use(ANSWER, "response")}


def test_what_an_entry_leaves_out_is_as_in_the_options(file: Path) -> None:
    policies = Policies(options(file, armor_fail_open=True, armor_reveal=True))
    assert policies.policy_of(bearer(KEY)) == Policy(
        prompt_template=OTHER, response_template=ANSWER, mode="strict", on_unchecked="open", reveal=True
    )


@pytest.mark.parametrize("header", [None, "", "Bearer", "Bearer other", KEY, f"Basic {KEY}", "Bearer é"])
def test_who_has_no_entry_has_the_policy_of_the_options(file: Path, header: str | None) -> None:
    config = options(file)
    assert Policies(config).policy_of(header) == config.default_policy


def test_keys_may_be_given_as_hashes_and_every_option_counts(tmp_path: Path) -> None:
    path = tmp_path / "policies.yaml"
    digest = hashlib.sha256(KEY.encode()).hexdigest()
    entry = {
        "name": "b",
        "key_sha256": digest.upper(),
        "prompt_template": None,
        "response_template": OTHER,
        "mode": "optimistic",
        "on_unchecked": "open",
        "reveal": True,
        "optional_filters": ["rai"],
    }
    write(path, {"name": "a", "key": "sk-other"}, entry, {"name": "c", "key": "sk-third"})
    policies = Policies(options(path))
    assert policies.policy_of(f"bearer  {KEY} ") == Policy(
        prompt_template=None,
        response_template=OTHER,
        mode="optimistic",
        on_unchecked="open",
        reveal=True,
        optional_filters=("rai",),
    )
    assert policies.uses() == {Use(PROMPT, "prompt"), Use(ANSWER, "response"), Use(OTHER, "response")}


def test_the_word_off_is_a_mode_and_no_template_means_it(tmp_path: Path) -> None:
    path = tmp_path / "policies.yaml"
    path.write_text(
        f"keys: [{{name: a, key: x, mode: off}}, {{name: b, key: {KEY}, response_template: null}}]"
    )
    policies = Policies(options(path))
    assert policies.policy_of("Bearer x").mode == policies.policy_of(bearer(KEY)).mode == "off"
    assert policies.policy_of(None).mode == "window"


def test_a_key_of_any_letters(tmp_path: Path) -> None:
    path = tmp_path / "policies.yaml"
    path.write_text("keys: [{name: a, key: schlüssel, mode: strict}]", encoding="utf-8")
    header = bearer("schlüssel").encode().decode("latin-1")  # as ASGI hands it on
    assert Policies(options(path)).policy_of(header).mode == "strict"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "must hold `keys:` with a list"),
        ("[" * 2_000, "must be YAML, it is not: correct it"),
        ("keys: {}", "must hold `keys:` with a list"),
        ("keys: []\nmore: 1", "must hold `keys:` with a list, and nothing else"),
        ("keys: []", "must have an entry for a key, it has none: add one"),
        (f"keys: [{{name: a, key: {KEY}", "must be YAML, it is not at line 1: correct it"),
        (f"keys:\n- key: {KEY}\n  - x: : :", "must be YAML, it is not at line 3"),
        (f"{KEY}: 2024-99-99", "must be YAML, it is not: correct it"),
        (f"keys: [{KEY}]", "entry 1 of .* must be a mapping with a name: add it"),
        (f"keys: [{{key: {KEY}}}]", "entry 1 of .* must be a mapping with a name"),
        (f"keys: [{{name: a, key: {KEY}, modus: x}}]", "a in .* must have only .* got modus: correct it"),
        (f"keys: [{{name: a, {KEY}: x}}]", "a in .* must have only .* got another name"),
        ("keys: [{name: a}]", "a in .* must have either a key or a key_sha256"),
        ("keys: [{name: a, key: 4471}]", "must have either a key or a key_sha256"),
        (f"keys: [{{name: a, key: {KEY}, key_sha256: {'0' * 64}}}]", "must have either a key or"),
        (f"keys: [{{name: a, key_sha256: {KEY}}}]", "a key_sha256 of 64 hex digits"),
        (
            f"keys: [{{name: a, key: {KEY}, mode: soft}}]",
            "mode of a in .* must be one of strict, win",
        ),
        (f"keys: [{{name: a, key: {KEY}, on_unchecked: x}}]", "on_unchecked of a in .* one of closed, open"),
        (f"keys: [{{name: a, key: {KEY}, reveal: maybe}}]", "reveal of a in .* must be one of true, false"),
        (
            f"keys: [{{name: a, key: {KEY}, prompt_template: t}}]",
            "prompt_template of a in .* must be proj",
        ),
        (f"keys: [{{name: a, key: {KEY}, prompt_template: 1}}]", "must be a resource name or null"),
        (f"keys: [{{name: a, key: {KEY}, optional_filters: rai}}]", "must be a list of names"),
        (f"keys: [{{name: a, key: {KEY}, optional_filters: [csam]}}]", "must be among rai, sdp.* got 'csam'"),
        (f"keys: [{{name: a, key: {KEY}}}, {{name: b, key: {KEY}}}]", "given once .* b is not: remove one"),
        (f"keys: [{{name: a, key: {KEY}}}, {{name: a, key: x}}]", "given once .* a is not: remove one"),
    ],
)
def test_wrong_files_are_refused_and_no_key_is_shown(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "policies.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message) as caught:
        Policies(options(path))
    assert "canary" not in str(caught.value)
    assert caught.value.__cause__ is None


def test_a_file_that_is_not_there_is_named() -> None:
    with pytest.raises(ConfigError, match=r"armor_policy_file must be a file with policies: .*: write it"):
        Policies(options("/nonexistent.yaml"))


@pytest.mark.parametrize("name", ["prompt_template", "response_template"])
def test_no_key_is_no_way_round_the_checks(tmp_path: Path, name: str) -> None:
    path = tmp_path / "policies.yaml"
    write(path, {"name": "a", "key": KEY, name: OTHER})
    with pytest.raises(ConfigError, match=f"armor_{name} must be given, since a in .* has a {name}"):
        Policies(options(path, **{f"armor_{name}": None}))


def test_the_file_is_read_again_when_it_changes(file: Path) -> None:
    config = options(file)
    policies = Policies(config)
    write(file, {"name": "b", "key": "sk-new", "mode": "strict"})
    os.utime(file, ns=(1, 1))
    assert policies.policy_of(bearer("sk-new")).mode == "strict"
    assert policies.policy_of(bearer(KEY)) == config.default_policy


def test_a_wrong_version_leaves_the_policies_and_is_complained_of_once(
    file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    policies = Policies(options(file))
    file.write_text(f"keys: [{{name: a, key: {KEY}")
    for _ in range(3):
        assert policies.policy_of(bearer(KEY)).mode == "strict"
    assert caplog.text.count("armor policy file not taken, policies=1 hold") == 1
    file.unlink()
    assert policies.policy_of(bearer(KEY)).mode == "strict"
    assert "canary" not in caplog.text


@pytest.mark.parametrize("error", [None, RuntimeError(KEY)])
def test_no_version_of_the_file_makes_a_request_fail(
    file: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, error: Exception | None
) -> None:
    """None: nested deeper than the parser can go."""

    def fails(_text: bytes) -> None:
        raise error or AssertionError

    policies = Policies(options(file))
    if error is not None:
        monkeypatch.setattr(yaml, "safe_load", fails)
    file.write_text("[" * 2_000)
    for _ in range(2):
        assert policies.policy_of(bearer(KEY)).mode == "strict"
        assert Use(OTHER, "prompt") in policies.uses()
    assert caplog.text.count("armor policy file not taken, policies=1 hold") == 1
    assert "canary" not in caplog.text
