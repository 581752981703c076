"""Numbers, curves and thumbnails of a run -> one HTML page that is whole by itself."""

import base64
import io
import math
import textwrap
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from numbers import Integral, Real
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from kit.files import write_text

if TYPE_CHECKING:
    from matplotlib.figure import Figure

THUMBNAIL = 160  # longest side of an embedded picture, pixels
WIDE, NARROW = 10.8, 3.7  # widths of a chart on a desk and on a phone, inches
LETTERS = 34  # of a name in a chart before it takes a second line
# Okabe and Ito's colours, which stay apart for colour-blind readers
PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")


@dataclass(frozen=True)
class Section:
    """A heading of the page and what stands under it."""

    title: str
    text: str  # a short paragraph, plain text
    body: str = ""  # HTML made by the functions below, joined with +


@dataclass(frozen=True)
class Example:
    """A query and what was found for it, best first; pictures are uint8 RGB (h, w, 3)."""

    caption: str
    query: np.ndarray
    results: Sequence[np.ndarray]
    hits: Sequence[bool]  # is the result relevant
    labels: Sequence[str]  # what stands under a result, such as its score


def table(
    header: Sequence[str],
    rows: Sequence[Sequence[object]],
    emphasis: Collection[int] = (),
) -> str:
    """Columns with numbers are right-aligned, None is a dash.

    `emphasis` are the rows in bold, counted from 0.
    """
    for number, row in enumerate(rows):
        if len(row) != len(header):
            raise ValueError(
                f"table: row {number} has {len(row)} cells, the header {len(header)}"
            )
    if unknown := sorted(set(emphasis) - set(range(len(rows)))):
        raise ValueError(f"table: emphasis on rows {unknown}, there are {len(rows)}")
    if not rows:
        return _nothing("No rows.")
    classes = [
        ' class="number"' if any(map(_is_number, column)) else ""
        for column in zip(*rows, strict=True)
    ]
    head = "".join(
        f'<th scope="col"{c}>{escape(str(name))}</th>'
        for name, c in zip(header, classes, strict=True)
    )
    lines = []
    for number, row in enumerate(rows):
        cells = zip(row, classes, strict=True)
        line = "".join(f"<td{c}>{escape(_plain(value))}</td>" for value, c in cells)
        strong = ' class="strong"' if number in emphasis else ""
        lines.append(f"<tr{strong}>{line}</tr>\n")
    return (
        f'<div class="scroll"><table>\n<thead><tr>{head}</tr></thead>\n'
        f"<tbody>\n{''.join(lines)}</tbody>\n</table></div>\n"
    )


def gain_chart(
    names: Sequence[str],
    public: Sequence[float | None],
    private: Sequence[float | None],
    measure: str = "mAP@100",
) -> str:
    """The measure after each step, first step on top; None is a half that was not measured."""
    if not len(names) == len(public) == len(private):
        raise ValueError(
            f"gain_chart: {len(names)} names, {len(public)} public and "
            f"{len(private)} private values; each step needs one of each"
        )
    if not names:
        return _nothing("No steps.")
    halves = np.array([public, private], dtype=float)  # None becomes NaN
    places = range(len(names))

    def draw(figure: "Figure", width: float) -> None:
        wide, wrapped = width == WIDE, _wrapped(names)
        lines = max(map(_lines, wrapped)) + (not wide)
        figure.set_size_inches(width, 1 + len(names) * (0.2 + 0.17 * lines))
        axes = figure.add_subplot()
        axes.hlines(places, *halves, color="#bbbbbb", linewidth=2, zorder=1)
        handles = [
            axes.scatter(values, places, s=60, c=color, marker=marker, zorder=2)
            for values, color, marker in zip(halves, PALETTE, "oD", strict=False)
        ]
        for place, pair in zip(places, halves.T, strict=True):
            measured = sorted({value for value in pair if np.isfinite(value)})
            for value, side in zip(reversed(measured), (1, -1), strict=False):
                axes.annotate(
                    f"{value:.4f}",
                    (value, place),
                    (side * 8, 0),
                    textcoords="offset points",
                    ha="left" if side > 0 else "right",
                    va="center",
                )
        axes.set_yticks(places, wrapped if wide else [""] * len(names))
        if not wide:  # no room on the left: each name stands above its dots
            left = axes.get_yaxis_transform()
            for place, name in zip(places, wrapped, strict=True):
                above = {"textcoords": "offset points", "va": "bottom"}
                axes.annotate(name, (0, place), (0, 10), xycoords=left, **above)
        axes.set_ylim(len(names) - 0.4, -0.6 if wide else -1)
        axes.margins(x=0.1 if wide else 0.3)  # room for the numbers
        axes.locator_params(axis="x", nbins=8 if wide else 5)
        axes.grid(axis="y", visible=False)
        axes.set_xlabel(measure)
        figure.legend(handles, ["public", "private"], loc="outside upper left", ncols=2)

    steps = zip(names, public, private, strict=True)
    told = "; ".join(
        f"{n}: public {_plain(a)}, private {_plain(b)}" for n, a, b in steps
    )
    return _chart(draw, f"{measure} by step. {told}")


def curves(
    series: Mapping[str, tuple[Sequence[float], Sequence[float]]], x: str, y: str
) -> str:
    """A line a name through its (x values, y values); what is not finite leaves a gap."""
    for name, (xs, ys) in series.items():
        if len(xs) != len(ys):
            raise ValueError(f"curves: {name} has {len(xs)} x for {len(ys)} y values")
    if not any(len(xs) for xs, _ in series.values()):
        return _nothing("No points.")
    dashes = ("-", "--", ":", "-.")

    def draw(figure: "Figure", width: float) -> None:
        wide, names = width == WIDE, _wrapped(series)
        longest = min(LETTERS, max(map(len, names))) + 6  # and its handle
        columns = int(11 * width / longest) or 1  # 11 letters an inch
        legend = sorted(map(_lines, names))[-math.ceil(len(names) / columns) :]
        figure.set_size_inches(width, (3.8 if wide else 2.6) + 0.2 * sum(legend))
        axes = figure.add_subplot()
        handles = []
        for number, (xs, ys) in enumerate(series.values()):
            turn, color = divmod(number, len(PALETTE))
            handles += axes.plot(
                np.asarray(xs, dtype=float),
                np.asarray(ys, dtype=float),
                color=PALETTE[color],
                linestyle=dashes[turn % len(dashes)],
                marker="o" if len(xs) <= 20 else None,
            )
        axes.set(xlabel=x, ylabel=y)
        axes.locator_params(axis="x", nbins=9 if wide else 4)
        figure.legend(handles, names, loc="outside upper left", ncols=columns)

    return _chart(draw, f"{y} by {x}, one line each: {', '.join(series)}")


def collage(examples: Sequence[Example]) -> str:
    """A row a query: the query, then its results framed and marked as hit or miss."""
    if not examples:
        return _nothing("No examples.")
    return (
        '<p class="key"><span class="hit"><b>✓</b> hit</span> '
        '<span class="miss"><b>✗</b> miss</span></p>\n'
        + "".join(map(_example, examples))
    )


def page(path: Path, title: str, lead: str, sections: Sequence[Section]) -> Path:
    """Writes the whole page or leaves the old one; `title` and `lead` are plain text."""
    links, parts = [], []
    for number, section in enumerate(sections, 1):
        heading = escape(section.title)
        links.append(f'<li><a href="#s{number}">{heading}</a></li>')
        parts.append(
            f'<section id="s{number}">\n<h2>{heading}</h2>\n'
            f"{_paragraph(section.text)}{section.body}</section>\n"
        )
    contents = f'<nav aria-label="Contents"><ol>{"".join(links)}</ol></nav>\n'
    return write_text(
        path,
        f"{_HEAD}<title>{escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
        f"<header>\n<h1>{escape(title)}</h1>\n{_paragraph(lead, 'lead')}"
        f"{contents if len(links) > 1 else ''}</header>\n"
        f"<main>\n{''.join(parts)}</main>\n</body>\n</html>\n",
    )


def _example(example: Example) -> str:
    counts = len(example.results), len(example.hits), len(example.labels)
    if len(set(counts)) > 1:
        raise ValueError(
            "collage: {!r} has {} results, {} hits and {} labels; "
            "each result needs one of each".format(example.caption, *counts)
        )
    tiles = [_tile(example.query, "query", "query", "", f"query: {example.caption}")]
    for image, hit, label in zip(
        example.results, example.hits, example.labels, strict=True
    ):
        kind, mark = ("hit", "✓") if hit else ("miss", "✗")
        tiles.append(_tile(image, kind, mark, label, f"{kind}: {label}"))
    if not example.results:
        tiles.append(_nothing("No results."))
    return (
        f'<figure class="example">\n<figcaption>{escape(example.caption)}</figcaption>\n'
        f'<div class="tiles">\n{"".join(tiles)}</div>\n</figure>\n'
    )


def _tile(image: np.ndarray, kind: str, mark: str, label: str, alt: str) -> str:
    if image.dtype != np.uint8 or image.shape[2:] != (3,) or 0 in image.shape:
        raise ValueError(
            f"collage: {alt}: a thumbnail is uint8 (h, w, 3), not {image.dtype} {image.shape}"
        )
    small = Image.fromarray(image)
    small.thumbnail((THUMBNAIL, THUMBNAIL), Image.Resampling.LANCZOS)
    file = io.BytesIO()
    small.save(file, "JPEG", quality=82, optimize=True)
    return (
        f'<div class="tile {kind}"><img src="{_data("jpeg", file)}" alt="{escape(alt)}" '
        f'width="{small.width}" height="{small.height}">'
        f"<span><b>{mark}</b> {escape(label)}</span></div>\n"
    )


def _chart(draw: Callable[["Figure", float], None], alt: str) -> str:
    """The figure drawn for a desk and for a phone; the browser takes the one that fits."""
    from matplotlib import style
    from matplotlib.figure import Figure

    pictures = []
    for width in (WIDE, NARROW):
        with style.context(["default", _FIGURE]):  # whatever style the caller is using
            figure = Figure(layout="constrained")
            draw(figure, width)
            file = io.BytesIO()
            figure.savefig(file, dpi=192, transparent=True)
        small = io.BytesIO()
        with Image.open(file) as image:  # a palette takes a third of the bytes
            keeps_alpha = Image.Quantize.FASTOCTREE
            image.quantize(256, keeps_alpha, dither=Image.Dither.NONE).save(
                small, "PNG"
            )
        pictures.append(_data("png", small))
    wide, narrow = pictures
    return (
        f'<picture class="chart"><source media="(max-width: 640px)" srcset="{narrow}">'
        f'<img src="{wide}" alt="{escape(alt)}"></picture>\n'
    )


def _wrapped(names: Iterable[str]) -> list[str]:
    return [textwrap.fill(name, LETTERS) for name in names]


def _lines(text: str) -> int:
    return 1 + text.count("\n")


def _data(kind: str, file: io.BytesIO) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}"


def _plain(value: object) -> str:
    if value is None:
        return "–"
    if not _is_number(value):
        return str(value)
    if isinstance(value, Integral):
        return f"{int(value):,}"
    number = float(value)
    # four decimals would show a learning rate of 0.00015 as 0.0001
    return f"{number:.3g}" if 0 < abs(number) < 1e-3 else f"{number:,.4f}"


def _is_number(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _paragraph(text: str, kind: str = "text") -> str:
    return f'<p class="{kind}">{escape(text)}</p>\n' if text else ""


def _nothing(text: str) -> str:
    return _paragraph(text, "nothing")


_FIGURE = {
    "font.size": 11,
    "text.parse_math": False,  # a $ in a name is a dollar
    "text.color": "#222222",
    "axes.labelcolor": "#222222",
    "axes.edgecolor": "#999999",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#d4d4d4",
    "xtick.color": "#999999",
    "xtick.labelcolor": "#222222",
    "ytick.labelcolor": "#222222",
    "ytick.left": False,
    "lines.linewidth": 1.5,
    "lines.markersize": 4,
    "legend.frameon": False,
    "legend.handlelength": 1.4,
}

# the policy forbids every request and every script, whatever a section contains
_HEAD = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<link rel="icon" href="data:,">
"""

_STYLE = """
:root { --ink: #1d2024; --soft: #5b626b; --line: #dfe2e6; --wash: #f4f5f7; --page: #fff;
  --link: #0b63a5; --hit: #00805d; --miss: #c04f00; }
@media screen and (prefers-color-scheme: dark) {
  :root { --ink: #e4e6e9; --soft: #a0a7b0; --line: #343a42; --wash: #20242a; --page: #15181c;
    --link: #6cb6f0; --hit: #2fc596; --miss: #ff8b4a; }
  .chart { filter: invert(1) hue-rotate(180deg); }
}
* { box-sizing: border-box; }
body { max-width: 1100px; margin: 0 auto; padding: 40px 32px 64px; color: var(--ink);
  background: var(--page); font: 16px/1.55 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { margin: 0; font-size: 2rem; line-height: 1.2; letter-spacing: -.01em; }
h2 { margin: 0 0 8px; font-size: 1.3rem; line-height: 1.3; }
p { margin: 0 0 20px; max-width: 72ch; }
a { color: var(--link); text-underline-offset: 3px; }
.lead { margin-top: 12px; color: var(--soft); font-size: 1.1rem; }
.nothing { color: var(--soft); font-style: italic; }
nav ol { display: flex; flex-wrap: wrap; gap: 4px 24px; margin: 0; padding: 12px 0;
  border: solid var(--line); border-width: 1px 0; list-style: none; font-size: .95rem; }
section { margin-top: 48px; }
.scroll { max-width: 100%; margin-bottom: 24px; overflow-x: auto; }
table { min-width: min(100%, 480px); border-collapse: collapse; overflow-wrap: normal;
  font-size: .95rem; font-variant-numeric: tabular-nums; }
th, td { padding: 7px 32px 7px 8px; border-bottom: 1px solid var(--line); text-align: left;
  vertical-align: baseline; }
th { color: var(--soft); font-size: .85rem; font-weight: 600; vertical-align: bottom; }
.number { padding: 7px 8px 7px 24px; text-align: right; white-space: nowrap; }
.strong td { background: var(--wash); font-weight: 650; }
.chart { display: block; margin-bottom: 24px; }
.chart img { display: block; width: 100%; max-width: 1036px; height: auto; }
.key { font-size: .9rem; }
.key span { margin-right: 16px; }
.hit b { color: var(--hit); }
.miss b { color: var(--miss); }
.example { margin: 0 0 28px; break-inside: avoid; }
figcaption { margin-bottom: 8px; max-width: 90ch; }
.tiles { display: grid; grid-template-columns: repeat(auto-fill, minmax(104px, 1fr));
  gap: 12px 8px; }
.tile img { display: block; width: 100%; height: auto; aspect-ratio: 1; object-fit: contain;
  border: 3px solid var(--soft); border-radius: 4px; background: var(--wash); }
.tile.hit img { border-color: var(--hit); }
.tile.miss img { border-color: var(--miss); }
.tile span { display: block; margin-top: 3px; font-size: .8rem; line-height: 1.35; }
@media (max-width: 640px) {
  body { padding: 24px 16px 48px; }
  h1 { font-size: 1.6rem; }
  th, td { padding-right: 16px; }
  td:first-child { min-width: 8rem; }
  .number { padding: 7px 4px 7px 16px; }
}
@media print {
  body { max-width: none; padding: 0; font-size: 11pt; }
  h2, .text, .key { break-after: avoid; }
  tr, .chart { break-inside: avoid; }
  .tiles { grid-template-columns: repeat(auto-fill, minmax(64px, 1fr)); }
}
"""
