"""What a check of a model server found: a result, what was measured, what is allowed, what to do."""

from dataclasses import dataclass, field
from enum import StrEnum

OK = 200


class Result(StrEnum):
    """Only a failure makes the exit code 1."""

    PASS = "pass"
    WARN = "warn"  # works, at a price that the advice names
    FAIL = "fail"
    SKIP = "skip"  # there is nothing to check


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One row of the report."""

    check: str  # group.rule
    result: Result
    measured: str
    limit: str
    advice: str = ""  # none if it passed
    numbers: dict[str, float] = field(default_factory=dict)  # by name with unit, for --json


def judge(
    check: str,
    is_good: bool,
    *,
    measured: str,
    limit: str,
    advice: str,
    otherwise: Result = Result.FAIL,
    numbers: dict[str, float] | None = None,
) -> Finding:
    """A finding that passes if `is_good`, and has advice if it does not."""
    return Finding(
        check=check,
        result=Result.PASS if is_good else otherwise,
        measured=measured,
        limit=limit,
        advice="" if is_good else advice,
        numbers=numbers or {},
    )


def skip(check: str, why: str, limit: str) -> Finding:
    """A finding about something that is not there."""
    return Finding(check=check, result=Result.SKIP, measured=why, limit=limit)
