"""Brings a build to Kaggle: datasets, models, the kernel and its output, a submission, its score.

    python scripts/publish.py build --dry-run
    python scripts/publish.py build --datasets --kernel
    python scripts/publish.py build --submit "four models, reranked"
    python scripts/publish.py build --model

The same command goes on after an interruption: it asks the server, and pushes nothing twice.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from kit.kaggle import publish
from kit.kaggle.client import KaggleError
from kit.text import printable


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("build", type=Path, help="folder that build_kaggle.py wrote")
    parser.add_argument("--datasets", action="store_true", help="send what differs")
    parser.add_argument("--model", action="store_true", help="the weights as a model")
    parser.add_argument(
        "--kernel", action="store_true", help="push, wait, fetch output"
    )
    parser.add_argument("--submit", default="", metavar="MESSAGE", help="also score it")
    parser.add_argument(
        "--again", action="store_true", help="push the same kernel anew"
    )
    parser.add_argument("--dry-run", action="store_true", help="check, send nothing")
    parser.add_argument("--output", type=Path, metavar="DIR", help="the kernel's files")
    given = parser.parse_args()
    if given.dry_run:
        print(publish.plan(given.build))
        return
    if not (given.datasets or given.model or given.kernel or given.submit):
        parser.error(
            "nothing to do: --dry-run, --datasets, --model, --kernel or --submit"
        )
    output = given.output or given.build.with_name(f"{given.build.name}-output")
    publish.publish(
        given.build,
        output,
        datasets=given.datasets,
        model=given.model,
        kernel=given.kernel,
        submit=given.submit,
        again=given.again,
    )


if __name__ == "__main__":
    try:
        main()
    except (KaggleError, ValueError, OSError) as error:
        sys.exit(f"publish: {printable(error)}")
    except KeyboardInterrupt:
        sys.exit("publish: interrupted; the same command goes on from here")
