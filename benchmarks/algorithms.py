"""How each algorithm behaves on the same rows: loss and accuracy against rows, bytes through the driver and seconds.

python benchmarks/algorithms.py digits [--seeds 3] [--only averaging,diloco] [--out runs/compare] [--tune]
python benchmarks/algorithms.py mnist10k --data DIR
python benchmarks/algorithms.py mixed | text | speeds | table

Every part adds a line of JSON a run to its file in the folder, and writes compare.md and compare.png of all that lies
there; `table` does only that. `--tune` looks for the rates, on a seed and rows of their own, and prints them.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from algorithm_parts.contenders import CONTENDERS
from algorithm_parts.handwriting import DATASETS, run_images, tune_images
from algorithm_parts.mixed import MIXED, run_mixed
from algorithm_parts.plots import plot
from algorithm_parts.results import Run, by_name, read
from algorithm_parts.speeds import SPEEDS, TARGET, run_speeds
from algorithm_parts.tables import TITLES, against, part_table, reached
from algorithm_parts.text import CONTENDERS as TEXT
from algorithm_parts.text import SYNCHRONOUS, run_text, tune_text
from algorithm_parts.text_loop import Size
from measuring.plots import can_plot
from measuring.surroundings import surroundings
from measuring.table import headline


def _chosen(parser: argparse.ArgumentParser, only: str, known: Sequence[str]) -> list[str]:
    names = [name.strip() for name in only.split(";" if ";" in only else ",") if name.strip()] or list(known)
    if unknown := [name for name in names if name not in known]:
        parser.error(f"--only: unknown {unknown}; known: {'; '.join(known)} (names with a comma: separate them by ;)")
    return names


def write(out: Path) -> None:
    """Tables and plots of what lies in `out`."""
    parts = {part: read(out, part) for part in TITLES}
    text = f"{headline(surroundings())}\n\n" + "\n".join(
        part_table(part, runs, list(CONTENDERS)) + notes(part, runs) for part, runs in parts.items() if runs
    )
    (out / "compare.md").write_text(text, encoding="utf-8")
    if problem := can_plot():
        print(problem)
    else:
        plot(parts, out / "compare.png")
    print(text)


def notes(part: str, runs: Sequence[Run]) -> str:
    """What a table does not say: the loss beside synchronous training, the way to equal loss."""
    lines = []
    if part == "digits":
        lines += [f"{name}: {one.what}. Choose it when {one.when}." for name, one in CONTENDERS.items()]
    if part == "text":
        for name in by_name(runs):
            if name != SYNCHRONOUS and (beside := against(runs, name, SYNCHRONOUS)):
                shown = ", ".join(f"{share:+.1%}" for share in beside)
                lines.append(f"{name}: loss against {SYNCHRONOUS}, seed by seed: {shown}.")
    if part == "speeds":
        for name, own in by_name(runs).items():
            found = [reached(run, TARGET, lambda one, place: one.curve[place].seconds) for run in own]
            shown = ", ".join("not reached" if value is None else f"{value:.1f} s" for value in found)
            lines.append(f"{name}: to a held-out loss of {TARGET:g}, seed by seed: {shown}.")
    return "".join(f"\n{line}\n" for line in lines)


def main() -> int:
    """Train, add to the results, write tables and plots."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=(*TITLES, "table"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", default="", help="contenders, by comma, or by ; where names have one")
    parser.add_argument("--out", type=Path, default=Path("runs/compare"))
    parser.add_argument("--data", type=Path, help="folder with mnist10k.parquet")
    parser.add_argument("--epochs", type=int, help="of digits, mnist10k and mixed, in place of theirs")
    parser.add_argument("--steps", type=int, help="of text, in place of its own")
    parser.add_argument("--tune", action="store_true", help="look for the rates of digits, mnist10k or text")
    arguments = parser.parse_args()
    if arguments.seeds < 1:
        parser.error(f"--seeds {arguments.seeds}: at least 1")
    part, out = arguments.part, arguments.out
    if part == "mnist10k" and arguments.data is None:
        parser.error("mnist10k: give --data, a folder with mnist10k.parquet")
    if part in DATASETS:
        names = _chosen(parser, arguments.only, list(CONTENDERS))
        if arguments.tune:
            print(tune_images(part, names, arguments.data, out))
            return 0
        run_images(part, names, arguments.seeds, arguments.data, out, arguments.epochs)
    elif part == "mixed":
        run_mixed(_chosen(parser, arguments.only, list(MIXED)), arguments.seeds, out, arguments.epochs)
    elif part == "speeds":
        run_speeds(_chosen(parser, arguments.only, list(SPEEDS)), arguments.seeds, out)
    elif part == "text":
        names = _chosen(parser, arguments.only, TEXT)
        size = Size() if arguments.steps is None else Size(steps=arguments.steps)
        if arguments.tune:
            print(tune_text(names, size, out))
            return 0
        run_text(names, arguments.seeds, size, out)
    write(out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
