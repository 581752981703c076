"""Runs a recipe from a data folder to a checked submission.csv, notebook by notebook.

On several machines the same command is given on each, with its own --node-rank: node 0
runs the notebooks, the others join what these launch. All need the same --work folder.
"""

import argparse
import json
import math
import os
import sys
import tempfile
import time
from contextlib import nullcontext, suppress
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
WEIGHTS = ROOT / "weights"
FILES = ("table", "index_ids", "clean", "exclusions")  # options that name one

from kit import launch, pipeline, plan
from kit.answers import gain_table
from kit.answers.metrics import gap, mean_ap
from kit.kaggle import answering
from kit.nodes import session
from kit.rerank import chain, recogniser
from kit.rerank.steps import STEPS
from kit.training import recipes
from kit.training.job import MACHINE


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    names = ", ".join(recipes.RECIPES)
    add("--recipe", default="toy", help=f"one of {names} (default: %(default)s)")
    add("--data", type=Path, required=True, help="folder with the images")
    add("--work", type=Path, required=True, help="everything is written here")
    add("--layout", default="gldv2", help="of the data: gldv2, csv or folders")
    add("--table", default="", help="layout csv: path,label[,group,split]")
    add("--index-ids", default="", help="ids of a competition's smaller index")
    add("--clean", default="", help="a clean list like train_clean.csv, as 01 writes")
    add("--exclusions", default="", help="images that nothing may train on: id,reason")
    add(
        "--everything",
        action="store_true",
        help="train on validation's own images, too, for a submission whose answers "
        "nobody has; no offline number is honest then, so steps 04, 05 and 07 are left out",
    )
    add(
        "--weights",
        type=Path,
        default=WEIGHTS,
        help="released ImageNet weights",
    )
    add(
        "--pretrained",
        default="recipe",
        help='what the first stage starts from: timm, lite0 to lite2, a file, "" for random weights',
    )
    add(
        "--rerank",
        nargs="*",
        metavar="STEP",
        help="steps to tune, in their order, instead of the recipe's own: "
        + ", ".join(STEPS)
        + "; or chains of fixed parameters: "
        + ", ".join(chain.NAMED),
    )
    add(
        "--neighbours",
        type=int,
        default=0,
        metavar="K",
        help="keep each index and reference image's K nearest in graph/, for steps that read them",
    )
    add(
        "--recognise",
        action="store_true",
        help="name each query's landmark, too (07_recognition), and report GAP",
    )
    add(
        "--cleaning",
        choices=plan.CLEANING,
        default="",
        help="write a clean list, too (01_clean_labels), for the --clean of another run",
    )
    add("--save-every", type=int, default=50, help="steps between two states")
    add(
        "--set",
        action="append",
        default=[],
        metavar="STAGE.FIELD=VALUE",
        help="change a field of a stage; VALUE as in JSON",
    )
    add("--force", action="append", default=[], metavar="STEP", help="run it again")
    add("--from", dest="start", default="", metavar="STEP", help="and all after it")
    add("--list", action="store_true", help="show the steps and stop")
    machine_options(parser)
    return parser.parse_args()


def machine_options(parser: argparse.ArgumentParser) -> None:
    """Those that change no result."""
    add = parser.add_argument_group("machines").add_argument
    add("--gpus", type=int, default=1, help="processes of each node, one a GPU")
    add(
        "--workers",
        type=int,
        default=max(0, min(8, (os.cpu_count() or 1) // 2 - 1)),
        help="loader processes of each (default: %(default)s)",
    )
    add(
        "--machine",
        action="append",
        default=[],
        metavar="FIELD=VALUE",
        help=f"how a stage is computed: {', '.join(MACHINE)}; VALUE as in JSON",
    )
    add("--nodes", type=int, default=1, help="machines that share --work")
    add("--node-rank", type=int, default=0, help="which one of them this is, from 0")
    add("--rendezvous", default="", metavar="HOST:PORT", help="of node 0, for all")
    add(
        "--max-restarts",
        type=int,
        default=0,
        metavar="N",
        help="times a launch goes on from its last state after a process has failed",
    )
    add(
        "--stop-after",
        default="",
        metavar="TIME",
        help="8.5h, 30m, 90s: save and end then; the same command goes on",
    )


def file(name: str) -> str:
    """An absolute path, or still nothing."""
    return str(Path(name).resolve()) if name else ""


def setting(option: str, text: str, form: str) -> tuple[str, object]:
    """The name and the value of NAME=VALUE."""
    name, _, value = text.partition("=")
    try:
        return name, json.loads(value)
    except json.JSONDecodeError:
        raise ValueError(f"{option} {text}: write {form}, VALUE as in JSON") from None


def overrides(texts: list[str]) -> dict[str, dict[str, object]]:
    """Changed fields by stage."""
    found: dict[str, dict[str, object]] = {}
    for text in texts:
        name, value = setting("--set", text, "STAGE.FIELD=VALUE")
        stage, _, field = name.partition(".")
        found.setdefault(stage, {})[field] = value
    return found


def refuse_missing(given: argparse.Namespace) -> None:
    """Raise OSError for an option that names nothing that is there."""
    folders = {"data": given.data}
    if given.weights != WEIGHTS:
        folders["weights"] = given.weights
    for name, path in folders.items():
        if not path.is_dir():
            raise NotADirectoryError(f"--{name} {path}: there is no such folder")
    for name in FILES:
        path = getattr(given, name)
        if path and not Path(path).is_file():
            option = name.replace("_", "-")
            raise FileNotFoundError(f"--{option} {path}: there is no such file")


def refuse_unwritable(work: Path) -> None:
    """Raise OSError for a work folder in which no file can be made."""
    try:
        work.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=work):
            pass
    except OSError as error:
        raise OSError(
            f"--work {work}: no file can be made there ({error.strerror}); "
            "give a folder that you may write to"
        ) from None


def main() -> None:
    given = options()
    refuse_missing(given)
    limit = plan.seconds(given.stop_after) if given.stop_after else 0.0
    run = plan.Run(
        given.recipe,
        given.data.resolve(),
        given.work.resolve(),
        layout=given.layout,
        **{name: file(getattr(given, name)) for name in FILES},
        weights=given.weights.resolve(),
        pretrained=given.pretrained,
        neighbours=given.neighbours,
        recognise=given.recognise,
        cleaning=given.cleaning,
        num_gpus=given.gpus,
        workers=given.workers,
        save_every=given.save_every,
        overrides=overrides(given.set),
        holdout=not given.everything,
        rerank=None if given.rerank is None else tuple(given.rerank),
        machine=dict(setting("--machine", t, "FIELD=VALUE") for t in given.machine),
    )
    steps = plan.steps(
        run, ROOT / "notebooks", ROOT / "datasets_meta" / "continents.csv"
    )
    pipeline.pick_forced(steps, given.force, given.start)  # refuses unknown names
    if given.list:
        print(pipeline.table(pipeline.status(steps, run.folder)))
    elif given.node_rank:
        place = launch.Place(given.nodes, given.node_rank, given.rendezvous)
        launch.serve(run.calls, given.gpus, place)
    else:
        lead(given, run, steps, limit)


def lead(
    given: argparse.Namespace, run: plan.Run, steps: list[pipeline.Step], limit: float
) -> None:
    """What node 0 does, or the only one. limit: seconds until it stops, 0 for none."""
    place = launch.Place(given.nodes, 0, given.rendezvous, given.max_restarts)
    refuse_unwritable(run.work)
    several = given.nodes > 1
    os.environ |= place.environment(run.calls if several else None)
    if limit:
        os.environ[launch.STOP_AT] = str(time.time() + limit)
    if given.everything:
        print(
            "trains on everything: no step 04, 05 or 07, for no offline number is honest"
        )
    stop = ""
    try:
        with session.host(run.calls, launch.Stopped) if several else nullcontext():
            pipeline.run(steps, run.folder, force=given.force, start=given.start)
    except launch.Stopped as stopped:
        stop = str(stopped)
    print(pipeline.table(pipeline.status(steps, run.folder)))
    if stop:
        print(stop)
    else:
        report(run)


def report(run: plan.Run) -> None:
    """Gains, and what the written answers are worth by the right ones."""
    if run.cleaning:
        print(f"\nclean list  {run.cleaned / 'train_clean.csv'}")
    if not run.holdout:
        return
    print_gains("mAP@100", run.gains)
    print(f"\nsubmission  {run.submission}\nreport      {run.report}")
    truth = run.lists / "solution.csv"
    score = mean_ap.evaluate_file(run.submission, truth)
    given = answering.Given(run, index=run.index, reference=run.voters)
    print(score)
    print(given.protocol(chain.load(run.chain), run.index, truth, len(score.queries)))
    if not run.recognise:
        return
    print_gains("GAP", run.recognition_gains)
    print(f"\nlandmarks   {run.landmarks}")
    truth = run.lists / "recognition.csv"
    score = gap.evaluate_file(run.landmarks, truth)
    plan = recogniser.load(run.recogniser)
    print(score)
    print(given.protocol(plan, run.voters, truth, len(score.queries)))


def print_gains(metric: str, path: Path) -> None:
    print(f"\n{metric:28}  public  private")
    for step, *halves, note in gain_table.read(path):
        public, private = (
            "     -" if math.isnan(half) else f"{half:6.4f}" for half in halves
        )
        print(f"{step:28}  {public}  {private}   {note}")


if __name__ == "__main__":
    try:
        with launch.interruptible():
            main()
    except (ValueError, OSError, RuntimeError) as error:
        sys.exit(f"run_pipeline: {error}")
    except launch.Interrupted as by:
        with suppress(OSError):  # the terminal may be what went away
            said = "the same command goes on from here"
            print(f"run_pipeline: interrupted by {by}; {said}", file=sys.stderr)
        launch.die_by(by.number)
