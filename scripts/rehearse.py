"""Runs a build's notebook as Kaggle would: read-only input, no network, limits, both modes.

    python scripts/rehearse.py build --data DIR
    python scripts/rehearse.py build --data DIR --layout long --mode rerun --memory 3

DIR holds photos in GLDv2's layout: a commit sees all of test/ and index/, a rerun half of each.
"""

import argparse
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from kit.kaggle import rehearse
from kit.kaggle.mounts import LAYOUTS
from kit.kaggle.runtime import Mode
from kit.kaggle.sandbox import Limits
from kit.text import printable

MODES = {"commit": [Mode.COMMIT], "rerun": [Mode.RERUN]}
MODES["both"] = [*MODES["commit"], *MODES["rerun"]]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add, usual = parser.add_argument, Limits()
    add("build", type=Path, help="folder that build_kaggle.py wrote")
    add("--data", type=Path, required=True, help="folder with test/ and index/")
    add("--layout", choices=[*LAYOUTS, "all"], default="all")
    add("--mode", choices=MODES, default="both")
    add("--memory", type=float, default=usual.memory, help="GB (default: %(default)g)")
    add("--disk", type=float, default=usual.disk, help="GB (default: %(default)g)")
    add("--hours", type=float, default=usual.hours, help="(default: %(default)g)")
    add("--keep", type=Path, metavar="DIR", help="for results, notebooks and logs")
    given = parser.parse_args()
    runs = []
    for layout in LAYOUTS if given.layout == "all" else [given.layout]:
        for mode in MODES[given.mode]:
            run = rehearse.rehearse(
                given.build,
                given.data,
                layout=layout,
                mode=mode,
                limits=Limits(given.memory, given.disk, given.hours),
                keep=given.keep,
            )
            print(rehearse.summary(run), flush=True)
            if run.error:
                print(run.error, flush=True)
            runs.append(run)
    print(rehearse.table(runs))
    if failed := [run for run in runs if not run.ok]:
        lines = [f"rehearse: {run.layout} {run.mode}: {run.problem}" for run in failed]
        sys.exit("\n".join(lines))


def end(number: int, _: object) -> None:
    """Ends as an interrupt does, cleaning up, with the status of the signal."""
    raise SystemExit(128 + number)


if __name__ == "__main__":
    for each in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(each) is signal.SIG_DFL:  # nohup ignores one
            signal.signal(each, end)
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"rehearse: {printable(error)}")
    except KeyboardInterrupt:
        print("rehearse: interrupted", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)
