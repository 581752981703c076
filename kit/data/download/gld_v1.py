"""The first generation's list of addresses -> its images, as the 2019 system took them.

Google's own servers are asked for pictures of 800 pixels. What is smaller than 256 pixels on
its shorter side, before or after, is dropped; the longer side is at most 800; JPEG of quality 90.

Definitions: 1st place of Google Landmark Retrieval 2019.
"""

import csv
import logging
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from itertools import islice
from pathlib import Path
from urllib.parse import urlsplit, urlunsplit

import cv2
import numpy as np
from tqdm import tqdm

from kit import files
from kit.data import tables
from kit.data.download import reports
from kit.data.download.tables import image_path
from kit.data.download.transfer import Client, Failed
from kit.data.images import decode
from kit.data.readers import UnreadableImage

log = logging.getLogger(__name__)

LONGEST, SHORTEST = 800, 256  # sides, pixels
QUALITY = 90
MOST = 1 << 26  # bytes of an answer
GOOGLE = re.compile(r"(^|\.)(ggpht|googleusercontent|google|blogspot)\.com$")
SIZE = re.compile(r"[swh]\d+(-[\w-]+)?")  # s1600, w1200-h900, s640-rw


def run(table: Path, out: Path, client: Client, threads: int) -> list[tuple[str, str]]:
    """table: id, url, landmark_id; returns address and reason of what could not be had.

    Images go to `gld_v1/a/b/c/<id>.jpg`, their rows to `gld_v1/train.csv`. Those that are there
    are not asked for again, nor those that were dropped: `download/gld_v1_dropped.csv`.
    """
    target = out / "gld_v1" / "train.csv"
    if target.exists() and target.samefile(table):
        raise ValueError(f"{table} is written here; give the list from another place")
    rows = tables.read_csv(table, ("id", "url", "landmark_id"))
    if (again := rows.loc[rows["id"].duplicated(), "id"]).any():
        raise ValueError(f"{table}: {again.iloc[0]} stands there more than once")
    with files.lock(out / "download"):
        journal = out / "download" / "gld_v1_dropped.csv"
        dropped = _read_journal(journal)
        paths = {name: out / image_path("gld_v1", name) for name in rows["id"]}
        asked = {
            name: url
            for name, url in zip(rows["id"], rows["url"], strict=True)
            if name not in dropped and not paths[name].exists()
        }
        bad = _fetch(client, asked, paths, journal, threads)
        there = rows[[paths[name].exists() for name in rows["id"]]]
        with files.replacing(target) as temporary:
            there.to_csv(temporary, index=False, lineterminator="\n")
        reports.rows(out / "bad.csv", ("url", "reason"), bad)
    log.info("%d of %d images are there, %d failed", len(there), len(rows), len(bad))
    return bad


def sized(url: str) -> str:
    """The address of Google's copy of 800 pixels, where the path says another size."""
    try:
        parts = urlsplit(url)
        host = parts.hostname or ""
    except ValueError:  # no address: whoever asks for it will be told
        return url
    folders = parts.path.split("/")
    if not GOOGLE.search(host) or len(folders) < 3 or not SIZE.fullmatch(folders[-2]):
        return url
    folders[-2] = f"s{LONGEST}"
    return urlunsplit(parts._replace(path="/".join(folders)))


def fit(image: np.ndarray) -> np.ndarray | None:
    """(H, W, 3) with its longer side at most 800; None where the shorter one is too small."""
    height, width = image.shape[:2]
    scale = min(1.0, LONGEST / max(height, width))
    size = round(width * scale), round(height * scale)
    if min(height, width, *size) < SHORTEST:
        return None
    if scale == 1:
        return image
    return cv2.resize(image, size, interpolation=cv2.INTER_AREA)


def _fetch(
    client: Client,
    asked: Mapping[str, str],
    paths: Mapping[str, Path],
    journal: Path,
    threads: int,
) -> list[tuple[str, str]]:
    bad: list[tuple[str, str]] = []
    with (
        ThreadPoolExecutor(threads) as pool,
        journal.open("a", newline="") as file,
        tqdm(total=len(asked), desc="gld_v1", disable=None) as bar,
    ):
        table = csv.writer(file, lineterminator="\n")

        def work(name: str) -> str:
            return _image(client, asked[name], paths[name])

        try:
            for name, future in _some_at_a_time(pool, work, asked, 4 * threads):
                try:
                    if reason := future.result():
                        table.writerow((name, reason))
                        file.flush()
                except (Failed, UnreadableImage) as error:
                    bad.append((asked[name], str(error)))
                bar.update()
        except BaseException:
            client.stop.set()
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return sorted(bad)


def _image(client: Client, url: str, path: Path) -> str:
    """Writes one image; what it returns is why it was dropped."""
    image = decode(client.read(sized(url), MOST), url)
    height, width = image.shape[:2]
    fitted = fit(image)
    if fitted is None:
        return f"{width} x {height} pixels"
    options = [cv2.IMWRITE_JPEG_QUALITY, QUALITY]
    _, data = cv2.imencode(".jpg", cv2.cvtColor(fitted, cv2.COLOR_RGB2BGR), options)
    with files.replacing(path) as temporary:
        temporary.write_bytes(data.tobytes())
    return ""


def _some_at_a_time(
    pool: ThreadPoolExecutor,
    work: Callable[[str], str],
    names: Iterable[str],
    most: int,
) -> Iterator[tuple[str, Future]]:
    """As they end; a future for each of a million rows would weigh gigabytes."""
    left, running = iter(names), {}
    while True:
        for name in islice(left, most - len(running)):
            running[pool.submit(work, name)] = name
        if not running:
            return
        for future in wait(running, return_when=FIRST_COMPLETED).done:
            yield running.pop(future), future


def _read_journal(path: Path) -> set[str]:
    """Ids that were dropped; a last line that was cut is cut off."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = path.read_text() if path.exists() else ""
    whole = text[: text.rfind("\n") + 1]
    if whole != text or not text:
        files.write_text(path, whole or "id,reason\n")
    return {line.split(",")[0] for line in whole.splitlines()[1:]}
