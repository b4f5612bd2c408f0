"""The tests marked `gpu`: one row each, written as it ends.

python benchmarks/gpu/check_tests.py tests/gpu tests/kernels
"""

import argparse
import json
import os
import sys
import time
from typing import TextIO

import pytest

MESSAGE_CHARS = 500


class RowPerTest:
    """A plug-in of pytest. file: where rows go, past pytest's own capture."""

    def __init__(self, file: TextIO) -> None:
        self._file = file

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """A test has ended when it was called, or when it was set up no further."""
        if report.when == "call" or (report.when == "setup" and report.outcome != "passed"):
            self._write(report.nodeid, report.outcome, report.duration, str(report.longrepr or ""))
        elif report.when == "teardown" and report.failed:
            self._write(report.nodeid, "failed", report.duration, str(report.longrepr))

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        """A file that cannot be imported."""
        if report.failed:
            self._write(report.nodeid, "failed", 0.0, str(report.longrepr))

    def _write(self, test: str, outcome: str, seconds: float, text: str) -> None:
        row: dict[str, object] = {"test": test, "outcome": outcome, "seconds": round(seconds, 2)}
        if outcome != "passed":
            row["message"] = text[-MESSAGE_CHARS:]
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()


def main() -> int:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("paths", nargs="+")
    p.add_argument("--mark", default="gpu")
    args = p.parse_args()
    started_s = time.monotonic()
    with os.fdopen(os.dup(1), "w") as rows:
        # Warnings are errors in our own environment; this one has other versions of everything
        options = ["-q", "-m", args.mark, "-W", "default", "-p", "no:cacheprovider"]
        status = pytest.main([*options, *args.paths], plugins=[RowPerTest(rows)])
    print(f"pytest: {status!r} after {time.monotonic() - started_s:.0f} s", flush=True)
    if status != pytest.ExitCode.OK:
        print(f"AssertionError: pytest ended with {status!r}", file=sys.stderr)
    return int(status)


if __name__ == "__main__":
    sys.exit(main())
