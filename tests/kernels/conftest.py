"""All tests of kernels run in the repaired interpreter."""

import pytest


@pytest.fixture(autouse=True, scope="session")
def _repaired(triton_interpreter: None) -> None:
    """See tests/triton_interpreter.py."""
