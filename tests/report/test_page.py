import base64
import io
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from PIL import Image

from kit.report.page import (
    THUMBNAIL,
    Example,
    Section,
    collage,
    curves,
    gain_chart,
    page,
    table,
)

HOSTILE = "<script>alert(1)</script>\"'><img onerror=x>&amp; $x^{ _"
RED = np.full((30, 200, 3), (200, 0, 0), np.uint8)


class Reader(HTMLParser):
    """What a browser would take from the markup."""

    def __init__(self, markup: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(markup)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def example(caption="query 1", labels=("1", "2")) -> Example:
    return Example(caption, RED, [RED, RED], [True, False], labels)


def sections(text: str) -> list[Section]:
    """Every kind of content, with `text` wherever text may come in."""
    line = {text: ([0, 1, 2], [3.0, 2.0, 1.5])}
    return [
        Section(
            text, text, table([text, "mAP@100"], [[text, 0.5], ["end", None]], [1])
        ),
        Section(text, "", gain_chart([text, "end"], [0.4, 0.5], [0.45, None])),
        Section("loss", text, curves(line, text, text)),
        Section("queries", "", collage([example(text, [text, text])])),
    ]


def pictures(markup: str) -> list[Image.Image]:
    return [
        Image.open(io.BytesIO(base64.b64decode(code)))
        for code in re.findall(r'data:image/\w+;base64,([^"]+)"', markup)
    ]


def test_the_page_asks_for_nothing_outside_itself(tmp_path):
    path = page(tmp_path / "report.html", "run", "lead", sections("step"))
    markup = path.read_text(encoding="utf-8")
    read = Reader(markup)
    addresses = [
        attributes[key]
        for _, attributes in read.tags
        for key in ("src", "srcset", "href")
        if key in attributes
    ]
    assert len(addresses) > 8
    assert all(address.startswith(("data:", "#")) for address in addresses)
    assert not read.all("script") and not read.all("iframe")
    assert "url(" not in markup and "@import" not in markup
    policy = next(meta for meta in read.all("meta") if "http-equiv" in meta)
    assert "default-src 'none'" in policy["content"]


def test_text_from_outside_stays_text(tmp_path):
    path = page(tmp_path / "report.html", HOSTILE, HOSTILE, sections(HOSTILE))
    hostile = Reader(path.read_text(encoding="utf-8"))
    harmless = Reader(
        page(path, "run", "lead", sections("step")).read_text(encoding="utf-8")
    )
    assert [tag for tag, _ in hostile.tags] == [tag for tag, _ in harmless.tags]
    assert [list(keys) for _, keys in hostile.tags] == [
        list(keys) for _, keys in harmless.tags
    ]
    around = 3  # the title twice and the lead
    assert hostile.text.count(HOSTILE) == harmless.text.count("step") + around


def test_every_picture_has_words(tmp_path):
    path = page(tmp_path / "report.html", "run", "lead", sections("step"))
    images = Reader(path.read_text(encoding="utf-8")).all("img")
    chart = "mAP@100 by step. step: public 0.4000, private 0.4500; "
    assert [image["alt"] for image in images] == [
        chart + "end: public 0.5000, private –",
        "step by step, one line each: step",
        "query: step",
        "hit: step",
        "miss: step",
    ]


def test_contents_lead_to_the_sections(tmp_path):
    path = page(tmp_path / "report.html", "run", "lead", sections("step"))
    read = Reader(path.read_text(encoding="utf-8"))
    links = [link["href"] for link in read.all("a")]
    assert links == ["#" + section["id"] for section in read.all("section")]
    assert len(links) == 4
    assert read.all("html") == [{"lang": "en"}]


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (0.53, "0.5300"),
        (np.float32(0.25), "0.2500"),
        (-0.0042, "-0.0042"),
        (0.0, "0.0000"),
        (0.00015, "0.00015"),
        (12345.5, "12,345.5000"),
        (1580470, "1,580,470"),
        (np.int64(12), "12"),
        (None, "–"),
        ("0012", "0012"),
        (True, "True"),
    ],
)
def test_table_shows_numbers_as_people_read_them(value, shown):
    assert f">{shown}</td>" in table(["value"], [[value]])


def test_table_aligns_numbers_and_marks_rows():  # worked by hand
    markup = table(["list", "images"], [["clean", 5], ["c2x", None]], emphasis={1})
    assert (
        '<th scope="col">list</th><th scope="col" class="number">images</th>' in markup
    )
    assert '<tr><td>clean</td><td class="number">5</td></tr>' in markup
    assert '<tr class="strong"><td>c2x</td><td class="number">–</td></tr>' in markup
    assert markup.startswith('<div class="scroll">')


def test_a_ragged_table_is_refused():
    with pytest.raises(ValueError, match="row 1 has 1 cells, the header 2"):
        table(["a", "b"], [[1, 2], [3]])


def test_emphasis_names_rows_that_exist():
    with pytest.raises(ValueError, match=r"emphasis on rows \[-1, 2\], there are 2"):
        table(["a"], [[1], [2]], emphasis=[0, 2, -1])


@pytest.mark.parametrize(
    ("results", "hits", "labels"), [(2, 1, 1), (1, 2, 1), (1, 1, 2), (0, 1, 0)]
)
def test_each_result_needs_a_hit_and_a_label(results, hits, labels):
    broken = Example("query 7", RED, [RED] * results, [True] * hits, ["1"] * labels)
    words = f"'query 7' has {results} results, {hits} hits and {labels} labels"
    with pytest.raises(ValueError, match=words):
        collage([example(), broken])


@pytest.mark.parametrize(
    "thumbnail", [RED / 255, RED[..., 0], RED[:0], RED[..., [0, 1, 2, 2]]]
)
def test_a_thumbnail_is_three_channels_of_bytes(thumbnail):
    with pytest.raises(ValueError, match=r"query: query 7: a thumbnail is uint8"):
        collage([Example("query 7", thumbnail, [], [], [])])


@pytest.mark.parametrize(
    ("shape", "size"),
    [
        ((400, 800), (THUMBNAIL, THUMBNAIL // 2)),
        ((800, 400), (THUMBNAIL // 2, THUMBNAIL)),
        ((1, 5000), (THUMBNAIL, 1)),
        ((20, 30), (30, 20)),  # never enlarged
    ],
)
def test_thumbnails_are_small_and_keep_their_shape(shape, size):
    image = np.random.default_rng(0).integers(0, 256, (*shape, 3), np.uint8)
    markup = collage([Example("noise", image, [image], [True], ["1"])])
    for picture in pictures(markup):
        picture.load()
        assert (picture.format, picture.mode, picture.size) == ("JPEG", "RGB", size)
    assert f'width="{size[0]}" height="{size[1]}"' in markup
    assert len(markup) < 60_000  # two pictures of noise, the worst there is


def test_thumbnails_keep_their_colours_and_their_array():
    before = RED.copy()
    flipped = RED[:, ::-1, ::-1]  # a view with negative strides, as from BGR
    query, result = pictures(collage([Example("red", RED, [flipped], [True], ["1"])]))
    np.testing.assert_allclose(np.asarray(query)[10, 10], (200, 0, 0), atol=3)
    np.testing.assert_allclose(np.asarray(result)[10, 10], (0, 0, 200), atol=3)
    np.testing.assert_array_equal(RED, before)


def test_hits_and_misses_differ_without_colour():
    markup = collage([example(labels=["first", "second"])])
    assert re.search(r'class="tile hit">.*alt="hit: first".*<b>✓</b> first', markup)
    assert re.search(r'class="tile miss">.*alt="miss: second".*<b>✗</b> second', markup)


def test_charts_come_for_a_desk_and_for_a_phone():
    markup = gain_chart(["a", "b"], [0.3, 0.4], [0.31, 0.42])
    phone, desk = pictures(markup)
    assert phone.format == desk.format == "PNG"
    assert phone.width < 800 < desk.width
    assert len(markup) < 60_000


def test_many_noisy_curves_stay_small():
    noise = np.random.default_rng(0).normal(size=10_000)
    series = {f"stage {n}": (range(10_000), noise + n) for n in range(4)}
    assert len(curves(series, "step", "loss")) < 250_000


def test_charts_need_values_for_every_name():
    with pytest.raises(ValueError, match="2 names, 2 public and 1 private values"):
        gain_chart(["a", "b"], [0.1, 0.2], [0.1])
    with pytest.raises(ValueError, match="clean has 3 x for 2 y values"):
        curves({"clean": ([1, 2, 3], [0.1, 0.2])}, "step", "loss")


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", ["$x^{", "_hidden", "", "two\nlines", "long " * 60])
def test_any_name_can_be_drawn(name):
    gain_chart([name, "b"], [0.1, None], [float("nan"), None])
    curves({name: ([1], [2.0]), "b": ([1, 2], [float("nan")] * 2)}, name, name)


def test_charts_neither_depend_on_the_style_in_use_nor_change_it():
    def draw():
        return gain_chart(["a"], [0.1], [0.2]) + curves({"a": ([0], [1])}, "x", "y")

    plain = draw()
    with matplotlib.rc_context({"font.size": 30, "axes.facecolor": "black"}):
        before = dict(matplotlib.rcParams)
        assert draw() == plain
        assert dict(matplotlib.rcParams) == before


def test_matplotlib_waits_for_the_first_chart_and_pyplot_is_left_alone():
    code = (
        "import sys\nfrom kit.report import page\nassert 'matplotlib' not in sys.modules\n"
        "page.gain_chart(['a'], [0.1], [0.2])\n"
        "assert 'matplotlib.pyplot' not in sys.modules\n"
    )
    root = Path(__file__).parents[2]
    subprocess.run([sys.executable, "-c", code], check=True, cwd=root)


def test_nothing_to_show_is_said(tmp_path):
    assert "No rows." in table(["a"], [])
    assert "No steps." in gain_chart([], [], [])
    assert "No points." in curves({}, "x", "y")
    assert "No points." in curves({"a": ([], [])}, "x", "y")
    assert "No examples." in collage([])
    assert "No results." in collage([Example("query 7", RED, [], [], [])])
    markup = page(tmp_path / "report.html", "run", "", []).read_text(encoding="utf-8")
    assert "<h1>run</h1>" in markup and "<nav" not in markup


def test_the_same_run_gives_the_same_page(tmp_path):
    first = page(tmp_path / "new" / "a.html", "run", "lead", sections("step"))
    second = page(tmp_path / "b.html", "run", "lead", sections("step"))
    assert first.read_bytes() == second.read_bytes()


def test_a_failed_write_leaves_the_old_page(tmp_path):
    path = page(tmp_path / "report.html", "old", "", [])
    before = path.read_bytes()
    with pytest.raises(UnicodeEncodeError):
        page(path, "new \ud800", "", [])  # half a surrogate pair cannot be written
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]
