"""Which fault strikes which call, how long calls take, and what is said of wrong options."""

from pathlib import Path
from random import Random
from statistics import median

import pytest

from cabochon.engine.errors import ConfigError
from cabochon.server.armor.emulator_catalog import Catalog
from cabochon.server.armor.emulator_faults import KINDS, Fault, Faults, Latency, make_fault, parse_latency
from cabochon.server.armor.emulator_templates import FILTERS, TemplateSpec, parse_template, read_templates

NAME = "projects/p/locations/us-central1/templates/t"


def struck(*faults: str, calls: str, seed: int = 0) -> str:
    """calls: p(rompt), r(esponse), t(emplate). Returns the first letter of what struck each, or a dot."""
    stages = {"p": "prompt", "r": "response", "t": "template"}
    plan = Faults([make_fault(fault) for fault in faults], Random(seed))
    results = [plan.strike(stages[call], f"text of {call}") for call in calls]
    return "".join(fault.kind[0] if fault else "." for fault in results)


@pytest.mark.parametrize(
    ("faults", "calls", "expected"),
    [
        (["hang"], "prtpr", "hh.hh"),
        (["hang stage=prompt"], "prtpr", "h..h."),
        (["hang stage=template"], "prtpr", "..h.."),
        (["hang times=2"], "prpr", "hh.."),
        (["hang stage=response after=1 times=1"], "rprrr", "..h.."),
        (["hang containing='text of r'"], "prpr", ".h.h"),
        (["hang after=1 times=1", "reset"], "pppp", "rhrr"),
        (["reset after=2", "hang after=1 times=1"], "pppp", ".hrr"),  # each counts all that fit it
        (["reset", "hang times=1"], "pp", "rr"),
        ([], "prt", "..."),
    ],
)
def test_a_fault_strikes_the_calls_it_names(faults: list[str], calls: str, expected: str) -> None:
    assert struck(*faults, calls=calls) == expected


def test_a_probability_is_kept_and_repeats_with_its_seed() -> None:
    results = struck("hang probability=0.1", calls="p" * 5000, seed=1)
    assert 400 < results.count("h") < 600  # 500, standard deviation 21
    assert results == struck("hang probability=0.1", calls="p" * 5000, seed=1)
    assert results != struck("hang probability=0.1", calls="p" * 5000, seed=2)
    assert struck("hang probability=0.1 times=3", calls="p" * 500).count("h") == 3


def test_a_fault_says_what_it_has_seen() -> None:
    plan = Faults([make_fault("hang stage=prompt after=1 latency=0.5")], Random(0))
    for stage in ("prompt", "response", "prompt", "prompt"):
        plan.strike(stage, "canary")
    (row,) = plan.as_dicts()
    expected = {"kind": "hang", "stage": "prompt", "latency": "0.5", "seen": 3, "struck": 2}
    assert row.items() >= expected.items()
    assert "canary" not in str(row)


def test_words_and_an_object_make_the_same_fault() -> None:
    expected = Fault(
        kind="partial", stage="response", containing="a b", after=1, times=2, probability=0.5, filter="csam",
        latency=Latency(median_s=0.1, p99_s=0.5),
    )  # fmt: skip
    words = (
        "partial stage=response containing='a b' after=1 times=2 probability=.5 filter=csam"
        " latency=lognormal:median=0.1,p99=0.5"
    )
    fields = {
        "kind": "partial", "stage": "response", "containing": "a b", "after": 1, "times": 2,
        "probability": 0.5, "filter": "csam", "latency": "lognormal:median=0.1,p99=0.5",
    }  # fmt: skip
    assert make_fault(words) == make_fault(fields) == make_fault(expected) == expected


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("explode", "kind of a fault must be one of slow, hang"),
        ("", "must be `KIND NAME=VALUE ...`"),
        ("hang now", "must be `KIND NAME=VALUE ...`"),
        ("hang 'now", "must be `KIND NAME=VALUE ...`"),
        ("hang when=now", "must have fields of kind, stage"),
        ({"after": 1}, "must have a kind"),
        (5, "must be words or an object, got int"),
        ("hang stage=both", "stage of a fault must be one of prompt, response, template, got 'both'"),
        ("partial filter=virus", "filter of a fault must be one of rai"),
        ("hang after=-1", "after >= 0 and times >= 1, got -1 and None"),
        ("hang times=0", "after >= 0 and times >= 1, got 0 and 0"),
        ({"kind": "hang", "times": 1.5}, "after >= 0 and times >= 1"),
        ("hang times=often", "must have numbers for after"),
        ({"kind": "hang", "containing": 5}, "must have numbers for after"),
        ("hang probability=0", "in (0, 1], got 0.0"),
        ("hang probability=nan", "in (0, 1], got nan"),
        ("slow", "a slow fault must have a latency"),
        ("slow latency=soon", "latency must be seconds or lognormal"),
        ("partial stage=template", "must need no text, got partial"),
        ("hang stage=template containing=x", "must need no text, got hang"),
    ],
)
def test_a_wrong_fault_is_refused(given: object, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        make_fault(given)
    assert said in str(caught.value)


def test_kinds_differ() -> None:
    assert len(set(KINDS)) == len(KINDS) == 28


def test_a_latency_is_fixed_or_spread_around_its_median() -> None:
    random = Random(3)
    assert {parse_latency("0.25").draw(random) for _ in range(3)} == {0.25}
    times = sorted(parse_latency("lognormal:median=0.25,p99=0.8").draw(random) for _ in range(20_000))
    assert median(times) == pytest.approx(0.25, rel=0.03)
    assert times[int(0.99 * len(times))] == pytest.approx(0.8, rel=0.1)


@pytest.mark.parametrize("text", ["0", "0.25", "lognormal:median=0.25,p99=0.8"])
def test_a_latency_is_shown_as_it_is_written(text: str) -> None:
    assert str(parse_latency(text)) == text


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("soon", "must be seconds or lognormal:"),
        ("normal:median=1,p99=2", "must be seconds or lognormal:"),
        ("lognormal:median=1", "must be seconds or lognormal:"),
        ("lognormal:median=1,p99", "must be seconds or lognormal:"),
        ("-1", "must be in [0, 3600] s, got -1.0"),
        ("nan", "must be in [0, 3600] s, got nan"),
        ("lognormal:median=0.5,p99=0.5", "0 < median < p99 <= 3600 s, got 0.5 and 0.5"),
        ("lognormal:median=0,p99=0.5", "0 < median < p99 <= 3600 s, got 0.0 and 0.5"),
    ],
)
def test_a_wrong_latency_is_refused(text: str, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_latency(text)
    assert said in str(caught.value)


def test_a_template_has_all_filters_or_those_it_names() -> None:
    assert parse_template(NAME) == TemplateSpec(name=NAME, filters=frozenset(FILTERS))
    assert parse_template("*") == TemplateSpec()
    assert parse_template(f"{NAME}:rai").filters == {"rai", "csam"}  # nobody does without csam
    assert parse_template(f"{NAME}:rai,deidentify") == TemplateSpec(
        name=NAME, filters=frozenset({"rai", "sdp", "csam"}), has_deidentify=True
    )
    assert parse_template("*:inspect_only,log_sanitize,ignore_partial") == TemplateSpec(
        is_inspect_only=True, logs_sanitize=True, ignores_partial=True
    )


def test_templates_are_read_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "templates.yaml"
    path.write_text(f"{NAME}: [sdp, deidentify]\n'*':\n")
    assert read_templates(path) == [parse_template(f"{NAME}:sdp,deidentify"), TemplateSpec()]


@pytest.mark.parametrize(
    "text", ["t", "projects/p/templates/t", f"{NAME}/x", f"{NAME}:deidentified", "", "**"]
)
def test_a_wrong_template_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="must be"):
        parse_template(text)


@pytest.mark.parametrize(
    "content", ["- a", f"{NAME}: sdp", f"{NAME}: [1]", "{", f"{NAME}:sdp: [rai]", "x: [sdp]"]
)
def test_a_wrong_file_of_templates_is_refused(content: str, tmp_path: Path) -> None:
    path = tmp_path / "templates.yaml"
    path.write_text(content)
    with pytest.raises(ConfigError, match="must"):
        read_templates(path)
    with pytest.raises(ConfigError, match="must be a YAML file"):
        read_templates(tmp_path / "absent.yaml")


def test_templates_must_differ_in_name() -> None:
    with pytest.raises(ConfigError, match="must differ in name"):
        Catalog([NAME, f"{NAME}:sdp"])
