"""What some tests need and a machine may lack: they skip with the reason, or fail where all must run."""

import os
import shutil

import pytest


def need_program(name: str, *paths: str) -> str:
    """Where the program is: at the first of `paths` that is one, else on PATH. Skips the test if nowhere.

    With CABOCHON_TEST_ALL=1 it fails instead, so that nothing is left out unseen.
    """
    for candidate in (*paths, name):
        if found := shutil.which(candidate):
            return found
    reason = f"{name} is not installed: run `make system-packages`"
    if os.environ.get("CABOCHON_TEST_ALL") == "1":
        pytest.fail(reason)
    pytest.skip(reason)
