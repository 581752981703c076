"""Builds what a submission to Kaggle needs from a work folder of run_pipeline.py.

    python scripts/build_kaggle.py --user NAME --recipe toy --work work/toy --out build

The build is checked as Kaggle would check it later; scripts/publish.py sends it.
"""

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from kit.kaggle import answering, build, check, contents, manifest
from kit.plan import Run
from kit.text import printable
from kit.training import recipes


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    names = ", ".join(recipes.RECIPES)
    add("--user", required=True, help="on Kaggle, as in the address of the profile")
    add("--recipe", default="toy", help=f"one of {names} (default: %(default)s)")
    add("--work", type=Path, required=True, help="what run_pipeline.py wrote")
    add("--out", type=Path, default=Path("build"), help="default: %(default)s")
    add(
        "--name",
        default="",
        help="what the datasets' and the kernel's names begin with (default: the recipe's)",
    )
    add(
        "--task",
        choices=answering.TASKS,
        default=answering.RETRIEVAL,
        help="what is answered (default: %(default)s)",
    )
    add("--competition", metavar="SLUG", help="default: landmark-<task>-2021")
    add(
        "--reference",
        default="",
        metavar="LIST",
        help="whose labelled images vote (default: index_train, or its holdout)",
    )
    add(
        "--known",
        default="",
        metavar="LIST",
        help="index images whose features travel, so that they are not looked at again",
    )
    add(
        "--machine-shape",
        default=build.Order.machine_shape,
        choices=check.MACHINES,
        metavar="SHAPE",
        help=f"one of {', '.join(check.MACHINES)} (default: %(default)s)",
    )
    add("--hours", type=float, default=build.Order.hours, help="of a session")
    add(
        "--public-queries",
        type=int,
        default=build.Order.public_queries,
        metavar="N",
        help="of the competition; more or fewer are a hidden rerun's (default: %(default)s)",
    )
    add(
        "--wheels",
        nargs="*",
        default=[],
        metavar="PACKAGE",
        help="gather wheels that Kaggle's image lacks, such as faiss-gpu; "
        "the notebook needs none",
    )
    return parser.parse_args()


def main() -> None:
    given = options()
    order = build.Order(
        given.user,
        given.name or contents.slug(given.recipe),
        competition=given.competition or f"landmark-{given.task}-2021",
        machine_shape=given.machine_shape,
        hours=given.hours,
        public_queries=given.public_queries,
        wheels=tuple(given.wheels),
    )
    answering.check_competition(order.competition, given.task)
    # the images stay at home: a path of theirs is not needed
    run = Run(given.recipe, data=Path(), work=given.work.resolve())
    found = contents.find(run, given.reference, given.known, given.task)
    notebook = ROOT / "notebooks" / "05_submission.ipynb"
    made = build.build(given.out.resolve(), found, order, ROOT, notebook)
    print(manifest.table(made))


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError, RuntimeError) as error:
        sys.exit(f"build_kaggle: {printable(error)}")
    except KeyboardInterrupt:
        sys.exit("build_kaggle: interrupted; nothing was built")
