"""What the emulator's filters find: texts written by hand, and long hostile ones in linear time."""

import time
from pathlib import Path

import pytest

from cabochon.server.armor.emulator_detectors import (
    CSAM_WORD,
    INJECTION_PHRASES,
    MALICIOUS_URLS,
    MAX_URLS,
    RAI_WORDS,
    Finding,
    count_tokens,
    deidentify,
    find_malicious_urls,
    find_personal_data,
    find_rai,
    has_csam,
    has_injection,
)
from cabochon.server.armor.emulator_faults import KINDS
from cabochon.server.armor.emulator_templates import FILTERS, FLAGS

BAD = MALICIOUS_URLS[0]


@pytest.mark.parametrize("phrase", INJECTION_PHRASES)
def test_each_phrase_is_an_injection_in_any_case_and_with_any_blanks(phrase: str) -> None:
    assert has_injection("Now " + phrase.upper().replace(" ", "\n ") + ", please")


@pytest.mark.parametrize("text", ["", "hello", "ignore all", "ignore all the previous", "no injection here"])
def test_other_texts_are_none(text: str) -> None:
    assert not has_injection(text)


def test_an_injection_needs_three_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cabochon.server.armor.emulator_detectors.INJECTION_PHRASES", ("jailbreak now",))
    assert not has_injection("jailbreak now")
    assert has_injection("please jailbreak now")


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        ("mail bob@x.com now", "mail [EMAIL_ADDRESS] now"),
        ("(a.b+c@mail.example.org).", "([EMAIL_ADDRESS])."),
        ("bob@x.com,eve@y.de", "[EMAIL_ADDRESS],[EMAIL_ADDRESS]"),
        ("日本bob@x.com日本", "日本[EMAIL_ADDRESS]日本"),
        ("bob@x and @x.com and bob@ x.com", "bob@x and @x.com and bob@ x.com"),
        ("4111 1111 1111 1111!", "[CREDIT_CARD_NUMBER]!"),
        ("4111-1111-1111-1111", "[CREDIT_CARD_NUMBER]"),
        ("378282246310005", "[CREDIT_CARD_NUMBER]"),  # 15 digits
        ("4222222222222", "[CREDIT_CARD_NUMBER]"),  # 13 digits
        ("4111 1111 1111 1112", "4111 1111 1111 1112"),  # its check digit is wrong
        ("4111  1111 1111 1111", "4111  1111 1111 1111"),  # two blanks
        ("00000000000000000000", "00000000000000000000"),  # 20 digits
        ("411111111111", "411111111111"),
        ("4111111111111111@x.com", "[EMAIL_ADDRESS]"),
        ("4111 1111 1111 1111@x.com", "4111 1111 1111 [EMAIL_ADDRESS]"),
        ("", ""),
    ],
)
def test_personal_data_is_replaced_and_the_rest_stays(text: str, clean: str) -> None:
    assert deidentify(text, find_personal_data(text)) == clean


def test_findings_come_in_their_order() -> None:
    text = "4111 1111 1111 1111 bob@x.com"
    assert find_personal_data(text) == [
        Finding("CREDIT_CARD_NUMBER", 0, 19),
        Finding("EMAIL_ADDRESS", 20, 29),
    ]


@pytest.mark.parametrize("url", MALICIOUS_URLS)
def test_a_malicious_url_is_found_without_what_follows_it(url: str) -> None:
    assert find_malicious_urls(f"see ({url}).") == [Finding(url, 5, 5 + len(url))]
    assert find_malicious_urls(f"see <{url}>, {url.upper()}")[1].start == 5 + len(url) + 3


def test_other_urls_are_not_malicious() -> None:
    assert find_malicious_urls(f"https://example.com {BAD}/more {BAD[8:]}") == []


def test_only_the_first_256_urls_are_looked_at() -> None:
    fill = "http://a.example "
    assert len(find_malicious_urls(fill * (MAX_URLS - 1) + BAD)) == 1
    assert find_malicious_urls(fill * MAX_URLS + BAD) == []


@pytest.mark.parametrize("kind", RAI_WORDS)
def test_each_rai_type_has_its_word(kind: str) -> None:
    assert find_rai(f"a {RAI_WORDS[kind].upper()} b") == {kind}


def test_words_of_several_filters_do_not_meet() -> None:
    words = " ".join(RAI_WORDS.values())
    assert find_rai(words) == set(RAI_WORDS)
    assert not has_csam(words)
    assert has_csam("x XX-CSAM-xx y")
    assert find_rai("xx-csam-xx") == frozenset()


@pytest.mark.parametrize(("text", "tokens"), [("", 0), (" \n", 0), ("a", 1), ("ab cd", 1), ("abcde", 2)])
def test_a_token_is_four_characters_without_white_space(text: str, tokens: int) -> None:
    assert count_tokens(text) == tokens


@pytest.mark.parametrize(
    "part",
    ["a", "a@", "a.", "@a.", "1", "1 ", "1-1  ", "a@b.", "http://", "a@b.c1", "a@b.cd 4111111111111111 "],
)
def test_a_long_text_takes_linear_time(part: str) -> None:
    text = part * (300_000 // len(part))
    start_s = time.process_time()
    find_personal_data(text)
    find_malicious_urls(text)
    has_injection(text)
    assert time.process_time() - start_s < 2  # quadratic: minutes


def test_all_that_matches_is_in_the_guide() -> None:
    guide = (Path(__file__).parents[3] / "docs/model-armor.md").read_text()
    words = [f'"{phrase}"' for phrase in INJECTION_PHRASES]
    words += [f"`{url}`" for url in MALICIOUS_URLS] + [
        f"`{word}`" for word in (*RAI_WORDS.values(), CSAM_WORD)
    ]
    words += [f"`{name}`" for name in (*FILTERS, *FLAGS, *KINDS)]
    assert [word for word in words if word not in guide] == []
