"""Fetches GLDv2 from its official servers into a data folder; the same command goes on.

    python scripts/download_gldv2.py --out DATA --dry-run
    python scripts/download_gldv2.py --out DATA --stream-resize 512 --jobs 8
    python scripts/download_gldv2.py --out DATA --splits train --tars 0-9
    python scripts/download_gldv2.py --out DATA --stream-resize 512 --subset 1000
    python scripts/download_gldv2.py --out DATA --gld-v1 train.csv

What could not be had stands in DATA/bad.csv, and the exit code is 1.
"""

import argparse
import errno
import logging
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from kit.data import tables
from kit.data.download import forecast, gld_v1, official, run
from kit.data.download.order import Order, numbers, refuse
from kit.data.download.transfer import Client, Patience

META = ROOT / "datasets_meta"
FULL = (errno.ENOSPC, errno.EDQUOT)


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--out", type=Path, required=True, help="the data folder")
    add("--splits", nargs="+", default=[*official.SPLITS], metavar="SPLIT")
    add("--tars", type=numbers, help="of each split, such as 0-9,20 (default: all)")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--extract", action="store_true", help="images, no tars")
    form.add_argument(
        "--stream-resize",
        type=int,
        metavar="SIDE",
        help="shrink the shorter side and pack shards; each original is deleted at once",
    )
    add("--quality", type=int, default=Order.quality, help="of the shards' JPEGs")
    add("--subset", type=int, default=0, metavar="N", help="only N whole landmarks")
    add("--seed", type=int, help="draws the subset (default: the first in label order)")
    add("--jobs", type=int, default=Order.jobs, help="tars at a time, and on the disk")
    add("--workers", type=int, help="threads that shrink (default: one a core)")
    add("--gld-v1", type=Path, metavar="CSV", help="only GLD-v1, by id,url,landmark_id")
    add("--dry-run", action="store_true", help="print bytes and hours, write nothing")
    add("--rate", type=float, metavar="MB/S", help="for the hours of --dry-run")
    add("--host", default="", help="a mirror of the official server")
    add("--country-host", default="", help="a mirror of that of the countries")
    add("--tries", type=int, help="in a row that bring nothing (default: 8, GLD-v1 3)")
    add("--timeout", type=float, default=Patience.timeout, help="seconds of silence")
    add("--official", type=Path, default=META / "gldv2.json", help="patterns and sizes")
    given = parser.parse_args()
    if given.gld_v1 and given.dry_run:
        parser.error("--dry-run: what GLD-v1 costs is not known before it is there")
    for name in ("jobs", "workers", "rate", "tries", "timeout"):
        value = getattr(given, name)
        if value is not None and not value > 0:
            parser.error(f"--{name} is {value}, not above 0")
    return given


def order(given: argparse.Namespace) -> Order:
    kind = (
        "images"
        if given.extract
        else "shards"
        if given.stream_resize is not None
        else "tars"
    )
    return Order(
        given.out,
        given.splits,
        given.tars,
        kind,
        Order.side if given.stream_resize is None else given.stream_resize,
        given.quality,
        given.subset,
        given.seed,
        given.jobs,
    )


def fetch(given: argparse.Namespace) -> int:
    """The number of addresses that could not be had."""
    # many of the first generation's servers are gone for good
    tries = given.tries or (3 if given.gld_v1 else Patience.tries)
    client = Client(Patience(tries=tries, timeout=given.timeout))
    if given.gld_v1:
        return len(gld_v1.run(given.gld_v1, given.out, client, given.jobs))
    source = official.read(given.official, given.host, given.country_host)
    if given.dry_run:
        refuse(order(given), source)
        rate = given.rate * forecast.MB if given.rate else None
        cost = run.cost(order(given), source, client)
        print(*forecast.lines(cost, rate, forecast.free_bytes(given.out)), sep="\n")
        if given.subset:
            print("a subset is found by reading every tar: all are fetched")
        return 0
    codes = [*tables.read_continents(META / "continents.csv")]
    return len(run.run(order(given), source, client, codes, given.workers))


def main() -> None:
    given = options()
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    again = "the same command goes on"
    try:
        bad = fetch(given)
    except KeyboardInterrupt:
        sys.exit(f"interrupted; {again}")
    except OSError as error:
        if error.errno in FULL:
            sys.exit(f"{given.out}: the disk is full; make room, {again}")
        sys.exit(str(error))
    except (ValueError, RuntimeError) as error:
        sys.exit(str(error))
    if bad:
        sys.exit(f"{bad} files could not be had, see {given.out / 'bad.csv'}; {again}")


if __name__ == "__main__":
    main()
