"""Hostile and damaged tars and pictures: our own errors, and nothing outside the folder."""

import io
import os
import struct
import tarfile
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from kit.data import images, jpeg, tars
from kit.data.download import unpack
from kit.data.readers import UnreadableImage

BLOCK = 512
# 300 in passing; 10,000 in all with those marked slow
TARS = [150, pytest.param(3000, marks=pytest.mark.slow)]
PICTURES = [150, pytest.param(7000, marks=pytest.mark.slow)]


def fuzz(examples):
    """The same examples every time."""
    return settings(
        max_examples=examples,
        derandomize=True,
        deadline=None,
        database=None,
        suppress_health_check=[*HealthCheck],
    )


def picture(kind="JPEG", mode="RGB", **options):
    rows = np.arange(24 * 20 * 3, dtype=np.uint8).reshape(24, 20, 3)
    buffer = io.BytesIO()
    Image.fromarray(rows).convert(mode).save(buffer, kind, **options)
    return buffer.getvalue()


def tagged():
    tags = Image.Exif()
    tags[0x0112] = 6
    return picture(exif=tags)


SEEDS = [
    *(picture(), tagged(), picture(mode="L"), picture(mode="CMYK")),
    *(picture(progressive=True), picture("PNG"), picture("PNG", "P")),
    *(picture("WEBP"), picture("GIF"), picture("BMP"), picture("TIFF"), b""),
]
# --- tars ---------------------------------------------------------------------------------------

OFFICIAL = [f"{n}/{n}/{n}/{n}{n}{n}{n:013d}.jpg" for n in range(4)]
KINDS = [
    *(tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE),
    *(tarfile.DIRTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE),
    *(tarfile.CONTTYPE, tarfile.GNUTYPE_SPARSE, b"Z"),
]
PAX = [
    *(b"GNU.sparse.major=1", b"GNU.sparse.map=1,b", b"GNU.sparse.size=q", b"size=-5"),
    *(b"size=-1536", b"size=abc", b"size=99999999999999999999999", b"path=\xff\xfe"),
    *(b"path=../../escaped.jpg", b"linkpath=/etc", b"hdrcharset=BINARY", b"mtime=nan"),
]
FIELDS = [(0, 100), (100, 8), (124, 12), (136, 12), (148, 8), (156, 1), (257, 8)]
FIELDS += [(345, 155), (482, 2), (483, 12)]
VALUES = [
    *(
        b"\x80" + b"\xff" * 11,
        b"\xff" * 12,
        b"7" * 12,
        b"../" * 34,
        b"/" * 9,
        b"\0" * 12,
    ),
    *(
        b"L",
        b"K",
        b"x",
        b"g",
        b"S",
        b"1",
        b"2",
        b"5",
        b"-1",
        b"\x80" + b"\0" * 10 + b"\2",
    ),
]


def names(outside):
    escapes = [
        *("../escaped.jpg", "0/../../../escaped.jpg", f"{outside}/escaped.jpg"),
        *("./../escaped.jpg", "..", ".", "", "//x", "0/0", "a\\..\\b.jpg", "x" * 150),
        *("0/0/0/0000000000000000.jpg/../../../../../escaped.jpg", "Ü/é.jpg"),
    ]
    return st.sampled_from([*OFFICIAL, *("./" + name for name in OFFICIAL), *escapes])


def members(outside):
    data = st.sampled_from([SEEDS[0], SEEDS[0][:200], b"", b"x" * 700])
    links = st.sampled_from(["/etc/passwd", "../..", str(outside), OFFICIAL[0]])
    return st.tuples(names(outside), st.sampled_from(KINDS), links, data)


def build(found, form):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=form) as archive:
        for name, kind, link, data in found:
            member = tarfile.TarInfo(name)
            member.type, member.linkname, member.size = kind, link, len(data)
            archive.addfile(member, io.BytesIO(data))
    return buffer.getvalue()


def damage(whole, at, how, value, field):
    """The tar with one damage; of a damaged header the checksum is right again."""
    data = bytearray(whole)
    if how == "byte":
        data[at % len(data)] ^= 1 + value[0] % 255
    elif how == "cut":
        del data[at % len(data) :]
    elif how == "header":
        block = at % (len(data) // BLOCK) * BLOCK
        first, size = field
        data[block + first : block + first + len(value[:size])] = value[:size]
        data[block + 148 : block + 156] = b" " * 8
        told = sum(data[block : block + BLOCK])
        data[block + 148 : block + 156] = b"%06o\0 " % told
    else:
        text = b"%d " % (len(value) + 4) + value + b"\n"
        extra = tarfile.TarInfo("pax")
        extra.type, extra.size = tarfile.XHDTYPE, len(text)
        block = at % (len(data) // BLOCK) * BLOCK
        header = extra.tobuf(tarfile.USTAR_FORMAT)
        data[block:block] = header + text.ljust(BLOCK, b"\0")
    return bytes(data)


def damages():
    at, field = st.integers(0, 1 << 20), st.sampled_from(FIELDS)
    plain = st.sampled_from(["byte", "cut", "header", "header", "header"])
    return st.one_of(
        st.tuples(at, plain, st.sampled_from(VALUES), field),
        st.tuples(at, st.just("pax"), st.sampled_from(PAX), field),
    )


def there(folder):
    """Everything below a folder that is not what the test put there."""
    return {p for p in folder.rglob("*") if p.is_symlink() or not p.is_dir()}


@pytest.mark.parametrize("examples", TARS)
def test_from_no_tar_anything_gets_out_of_its_folder(examples, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "sync", lambda: None)  # of the whole machine, each time
    outer = tmp_path / "outer"
    tar = outer / "in" / "images_000.tar"
    tar.parent.mkdir(parents=True)
    (outer / "secret").write_bytes(b"secret")
    forms = st.sampled_from([tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
    ends = {"good": 0, "refused": 0}
    pool = ThreadPoolExecutor(1)

    @fuzz(examples)
    @given(st.lists(members(outer), max_size=6), forms, st.lists(damages(), max_size=3))
    def check(found, form, damaged):
        data = build([(OFFICIAL[0], b"0", "", SEEDS[0]), *found], form)
        for at, how, value, field in damaged:
            if len(data) >= 2 * BLOCK:
                data = damage(data, at, how, value, field)
        tar.write_bytes(data)
        folder = outer / "out" / "train"
        try:
            inside = unpack.contents(tar)
        except ValueError as error:
            assert str(tar) in str(error)
            ends["refused"] += 1
        else:
            ends["good"] += 1
            assert all(map(unpack.IMAGE.fullmatch, inside.images))
            unpack.extract(tar, inside, folder)
            shard = folder / "shard_000.tar"
            record = unpack.pack(tar, inside, shard, pool, 16, 90)
            written = {folder / name for name in inside.images} | {shard}
            assert there(outer) == {tar, outer / "secret"} | written
            assert record["images"] + len(record["unreadable"]) == len(inside.images)
            assert not any(member.problem for member in tars.walk(shard))
            for path in written:
                path.unlink()
        assert there(outer) == {tar, outer / "secret"}
        assert (outer / "secret").read_bytes() == b"secret"

    check()
    assert min(ends.values()) > examples / 20  # both ends were tried


def with_header(tmp_path, *parts):
    """A tar of one image, the given bytes, and another image."""
    good = build([(OFFICIAL[0], b"0", "", SEEDS[0])], tarfile.USTAR_FORMAT)
    good = good[: 2 * BLOCK + len(SEEDS[0]) // BLOCK * BLOCK]
    path = tmp_path / "a.tar"
    path.write_bytes(good + b"".join(parts) + good + bytes(2 * BLOCK))
    return path


def extended(text, kind=tarfile.XHDTYPE):
    member = tarfile.TarInfo("extra")
    member.type, member.size = kind, len(text)
    return member.tobuf(tarfile.GNU_FORMAT) + text.ljust(BLOCK, b"\0")


@pytest.mark.parametrize(
    "parts",
    [
        [extended(b"22 GNU.sparse.size=q\n"), extended(b"18 size=-1000000\n")],
        [extended(b"19 GNU.sparse.map=b\n")],
        [extended(b"14 size=-1536\n")],
        [extended(b"27 size=99999999999999999999\n")],
        [extended(b"a\0", tarfile.GNUTYPE_LONGNAME)] * 3000,
    ],
    ids=["number", "map", "back", "large", "deep"],
)
def test_a_header_that_makes_no_sense_is_refused_by_the_tars_name(parts, tmp_path):
    path = with_header(tmp_path, *parts)
    with pytest.raises(ValueError, match=r"a.tar: damaged or cut short"):
        [*tars.walk(path)]


def test_the_good_members_around_are_those_of_any_tar(tmp_path):
    """What the test above damages is a whole tar without the damage."""
    assert len([*tars.walk(with_header(tmp_path))]) == 2


# --- pictures -----------------------------------------------------------------------------------


def mutated():
    """A picture with a few damages."""
    spots = st.integers(0, 1 << 16)
    change = st.tuples(
        st.sampled_from(["set", "set", "cut", "drop", "double", "word", "random"]),
        *(spots, st.integers(0, 255), st.integers(1, 64)),
    )
    return st.tuples(st.sampled_from(SEEDS), st.lists(change, min_size=1, max_size=5))


def changed(data, changes):
    data = bytearray(data)
    for how, spot, value, size in changes:
        at = spot % (len(data) + 1)
        if how == "set":
            data[at : at + 1] = bytes([value])
        elif how == "cut":
            del data[at:]
        elif how == "drop":
            del data[at : at + size]
        elif how == "double":
            data[at:at] = data[at : at + size]
        elif how == "word":  # a length or a size
            data[at : at + 2] = bytes([value, 255 - value])
        else:
            data[at : at + size] = np.random.default_rng(spot).bytes(size)
    return bytes(data)


@pytest.mark.filterwarnings("ignore")  # of Pillow, about what is wrong here
@pytest.mark.parametrize("examples", PICTURES)
def test_no_bytes_make_the_decoder_fail_otherwise_than_by_saying_so(examples):
    ends = {"good": 0, "refused": 0}

    @fuzz(examples)
    @given(mutated())
    def check(found):
        data = changed(*found)
        try:
            image = images.decode(data, "x.jpg")
        except UnreadableImage as error:
            assert str(error).startswith("x.jpg: ")
            ends["refused"] += 1
        else:
            assert image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3
            ends["good"] += 1
        height, width = images.header_size(data)
        assert (height, width) == (-1, -1) or min(height, width) >= 0
        jpeg.parse(data)
        jpeg.turned(data)

    check()
    assert min(ends.values()) > examples / 20


def claiming(height, width, kind):
    """A whole, tiny file whose header speaks of another picture."""
    data = bytearray(picture(kind))
    if kind == "JPEG":
        at = data.find(b"\xff\xc0") + 5
        data[at : at + 4] = struct.pack(">HH", height, width)
    elif kind == "PNG":
        data[16:24] = struct.pack(">II", width, height)
        data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    else:
        data[6:10] = struct.pack("<HH", width, height)
    return bytes(data)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF"])
def test_a_tiny_file_that_claims_gigabytes_is_refused_unread(kind, monkeypatch):
    data = claiming(16_000, 60_000, kind)
    monkeypatch.setattr(images.cv2, "imdecode", None)  # it would reserve them
    with pytest.raises(
        UnreadableImage, match=r"x: claims more than 178,956,970 pixels"
    ):
        images.decode(data, "x")
    assert images.header_size(data) == (-1, -1)


def test_a_large_picture_is_still_read():
    side = 2000
    assert side * side < images.LARGEST < 4 * 178_956_970
    buffer = io.BytesIO()
    Image.new("RGB", (side, side)).save(buffer, "JPEG")
    assert images.decode(buffer.getvalue(), "x").shape == (side, side, 3)


@pytest.mark.parametrize("claimed", [1 << 30, (1 << 32) - 1, 1000])
def test_a_png_whose_parts_lead_beyond_its_end_is_cut_short(claimed):
    data = bytearray(picture("PNG"))
    at = data.find(b"IDAT") - 4
    data[at : at + 4] = struct.pack(">I", claimed)
    with pytest.raises(UnreadableImage, match="cut short"):
        images.decode(bytes(data), "x")
