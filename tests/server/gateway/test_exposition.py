"""The parser refuses what the picker's parser refuses, and reads the server's own text."""

import math

import pytest
from fake_server import fake_service

from cabochon.server.gateway.exposition import FormatError, parse

GOOD = "# TYPE good gauge\ngood 1\n"
NEITHER = "a line must be a sample or a comment, line 3 is neither"
BAD = [
    ("x 1", "the last line must end with a line feed, line 3 does not"),
    ("x\n", NEITHER),
    ("größe 1\n", NEITHER),
    ('{"größe"} 1\n', NEITHER),
    ('x{größe="a"} 1\n', NEITHER),
    ("x{a=b} 1\n", NEITHER),
    ('x{a="b} 1\n', NEITHER),
    ('x{a="\\t"} 1\n', NEITHER),
    ("x 1 2 3\n", NEITHER),
    ("x one\n", "a value must be a number, line 3 has another"),
    ("# TYPE größe gauge\n", "TYPE must name a metric in ASCII, line 3 does not"),
    ("# HELP größe\n", "HELP must name a metric in ASCII, line 3 does not"),
    ("# TYPE x gauges\n", "a type must be one of .* line 3 has another"),
    ("# TYPE x gauge\nx 1\n# TYPE x gauge\n", "TYPE must come once and before samples, line 5"),
    ("x 1\n# TYPE x gauge\n", "TYPE must come once and before samples, line 4"),
]


@pytest.mark.parametrize(("text", "message"), BAD)
def test_one_bad_line_fails_the_whole_text(text: str, message: str) -> None:
    with pytest.raises(FormatError, match=message):
        parse(GOOD + text)


@pytest.mark.parametrize(
    "line", ["", "  ", "#", "# größe", "# TYPE", "# TYPE x", "# HELP", "# HELP x", "#TYPES ä"]
)
def test_lines_that_say_nothing_are_passed_over(line: str) -> None:
    assert list(parse(f"{GOOD}{line}\n")) == ["good"]


def test_samples_keep_their_order_their_labels_and_their_times() -> None:
    series = ['x{a="1,2"} 5', '\tx { a = "}" , b="" , } +Inf 77 ', "x NaN"]
    family = parse("\n".join(["# HELP x what it is", "# TYPE x gauge", *series, ""]))["x"]
    first, second, third = family.samples
    assert family.kind == "gauge"
    assert (first.value, first.timestamp_ms, first.labels()) == (5.0, 0, {"a": "1,2"})
    assert (second.value, second.timestamp_ms, second.labels()) == (math.inf, 77, {"a": "}", "b": ""})
    assert math.isnan(third.value)
    assert third.labels() == {}


def test_escapes_in_label_values_are_resolved() -> None:
    (sample,) = parse('x{a="\\\\n\\n\\""} 1\n')["x"].samples
    assert sample.labels() == {"a": '\\n\n"'}


def test_parts_of_a_histogram_belong_to_it_and_a_total_is_a_name_of_its_own() -> None:
    histogram = '# TYPE h histogram\nh_bucket{le="1"} 1\nh_sum 1\nh_count 1\n'
    families = parse(histogram + "# TYPE c_total counter\nc_total 1\nc_count 2\n# TYPE empty gauge\n")
    numbers = {name: len(family.samples) for name, family in families.items()}
    assert numbers == {"h": 3, "c_total": 1, "c_count": 1}


def test_our_own_text_has_a_type_for_every_family_and_one_series_for_every_gauge() -> None:
    families = parse(fake_service().metrics.render().decode())
    assert len(families) > 15
    for name, family in families.items():
        assert family.has_type_line, name
        assert family.kind != "gauge" or len(family.samples) == 1, name
