"""What the programs of a GPU check share: rows on stdout, and one case's failure that stops no other."""

import argparse
import dataclasses
import gc
import json
import logging
import traceback
from collections.abc import Callable, Iterable

import torch

from cabochon.engine.config import EngineConfig
from cabochon.engine.errors import ConfigError

Row = dict[str, object]
Case = tuple[str, Callable[[], Iterable[Row]]]

MESSAGE_CHARS = 500
OPTIONS = frozenset(field.name for field in dataclasses.fields(EngineConfig))


class Absent(Exception):
    """What is to be measured is not here: a package, an option, enough memory."""


def emit(row: Row) -> None:
    """Print a row. Floats keep four significant digits."""
    print(
        json.dumps({k: float(f"{v:.4g}") if isinstance(v, float) else v for k, v in row.items()}), flush=True
    )


def need_options(*names: str) -> None:
    """Raises Absent if the engine has no such option."""
    if missing := [name for name in names if name not in OPTIONS]:
        raise Absent(f"EngineConfig has no {', '.join(missing)}")


def run_cases(cases: Iterable[Case]) -> int:
    """Run each case and print its rows. Returns the exit status: 1 if one failed, and its assertion last.

    A case that cannot run here leaves a row with `absent`, one that failed a row with `error`.
    """
    failed: list[BaseException] = []
    for name, run in cases:
        try:
            for row in run():
                emit({"case": name, **row})
        except (Absent, ConfigError) as reason:
            emit({"case": name, "absent": str(reason)})
        except Exception as error:  # the border of a case
            traceback.print_exc()
            emit({"case": name, "error": type(error).__name__, "message": str(error)[:MESSAGE_CHARS]})
            failed.append(error.with_traceback(None))  # whose frames hold the engine
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    if wrong := [error for error in failed if isinstance(error, AssertionError)]:
        raise wrong[0]  # the last complaint names the class
    return 1 if failed else 0


def arguments(description: str | None) -> argparse.ArgumentParser:
    """A parser with what every program takes. Logs warnings of the engine."""
    logging.basicConfig(level=logging.WARNING)
    p = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    p.add_argument("--tiny", action="store_true", help="shapes of a few kilobytes: does the program work?")
    return p
