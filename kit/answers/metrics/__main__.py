"""What a submission, or networks, are worth: `python -m kit.answers.metrics COMMAND --help`."""

import argparse
import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pandas as pd

from kit.answers.metrics import (
    benchmark,
    definitions,
    extraction,
    folders,
    gap,
    gldv2,
    ground_truth,
    mean_ap,
    protocol,
)
from kit.answers.metrics.extraction import Networks
from kit.data import tables
from kit.features.views import OWN, Views
from kit.rerank import chain as chains

Run = Callable[[argparse.Namespace], Iterator[str]]
CONTINENTS = Path(__file__).resolve().parents[3] / "datasets_meta" / "continents.csv"


def main(arguments: Sequence[str] | None = None) -> None:
    given = _parser().parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    try:
        for line in given.run(given):
            print(line, flush=True)
    except (ValueError, OSError, RuntimeError) as error:
        sys.exit(f"metrics: {error}")
    except KeyboardInterrupt:
        sys.exit("metrics: interrupted; the same command goes on from here")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m kit.answers.metrics")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, run: Run, said: str) -> argparse.ArgumentParser:
        made = commands.add_parser(name, help=said, description=said)
        made.set_defaults(run=run)
        return made

    one = command("submission", _submission, "score a submission of either form")
    one.add_argument("submission", type=Path, help="CSV id,images or id,landmarks")
    one.add_argument("solution", type=Path, help="CSV of the same form with Usage")
    one = command("gldv2", _gldv2, "mAP@100 and GAP of networks on GLDv2")
    one.add_argument("--data", type=Path, required=True, help="in GLDv2's layout")
    _networks(one, size=0, template=OWN, scales=[1.0], multiple=16)
    one.add_argument(
        "--reference",
        default="clean",
        metavar="LIST",
        help='whose labelled images vote for GAP; "" for none (default: %(default)s)',
    )
    one.add_argument("--index-ids", type=Path, help="ids of a competition's index")
    one.add_argument(
        "--continents",
        type=Path,
        default=CONTINENTS if CONTINENTS.exists() else None,
        help="country,continent (default: the repository's)",
    )
    one.add_argument(
        "--optimistic", action="store_true", help="print leaky numbers as LEAKY"
    )
    own = benchmark.VIEWS
    views = {name: getattr(own, name) for name in ("size", "template", "multiple")}
    views["scales"] = list(own.scales)
    one = command("revisited", _revisited, "revisited or older Oxford and Paris")
    one.add_argument("--images", type=Path, required=True, help="folder of pictures")
    one.add_argument(
        "--ground-truth",
        type=Path,
        required=True,
        metavar="FILE",
        help="gnd_*.pkl, our JSON, or the older sets' folder of tables",
    )
    one.add_argument("--distractors", type=Path, help="folder of more pictures (R1M)")
    _networks(one, **views)
    one = command("folder", _folder, "any labelled pictures, by one table")
    one.add_argument("--table", type=Path, required=True, help=_form())
    one.add_argument("--images", type=Path, required=True, help="where paths start")
    one.add_argument("--distractors", type=Path, help="folder of more pictures")
    _networks(one, size=0, template=OWN, scales=[1.0], multiple=16)
    for each in (commands.choices["revisited"], commands.choices["folder"]):
        each.add_argument("--whole", action="store_true", help="do not crop queries")
    one = command("convert", _convert, "write a ground truth as JSON")
    one.add_argument("ground_truth", type=Path)
    one.add_argument("out", type=Path, metavar="JSON")
    return parser


def _model() -> str:
    return (
        "folder of a trained stage; or untrained:RECIPE, timm:BACKBONE[=FILE of weights], "
        "packaged:efficientnet-lite0 (lite1, lite2)"
    )


def _form() -> str:
    return "CSV path,label[,query][,x,y,w,h]; query: 0, 1 or both"


def _networks(
    parser: argparse.ArgumentParser,
    size: int,
    template: str,
    scales: list[float],
    multiple: int,
) -> None:
    add = parser.add_argument
    add("--model", nargs="+", required=True, metavar="NETWORK", help=_model())
    add("--work", type=Path, required=True, help="everything is written here")
    add("--chain", type=Path, help="chain.json that reranks")
    add("--gpus", type=int, default=1, metavar="N", help="processes that extract")
    add("--workers", type=int, default=2, help="loader processes of each")
    add("--batch", type=int, default=32, help="images at a time")
    add(
        "--size",
        type=int,
        default=size,
        help="pixels; 0: its own (default: %(default)s)",
    )
    add("--template", default=template, help="own, square, longest, bounded, L2, ...")
    add("--scales", type=float, nargs="+", default=scales, metavar="S")
    add("--multiple", type=int, default=multiple, help="pixels, of a scaled side")
    add("--flip", action="store_true", help="each scale's mirror image too")


def _looking(given: argparse.Namespace) -> Networks:
    views = Views(
        given.size,
        given.template,
        tuple(given.scales),
        given.multiple,
        flip=given.flip,
    )
    if given.gpus < 1:
        raise ValueError(f"--gpus is {given.gpus}, not at least 1")
    machine = given.gpus, given.workers, given.batch
    return Networks(*extraction.networks(given.model, given.work), views, *machine)


def _submission(given: argparse.Namespace) -> Iterator[str]:
    pair = given.submission, given.solution
    found: gap.Score | mean_ap.Score
    if "landmarks" in tables.read_csv(given.submission, ("id",), ("landmarks",)):
        found = gap.evaluate_file(*pair)
        _refuse_no_query(found.queries, given.solution)
        yield str(found)
    else:
        found = mean_ap.evaluate_file(*pair)
        _refuse_no_query(found.queries, given.solution)
        yield str(found)
        asked, ranked = mean_ap.answers(given.submission)
        solution = tables.read_solution(given.solution)
        yield definitions.show(definitions.evaluate(asked, ranked, solution))
    told = protocol.file(given.solution)
    yield f"measured with: ground truth {told}; queries {len(found.queries):,} whole"


def _refuse_no_query(queries: pd.DataFrame, solution: Path) -> None:
    if queries.empty:
        raise ValueError(f"{solution}: no query counts, each of its rows is Ignored")


def _gldv2(given: argparse.Namespace) -> Iterator[str]:
    options = gldv2.Options(
        *(given.data, given.work, _looking(given)),
        chain=given.chain and chains.load(given.chain),
        reference=given.reference,
        index_ids=given.index_ids,
        continents=given.continents,
        optimistic=given.optimistic,
        processes=given.workers,
    )
    yield from gldv2.evaluate(options)


def _revisited(given: argparse.Namespace) -> Iterator[str]:
    path = given.ground_truth
    truth = ground_truth.read(path)
    name = path.stem.removeprefix("gnd_") if path.is_file() else path.resolve().name
    told = protocol.file(path)
    found = benchmark.by_name(truth, told, name, given.images)
    yield from _benchmark(given, found, _looking(given))


def _folder(given: argparse.Namespace) -> Iterator[str]:
    truth, told = folders.read(given.table), protocol.file(given.table)
    asked = benchmark.by_path(truth, told, given.table.stem)
    networks = _looking(given)
    yield from extraction.views_of(networks)
    yield from _benchmark(given, asked, networks)


def _benchmark(
    given: argparse.Namespace, asked: benchmark.Benchmark, networks: Networks
) -> Iterator[str]:
    found = benchmark.evaluate(
        *(asked, given.images, given.work, networks),
        whole=given.whole,
        distractors=given.distractors,
        chain=given.chain and chains.load(given.chain),
        processes=given.workers,
    )
    yield from found.lines(asked.name)


def _convert(given: argparse.Namespace) -> Iterator[str]:
    truth = ground_truth.read(given.ground_truth)
    yield str(ground_truth.write(truth, given.out))


if __name__ == "__main__":
    main()
