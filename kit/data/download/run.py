"""The official files of GLDv2 -> a data folder that kit.data.readers and notebook 00 read.

`run` writes into a folder
- `train/images_000.tar`, ... as they are; or `train/a/b/c/<id>.jpg`; or `train/shard_000.tar`
  with the images shrunk. Of the last two the originals are deleted, one by one.
- the CSVs in their places, cut to the images that are there where not all are; `metadata/` has
  them whole. `train/country/`: the landmarks of each country.
- `bad.csv` (url, reason): what could not be had. `refused.csv` (tar, member, reason): what no
  tar of images should hold. `unreadable.csv` (path, reason), of shards.
- `download/`: `settings.json`, and of each tar that is done what came of it

The same call goes on where an earlier one ended, however it ended.
"""

import logging
import os
import re
from collections.abc import Container, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial

from tqdm import tqdm

from kit import files
from kit.data import tars
from kit.data.download import batch, forecast, official, parts, reports, tables, unpack
from kit.data.download.official import Official, Tar
from kit.data.download.order import Order, refuse
from kit.data.download.transfer import Client, Failed
from kit.data.readers import open_reader
from kit.text import in_a_line

log = logging.getLogger(__name__)

MD5 = re.compile(rb"[0-9a-f]{32}\b")


def run(
    order: Order,
    source: Official,
    client: Client,
    countries: Sequence[str],  # codes
    workers: int | None = None,  # threads that shrink; None: one a core
) -> list[Failed]:
    """Fetches what is not there yet; returns what could not be had, as `bad.csv` has it."""
    refuse(order, source)
    with files.lock(order.home):
        _settle(order, source)
        bad = _fetch_tables(order, source, client)
        if not bad:
            if "train" in order.splits:
                bad += _fetch_countries(order, source, client, countries)
            bad += _fetch_images(order, source, client, workers)
        # of earlier calls, too: the reports are of the folder
        whole = replace(order, splits=official.SPLITS, numbers=None)
        done = [tar for tar in whole.tars(source) if whole.is_done(tar)]
        records = {tar: files.read_json(order.record(tar)) for tar in done}
        reports.write(order.out, [(error.url, str(error)) for error in bad], records)
    log.info(reports.summary(records.values()))
    return bad


def cost(
    order: Order, source: Official, client: Client | None = None
) -> forecast.Forecast:
    """Of what remains; client: asks the server for the sizes of the tars."""
    share = order.landmarks / source.landmarks if order.landmarks else 1.0
    return forecast.forecast(
        source,
        order.remaining(source),
        order.kind,
        order.side,
        share,
        order.jobs,
        client,
    )


def _settle(order: Order, source: Official) -> None:
    """Refuses a folder with other settings, and sweeps what a killed run has left."""
    path = order.home / "settings.json"
    if path.exists():
        there = files.read_json(path)
        for name, value in order.settings.items():
            if there.get(name) != value:
                raise ValueError(
                    f"{order.out} holds a download with {name} {there.get(name)}, not "
                    f"{value}; give another folder"
                )
    else:
        files.write_json(path, order.settings)
    places = (order.out, order.home, order.metadata)
    for folder in (*places, *(p / split for p in places for split in order.splits)):
        files.sweep_parts(folder, deep=False)  # not into millions of images
    files.sweep_parts(order.out / "train" / "country")
    if order.kind != "tars":
        for tar in filter(order.is_done, order.tars(source)):
            order.original(tar).unlink(missing_ok=True)


def _fetch_tables(order: Order, source: Official, client: Client) -> list[Failed]:
    """The tables of the splits, or all where landmarks are chosen by them."""

    def fetch(place: str) -> None:
        columns = source.tables[place].columns
        check = partial(batch.is_table, columns=columns)
        client.fetch(source.table(place), order.metadata / place, check)

    splits = official.SPLITS if order.landmarks else order.splits
    places = [place for place in source.tables if place.split("/")[0] in splits]
    return batch.each(client, order.jobs, fetch, places, source.table)


def _fetch_countries(
    order: Order, source: Official, client: Client, codes: Sequence[str]
) -> list[Failed]:
    """A file for each country that has one; which have none is found out once."""
    known = order.home / "countries.json"
    absent = set(files.read_json(known)["absent"]) if known.exists() else set()

    def fetch(code: str) -> None:
        path = order.out / "train" / "country" / f"{code}.json"
        try:
            client.fetch(source.country(code), path, batch.is_list)
        except Failed as error:
            if not error.absent:
                raise
            absent.add(code)

    asked = [code for code in codes if code not in absent]
    bad = batch.each(client, order.jobs, fetch, asked, source.country)
    if codes and absent.issuperset(codes):
        told = f"none of {len(codes)} countries has a file there"
        return [Failed(source.country(codes[0]), told)]
    files.write_json(known, {"absent": sorted(absent)})
    return bad


def _fetch_images(
    order: Order, source: Official, client: Client, workers: int | None
) -> list[Failed]:
    part = None
    if order.landmarks:
        part = parts.choose(order.metadata, order.landmarks, order.seed)
        told = ", ".join(f"{len(part.ids[s])} of {s}" for s in order.splits)
        log.info(
            "%d landmarks, images: %s; all tars are read for them",
            *(len(part.landmarks), told),
        )
    splits = [s for s in order.splits if part is None or part.ids[s]]
    for split in sorted({*order.splits} - {*splits}):
        log.info("%s: no image of these landmarks, left out", split)
    order = replace(order, splits=splits)
    expected = cost(order, source)
    forecast.refuse_full_disk(expected, order.out, order.begun_bytes(source))
    with (
        ThreadPoolExecutor(workers or os.cpu_count()) as pool,
        tqdm(total=expected.bytes, unit="B", unit_scale=True, disable=None) as bar,
    ):
        client.meter = bar.update

        def fetch(tar: Tar) -> None:
            wanted = part.ids[tar.split] if part else None
            _fetch_tar(order, source, client, pool, wanted, tar)

        bad = batch.each(client, order.jobs, fetch, order.remaining(source), source.tar)
    _finish(order, source, part)
    return bad


def _fetch_tar(
    order: Order,
    source: Official,
    client: Client,
    pool: ThreadPoolExecutor,
    wanted: Container[str] | None,
    tar: Tar,
) -> None:
    """Brings one tar to its end; its record is written when all else is safe."""
    url, path = source.tar(tar), order.original(tar)
    told = client.read(source.md5(tar), 4096)
    if not (match := MD5.match(told.strip())):
        raise Failed(source.md5(tar), f"no MD5 in {told[:40]!r}")
    expected = match[0].decode()
    client.fetch(url, path, partial(batch.has_md5, expected=expected))
    try:
        found = unpack.contents(path, wanted)
        if order.kind == "tars" and found.refused:
            name, problem = next(iter(found.refused.items()))
            raise ValueError(
                f"member {name} {problem}; extracted or packed it is left out"
            )
    except ValueError as error:
        path.unlink()
        raise Failed(url, in_a_line(error, 300)) from None
    record = {"url": url, "bytes": path.stat().st_size, "md5": expected}
    record |= found.counts | {"images": len(found.images)}
    if order.kind == "images":
        unpack.extract(path, found, order.out / tar.split)
    elif order.kind == "shards":
        shard = order.shard(tar)
        record |= unpack.pack(path, found, shard, pool, order.side, order.quality)
    files.write_json(order.record(tar), record)
    if order.kind != "tars":
        path.unlink()


def _finish(order: Order, source: Official, part: parts.Part | None) -> None:
    """The index of the tars, and the tables of what is there."""
    if order.kind != "images" and tars.tars_in(order.out):
        tars.index(order.out)
    everything = replace(order, numbers=None)
    if part is None and not everything.remaining(source):
        return tables.copy(order.metadata, order.out, source, order.splits)
    exists = open_reader(order.out).exists
    chosen = part.landmarks if part else None
    rows = tables.write(order.metadata, order.out, source, order.splits, exists, chosen)
    for place, count in rows.items():
        log.info("%s: %d rows of what is there", place, count)
