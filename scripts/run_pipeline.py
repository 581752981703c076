"""Runs a recipe from a data folder to a checked submission.csv, notebook by notebook."""

import argparse
import json
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from kit import pipeline, plan
from kit.answers import metrics


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--recipe", default="toy", help="a name in kit.training.recipes"
    )
    parser.add_argument(
        "--data", type=Path, required=True, help="folder with the images"
    )
    parser.add_argument(
        "--work", type=Path, required=True, help="everything is written here"
    )
    parser.add_argument(
        "--layout", default="gldv2", help="of the data: gldv2, csv or folders"
    )
    parser.add_argument(
        "--table", default="", help="layout csv: path,label[,group,split]"
    )
    parser.add_argument(
        "--index-ids", default="", help="ids of a competition's smaller index"
    )
    parser.add_argument("--gpus", type=int, default=1, help="processes, one a GPU")
    parser.add_argument(
        "--workers",
        type=int,
        default=max(0, min(8, (os.cpu_count() or 1) // 2 - 1)),
        help="loader processes of each (default: %(default)s)",
    )
    parser.add_argument(
        "--save-every", type=int, default=50, help="steps between two states"
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="STAGE.FIELD=VALUE",
        help="change a field of a stage; VALUE as in JSON",
    )
    parser.add_argument(
        "--force", action="append", default=[], metavar="STEP", help="run it again"
    )
    parser.add_argument(
        "--from", dest="start", default="", metavar="STEP", help="and all after it"
    )
    parser.add_argument("--list", action="store_true", help="show the steps and stop")
    return parser.parse_args()


def overrides(settings: list[str]) -> dict[str, dict[str, object]]:
    found: dict[str, dict[str, object]] = {}
    for setting in settings:
        name, _, value = setting.partition("=")
        stage, _, field = name.partition(".")
        try:
            found.setdefault(stage, {})[field] = json.loads(value)
        except json.JSONDecodeError:
            raise ValueError(
                f"--set {setting}: write STAGE.FIELD=VALUE, VALUE as in JSON"
            ) from None
    return found


def main() -> None:
    given = options()
    run = plan.Run(
        given.recipe,
        given.data.resolve(),
        given.work.resolve(),
        layout=given.layout,
        table=str(Path(given.table).resolve()) if given.table else "",
        index_ids=str(Path(given.index_ids).resolve()) if given.index_ids else "",
        num_gpus=given.gpus,
        workers=given.workers,
        save_every=given.save_every,
        overrides=overrides(given.set),
    )
    steps = plan.steps(
        run, ROOT / "notebooks", ROOT / "datasets_meta" / "continents.csv"
    )
    if not given.list:
        pipeline.run(steps, run.folder, force=given.force, start=given.start)
    print(pipeline.table(pipeline.status(steps, run.folder)))
    if given.list:
        return
    print(f"\n{'step':28}  public  private")
    for step, public, private, note in metrics.read_gains(run.gains):
        print(f"{step:28}  {public:.4f}  {private:.4f}   {note}")
    print(f"\nsubmission  {run.submission}\nreport      {run.report}")
    print(metrics.evaluate_file(run.submission, run.lists / "solution.csv"))


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError, RuntimeError) as error:
        sys.exit(f"run_pipeline: {error}")
    except KeyboardInterrupt:
        sys.exit("run_pipeline: interrupted; the same command goes on from here")
