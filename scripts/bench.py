"""Measures a suite, ours and a plain baseline interleaved, and prints and writes the rows.

A suite is `bench_<name>.py` beside this file. Its ROWS are functions that take a Bench and
yield rows, or `missing` rows that could not be measured here.
"""

import argparse
import importlib
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from kit import files

Row = dict[str, Any]


@dataclass(frozen=True)
class Bench:
    """How to measure: smaller problems and fewer rounds if quick."""

    quick: bool

    @property
    def rounds(self) -> int:
        return 2 if self.quick else 5

    def interleaved(
        self, ours: Callable[[], object], theirs: Callable[[], object]
    ) -> tuple[float, float]:
        """Median seconds of each, in turns, after a turn that does not count."""
        seconds: tuple[list[float], list[float]] = ([], [])
        for turn in range(self.rounds + 1):
            for function, times in zip((ours, theirs), seconds, strict=True):
                start = time.perf_counter()
                function()
                if turn:
                    times.append(time.perf_counter() - start)
        return statistics.median(seconds[0]), statistics.median(seconds[1])

    def speed(
        self, name: str, ours_s: float, theirs_s: float, goal: float, sampled: bool
    ) -> Row:
        """A row of seconds: how many times faster ours is."""
        ratio = theirs_s / ours_s
        return self.row(name, ratio, goal, sampled, ours_s=ours_s, theirs_s=theirs_s)

    def row(
        self,
        name: str,
        ratio: float,
        goal: float,
        sampled: bool,
        ours_s: float | None = None,
        theirs_s: float | None = None,
    ) -> Row:
        """ratio: larger is better; sampled: measured on less than what the goal is for."""
        return {
            "name": name,
            "ours_s": ours_s,
            "theirs_s": theirs_s,
            "ratio": float(ratio),
            "goal": goal,
            "holds": bool(ratio >= goal),
            "sampled": sampled or self.quick,
            "machine": machine(),
        }

    def told(self, name: str, **numbers: float | str) -> Row:
        """What was found, without a goal."""
        return {"name": name, "numbers": numbers, "machine": machine()}

    def missing(self, name: str, why: str) -> Row:
        """A row that this machine cannot give; it is printed and not written."""
        return {"name": name, "missing": why}


def machine() -> str:
    """The processor, the cores this process may use, and the GPU."""
    import torch

    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    models = [line.split(":")[1].strip() for line in lines if "model name" in line]
    cores, threads = len(os.sched_getaffinity(0)), torch.get_num_threads()
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    cpu = models[0] if models else platform.machine()
    return f"{cpu}, {cores} cores ({threads} threads), {gpu}, torch {torch.__version__}"


def show(row: Row) -> None:
    if "missing" in row:
        print(f"{row['name']:52}  not measured: {row['missing']}", flush=True)
        return
    if "numbers" in row:
        numbers = "  ".join(f"{name} {it}" for name, it in row["numbers"].items())
        print(f"{row['name']:52} {numbers}", flush=True)
        return
    sides = " ".join(
        f"{'' if row[side] is None else f'{row[side]:.4g} s':>10}"
        for side in ("ours_s", "theirs_s")
    )
    verdict = "holds" if row["holds"] else "DOES NOT HOLD"
    verdict += " (smaller than the goal's size)" if row["sampled"] else ""
    print(
        f"{row['name']:52} {sides} {row['ratio']:9.2f}  goal {row['goal']:<5g} {verdict}",
        flush=True,
    )


def draw(title: str, rows: list[Row], path: Path) -> None:
    """A bar a row: its ratio over its goal, which is the line at 1."""
    from matplotlib.figure import Figure

    figure = Figure((11, 1.2 + 0.32 * len(rows)), layout="constrained")
    axes = figure.add_subplot()
    shares = [row["ratio"] / row["goal"] for row in rows]
    colours = ["#3a7ca5" if row["holds"] else "#c1440e" for row in rows]
    bars = axes.barh(range(len(rows)), shares, color=colours)
    told = [f"{row['ratio']:.3g} (goal {row['goal']:g})" for row in rows]
    axes.bar_label(bars, told, padding=4)
    axes.axvline(1, color="black", linewidth=1)
    axes.set_xscale("log")
    axes.set_xlim(min(shares) / 2, max(shares) * 8)
    axes.set_yticks(range(len(rows)), [row["name"] for row in rows])
    axes.invert_yaxis()
    axes.set_xlabel("ratio over its goal; both sides in one process")
    if any(row["sampled"] for row in rows):
        title += ", smaller than the goals' size"
    axes.set_title(title + "\n" + machine())
    figure.savefig(path, dpi=110)


def main() -> None:
    here = Path(__file__).parent
    suites = sorted(path.stem[len("bench_") :] for path in here.glob("bench_*.py"))
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("suite", choices=suites)
    parser.add_argument("--quick", action="store_true", help="small, in seconds")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows here")
    parser.add_argument("--chart", type=Path, metavar="PNG", help="draw them here")
    given = parser.parse_args()
    suite = importlib.import_module(f"bench_{given.suite}")
    print(f"{'':52} {'ours':>10} {'theirs':>10} {'ratio':>9}")
    rows, bench = [], Bench(given.quick)
    try:
        for function in suite.ROWS:
            for row in function(bench):
                show(row)
                rows += [] if "missing" in row else [row]
    finally:  # a row that fails does not take the others with it
        if given.json:
            files.write_json(given.json, rows)
    rows = [row for row in rows if row.get("goal")]
    if given.chart and rows:
        draw(given.suite, rows, given.chart)
    print(machine())


if __name__ == "__main__":
    main()
