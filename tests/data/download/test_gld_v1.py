import csv
import io

import numpy as np
import pytest
from PIL import Image

from kit.data import sources
from kit.data.download import gld_v1
from kit.data.images import decode
from tests.gldv2_stub import Fault

SIZES = {  # height, width by the last digits of the id
    1: (300, 400),
    2: (1000, 1600),
    3: (1600, 1000),
    4: (255, 900),  # too small at once
    5: (300, 1200),  # too small once it is shrunk
    6: (256, 800),
    7: (640, 2000),
    8: (257, 256),
}


def jpeg(height, width):
    rows = np.linspace(0, 255, height)[:, None, None] * np.ones((1, width, 3))
    buffer = io.BytesIO()
    Image.fromarray(rows.astype(np.uint8)).save(buffer, "JPEG", quality=95)
    return buffer.getvalue()


def name(number):
    return f"abc{number:013d}"


@pytest.fixture
def table(server, tmp_path):
    """A list of images of all sizes, and of addresses with nothing good behind them."""
    server.files |= {f"v1/{n}.jpg": jpeg(*size) for n, size in SIZES.items()}
    server.files |= {"v1/20.jpg": b"<html>", "v1/21.jpg": jpeg(300, 300)[:-99]}
    urls = {n: f"{server.url}/v1/{n}.jpg" for n in (*SIZES, 20, 21, 22)} | {23: "None"}
    path = tmp_path / "list.csv"
    lines = [f"{name(n)},{url},{n % 3}" for n, url in urls.items()]
    path.write_text("id,url,landmark_id\n" + "\n".join(lines) + "\n")
    return path


def path_of(out, number):
    return out / "gld_v1/a/b/c" / f"{name(number)}.jpg"


def rows(path):
    with path.open(newline="") as file:
        return list(csv.reader(file))[1:]


def test_images_come_as_2019_took_them(table, client, tmp_path, server):
    out = tmp_path / "out"
    bad = gld_v1.run(table, out, client, 3)
    assert {p.name for p in out.rglob("*.jpg")} == {
        f"{name(n)}.jpg" for n in (1, 2, 3, 6, 7, 8)
    }
    shapes = {
        n: decode(path_of(out, n).read_bytes(), "").shape[:2]
        for n in (1, 2, 3, 6, 7, 8)
    }
    assert shapes == {
        1: (300, 400),
        2: (500, 800),
        3: (800, 500),
        6: (256, 800),
        7: (256, 800),
        8: (257, 256),
    }
    image = Image.open(path_of(out, 2))
    assert image.format == "JPEG"
    reference = io.BytesIO()
    image.convert("RGB").save(reference, "JPEG", quality=90)
    assert image.quantization == Image.open(reference).quantization
    dropped = rows(out / "download/gld_v1_dropped.csv")
    assert sorted(dropped) == [
        [name(4), "900 x 255 pixels"],
        [name(5), "1200 x 300 pixels"],
    ]
    assert [url.split("/")[-1] for url, _ in bad] == [
        *("None", "20.jpg", "21.jpg", "22.jpg"),
    ]
    assert [list(pair) for pair in bad] == rows(out / "bad.csv")
    told = dict(bad)
    assert told[f"{server.url}/v1/22.jpg"] == "HTTP 404"
    assert told["None"] == "no address that can be asked for"
    assert "cut short" in told[f"{server.url}/v1/21.jpg"]
    kept = [row[0] for row in rows(out / "gld_v1/train.csv")]
    assert kept == [name(n) for n in (1, 2, 3, 6, 7, 8)]


def test_what_is_there_or_was_dropped_is_not_asked_for_again(
    table, client, tmp_path, server
):
    out = tmp_path / "out"
    gld_v1.run(table, out, client, 2)
    path_of(out, 1).write_bytes(b"mine")
    path_of(out, 2).unlink()
    journal = out / "download/gld_v1_dropped.csv"
    journal.write_text(
        journal.read_text() + "abc00000000000"
    )  # a killed run's last line
    server.heard.clear()
    server.files["v1/22.jpg"] = jpeg(300, 300)
    bad = gld_v1.run(table, out, client, 2)
    asked = sorted({path for _, path, _ in server.heard})
    assert asked == ["v1/2.jpg", "v1/20.jpg", "v1/21.jpg", "v1/22.jpg"]
    assert len(bad) == 3 and path_of(out, 22).exists()
    assert path_of(out, 1).read_bytes() == b"mine"
    assert len(rows(journal)) == 2


def test_a_busy_server_is_asked_again(table, client, tmp_path, server):
    server.faults["v1/1.jpg"] = [Fault(503), Fault(keep=99)]
    gld_v1.run(table, tmp_path / "out", client, 2)
    assert path_of(tmp_path / "out", 1).exists()


def test_many_images_come_with_few_at_a_time(client, tmp_path, server):
    server.files["v1/1.jpg"] = jpeg(300, 300)
    lines = [f"{name(n)},{server.url}/v1/1.jpg,1\n" for n in range(70)]
    (tmp_path / "list.csv").write_text("id,url,landmark_id\n" + "".join(lines))
    assert gld_v1.run(tmp_path / "list.csv", tmp_path / "out", client, 2) == []
    assert len([*(tmp_path / "out").rglob("*.jpg")]) == 70


def test_the_data_folder_reads_them_beside_gldv2(table, client, gldv2):
    gld_v1.run(table, gldv2, client, 2)
    facts = sources.read(gldv2)
    assert [*facts.gld_v1["id"]] == [name(n) for n in (1, 2, 3, 6, 7, 8)]
    assert [*facts.gld_v1["landmark_id"]] == [str(n % 3) for n in (1, 2, 3, 6, 7, 8)]
    assert all((gldv2 / path).is_file() for path in facts.gld_v1["path"])


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("http://lh4.ggpht.com/-aa/RA/s1600/", "http://lh4.ggpht.com/-aa/RA/s800/"),
        (
            "https://lh3.googleusercontent.com/-aa/s640-rw/x.jpg?a=1",
            "https://lh3.googleusercontent.com/-aa/s800/x.jpg?a=1",
        ),
        (
            "http://1.bp.blogspot.com/a/s90/b.jpg",
            "http://1.bp.blogspot.com/a/s800/b.jpg",
        ),
        ("http://mw2.google.com/mw/photos/1.jpg",) * 2,
        ("http://lh4.ggpht.com/-aa/sample/x",) * 2,
        ("http://lh4.ggpht.com/s1600",) * 2,
        ("http://example.com/s1600/x.jpg",) * 2,
        ("http://notggpht.com/a/s1600/x.jpg",) * 2,
        ("None", "None"),
        ("http://[", "http://["),
    ],
)
def test_google_is_asked_for_its_own_copy_of_800_pixels(url, expected):
    assert gld_v1.sized(url) == expected


def test_the_list_it_writes_is_not_the_list_it_reads(table, client, tmp_path):
    out = tmp_path / "out"
    gld_v1.run(table, out, client, 2)
    with pytest.raises(ValueError, match="give the list from another place"):
        gld_v1.run(out / "gld_v1/train.csv", out, client, 2)


@pytest.mark.parametrize("bad", ["../../../etc/passwd", "ABC", ""])
def test_an_id_that_names_no_file_is_refused(bad, table, client, tmp_path):
    table.write_text(f"id,url,landmark_id\n{bad},http://x,1\n")
    with pytest.raises(ValueError, match="is not an id of 16 hex digits"):
        gld_v1.run(table, tmp_path / "out", client, 2)


def test_an_id_that_stands_there_twice_is_refused_before_anything_is_fetched(
    table, client, tmp_path, server
):
    text = table.read_text()
    table.write_text(text + text.splitlines()[1] + "\n")
    with pytest.raises(ValueError, match="0001 stands there more than once"):
        gld_v1.run(table, tmp_path / "out", client, 2)
    assert server.heard == [] and not (tmp_path / "out").exists()
