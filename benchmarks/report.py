"""Pictures of results: PNG plots and one HTML page that needs nothing else, and the tables of documents.

    python benchmarks/report.py --out DIRECTORY                 # of all files in benchmarks/results
    python benchmarks/report.py --out DIRECTORY FILE ...        # of these
    python benchmarks/report.py --tables docs/performance.md    # writes what stands between its markers

Plots need matplotlib (`pip install -e '.[bench]'`), tables nothing. What was not measured has no plot.
"""

import argparse
import base64
import html
import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tables import RESULTS, Row, fill, read

if TYPE_CHECKING:  # matplotlib is optional
    from plots import Plot

PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>Cabochon: benchmarks</title>
<style>
  :root {{ color-scheme: light dark }}
  body {{ font: 16px/1.5 Inter, system-ui, sans-serif; max-width: 60rem; margin: 3rem auto; padding: 0 1rem }}
  h1 {{ font-size: 1.6rem; margin-bottom: 0 }}
  p {{ opacity: .75; margin-top: .25rem }}
  figure {{ margin: 2rem 0 }}
  img {{ width: 100%; height: auto; display: block }}
  figcaption {{ font: .8rem/1.5 ui-monospace, monospace; opacity: .7; white-space: pre-wrap;
    overflow-wrap: anywhere; padding: .5rem .25rem }}
</style>
<h1>Cabochon: benchmarks</h1>
<p>{num_plots} plots of {num_files} files of results. Absolute figures drift, ratios hold.</p>
{figures}
</html>
"""


def draw(rows: Sequence[Row], out: Path) -> list[Path]:
    """A PNG for each plot and index.html, all in `out`. Returns the PNGs."""
    from plot_style import styled  # optional: of the extra `bench`
    from plots import all_plots

    out.mkdir(parents=True, exist_ok=True)
    pictures, figures = [], []
    with styled():
        for plot in all_plots(rows):
            data = _png(plot)
            path = out / f"{plot.name}.png"
            path.write_bytes(data)
            pictures.append(path)
            figures.append(_figure(plot, data))
    num_files = len({row["file"] for row in rows})
    page = PAGE.format(num_files=num_files, num_plots=len(figures), figures="\n".join(figures))
    (out / "index.html").write_text(page)
    return pictures


def _png(plot: "Plot") -> bytes:
    """The same bytes for the same rows."""
    buffer = io.BytesIO()
    plot.figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def _figure(plot: "Plot", data: bytes) -> str:
    picture = f"data:image/png;base64,{base64.b64encode(data).decode()}"
    caption = f"<figcaption>{html.escape(plot.caption)}</figcaption>" if plot.caption else ""
    return f'<figure id="{plot.name}"><img alt="{plot.name}" src="{picture}">{caption}</figure>'


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    if args.out is not None:
        rows = [row for path in args.files or sorted(RESULTS.glob("*.jsonl")) for row in read(path)]
        for path in draw(rows, args.out):
            print(path)
        print(args.out / "index.html")
    for document in args.tables:
        document.write_text(fill(document.read_text()))


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("files", nargs="*", type=Path, help="results; default: all of benchmarks/results")
    p.add_argument("--out", type=Path, help="directory of the plots and the page")
    p.add_argument("--tables", type=Path, nargs="+", default=[], help="documents with marked tables")
    args = p.parse_args(argv)
    if args.out is None and not args.tables:
        p.error("nothing to do: name --out DIRECTORY, --tables DOCUMENT or both")
    return args


if __name__ == "__main__":
    main()
