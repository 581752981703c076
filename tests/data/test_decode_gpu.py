import dataclasses
import io

import cv2
import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from kit.data.augment import Augment, augment
from kit.data.decode_gpu import JpegImages, collate, decode_batch, draw, on_device
from kit.data.images import TrainImages, decode, in_worker
from kit.data.inputs import InputSpec
from kit.data.readers import UnreadableImage

pytestmark = pytest.mark.filterwarnings("ignore:The image decoding and encoding")
CPU = torch.device("cpu")
MEAN = (0.2, 0.5, 0.9)


def scene(height, width, seed=0):
    noise = np.random.default_rng(seed).integers(0, 256, (height, width, 3))
    return cv2.GaussianBlur(noise.astype(np.uint8), (9, 9), 3)


def encoded(pixels, kind="JPEG", **options):
    buffer = io.BytesIO()
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def oriented(pixels, orientation):
    tags = Image.Exif()
    tags[0x0112] = orientation
    return encoded(pixels, exif=tags)


def broken(pixels):
    """Whole by its markers, but without the tables that a decoder needs."""
    data = bytearray(encoded(pixels))
    data[data.find(b"\xff\xc4") + 4] = 0x77
    return bytes(data)


# Decoding

PICTURE = scene(40, 60)
PLAIN = {
    "plain": encoded(PICTURE),
    "progressive": encoded(PICTURE, progressive=True),
    "grey": encoded(Image.fromarray(PICTURE).convert("L")),
    "upright": oriented(PICTURE, 1),
}
REFUSED = {
    "png": encoded(PICTURE, "PNG"),
    "webp": encoded(PICTURE, "WEBP"),
    "cmyk": encoded(Image.fromarray(PICTURE).convert("CMYK")),
    "stored as rgb": encoded(PICTURE, keep_rgb=True),
    "turned": oriented(PICTURE, 6),
    "mirrored": oriented(PICTURE, 2),
}
BROKEN = {
    "cut short": encoded(PICTURE)[:-50],
    "text": b"<html>404</html>",
    "empty": b"",
    "no tables": broken(PICTURE),
}


@pytest.mark.parametrize("name", [*PLAIN, *REFUSED])
def test_every_readable_file_is_decoded_as_on_the_cpu(name):
    data = (PLAIN | REFUSED)[name]
    (image,), fallbacks = decode_batch([data], CPU)
    expected = torch.from_numpy(decode(data, "x")).permute(2, 0, 1)
    assert image.dtype == torch.uint8 and image.shape == expected.shape
    assert (image.int() - expected.int()).abs().max() <= 2
    assert fallbacks == (name in REFUSED)


@pytest.mark.parametrize("name", BROKEN)
def test_a_file_that_no_decoder_takes_is_none(name):
    (image,), fallbacks = decode_batch([BROKEN[name]], CPU)
    assert image is None and fallbacks == 1


def test_one_bad_file_leaves_the_others_of_its_batch_as_they_are():
    data = [BROKEN["no tables"], PLAIN["plain"], REFUSED["turned"], PLAIN["plain"]]
    images, fallbacks = decode_batch(data, CPU)
    assert [image is None for image in images] == [True, False, False, False]
    assert fallbacks == 2
    expected = torch.from_numpy(decode(PLAIN["plain"], "x")).permute(2, 0, 1)
    for image in images[1::2]:
        assert (image.int() - expected.int()).abs().max() <= 2
    assert images[2].shape == (3, 60, 40)
    assert decode_batch([], CPU) == ([], 0)


# From a list to a batch


@pytest.fixture
def folder(tmp_path):
    """Eight pictures of 32 x 32: rows 2 and 5 cannot be read, row 6 is no JPEG."""
    for row in range(8):
        kind = "PNG" if row == 6 else "JPEG"
        data = encoded(scene(32, 32, row), kind, **{} if row == 6 else {"quality": 95})
        (tmp_path / f"{row}.jpg").write_bytes(data)
    (tmp_path / "2.jpg").unlink()
    (tmp_path / "5.jpg").write_bytes((tmp_path / "5.jpg").read_bytes()[:-40])
    return tmp_path


def dataset(kind, folder, spec, how, rows=8, **options):
    paths = np.array([f"{row}.jpg" for row in range(rows)])
    labels = np.arange(100, 100 + rows)
    trusted = np.arange(rows) % 3 == 0
    return kind(folder, paths, labels, spec, how, 1, trusted=trusted, **options)


def loaded(data, workers=0, epochs=1, size=8):
    keys = [[(epoch, row) for row in range(size)] for epoch in range(epochs)]
    return DataLoader(
        data,
        batch_sampler=keys,
        num_workers=workers,
        worker_init_fn=in_worker,
        collate_fn=collate if isinstance(data, JpegImages) else None,
    )


CHANGES = [
    Augment(flip=0),
    Augment(flip=1),
    Augment(flip=0.5),
    Augment(flip=0, pad=5),
    Augment(flip=0.5, pad=1),
    Augment(flip=0, erase=1),
    Augment(flip=0.3, pad=4, erase=0.6),
]


@pytest.mark.parametrize("colour", ["rgb", "bgr"])
@pytest.mark.parametrize("how", CHANGES, ids=range(len(CHANGES)))
def test_the_device_makes_the_batch_that_the_cpu_makes(folder, how, colour):
    spec = InputSpec(size=32, mean=MEAN, colour=colour)
    ours = dataset(JpegImages, folder, spec, how)
    theirs = dataset(TrainImages, folder, spec, how, fast=False)
    for raw, expected in zip(loaded(ours, 2, 6), loaded(theirs, 0, 6), strict=True):
        batch = on_device(raw, spec, how, CPU)
        assert batch.images.dtype == torch.uint8 and batch.images.is_contiguous()
        assert (batch.images.int() - expected[0].int()).abs().max() <= 2
        for one, other in zip(batch[1:4], expected[1:], strict=True):
            assert torch.equal(one, other) and one.dtype == other.dtype
        assert batch.fallbacks == 2  # row 6, also in row 5's place
        assert batch.unreadable.tolist() == [-1, -1, 2, -1, -1, 5, -1, -1]


def test_changes_differ_between_epochs_and_rows(folder):
    spec, how = InputSpec(size=32), Augment(flip=0.5, pad=4, erase=0.8)
    data = dataset(JpegImages, folder, spec, how)
    drawn = {
        tuple(np.hstack([np.ravel(part) for part in data[epoch, row][5]]))
        for epoch in range(3)
        for row in range(8)
    }
    assert len(drawn) > 20


def test_a_template_batch_has_the_shape_of_its_list(folder):
    spec = InputSpec(size=384, template="SS2")
    sizes = np.array([[40, 60]] * 4 + [[60, 40]] * 4)
    data = dataset(JpegImages, folder, spec, Augment(pad=3, erase=1), sizes=sizes)
    raw = next(iter(loaded(data, size=4)))
    batch = on_device(raw, spec, data.how, CPU)
    assert batch.images.shape == (4, 3, 320, 480)
    assert batch.labels.tolist() == [100, 101, 103, 103]
    with pytest.raises(ValueError, match="several shapes"):
        collate([data[0, row] for row in range(8)])


@pytest.mark.parametrize("resize", ["squash", "crop"])
def test_pictures_are_resized_without_aliasing(tmp_path, resize):
    sizes = [(90, 140), (200, 70), (20, 30), (600, 9)]
    for row, size in enumerate(sizes):
        (tmp_path / f"{row}.jpg").write_bytes(encoded(scene(*size, row), "PNG"))
    spec, how = InputSpec(size=32, resize=resize), Augment(flip=0)
    data = dataset(JpegImages, tmp_path, spec, how, rows=4)
    batch = on_device(next(iter(loaded(data, size=4))), spec, how, CPU)
    for row, (height, width) in enumerate(sizes):
        picture = Image.fromarray(scene(height, width, row))
        if resize == "crop" and row < 3:
            side = min(height, width)
            left, top = (width - side) // 2, (height - side) // 2
            picture = picture.crop((left, top, left + side, top + side))
        expected = np.asarray(picture.resize((32, 32), Image.Resampling.BILINEAR))
        image = batch.images[row].permute(1, 2, 0).numpy()
        error = image.astype(int) - expected
        assert np.abs(error).max() <= 1 and abs(error.mean()) < 0.1


def test_what_is_no_image_is_replaced_before_it_leaves_the_loader(folder):
    (folder / "3.jpg").write_bytes(b"<html>404</html>")
    data = dataset(JpegImages, folder, InputSpec(size=32), Augment())
    for row, instead in ((2, 4), (3, 4), (5, 6), (6, 6)):
        item = data[0, row]
        assert item[0] == (folder / f"{instead}.jpg").read_bytes()
        assert item[1:4] == (row, 100 + instead, -1 if row == instead else row)


def test_what_only_the_decoder_finds_gives_its_place_to_the_next(folder):
    for row in (3, 7):
        (folder / f"{row}.jpg").write_bytes(broken(scene(32, 32)))
    spec, how = InputSpec(size=32), Augment(flip=0)
    data = dataset(JpegImages, folder, spec, how)
    batch = on_device(next(iter(loaded(data))), spec, how, CPU)
    assert batch.labels.tolist() == [100, 101, 104, 104, 104, 106, 106, 100]
    assert batch.unreadable.tolist() == [-1, -1, 2, 3, -1, 5, -1, 7]
    assert batch.trusted.tolist() == [row in (100, 106) for row in batch.labels]
    assert torch.equal(batch.images[7], batch.images[0])
    assert batch.fallbacks == 5  # rows 2 and 3, 5 and 6, 7
    for row in range(8):
        (folder / f"{row}.jpg").write_bytes(broken(scene(32, 32)))
    with pytest.raises(UnreadableImage, match="none can be decoded"):
        on_device(next(iter(loaded(data))), spec, how, CPU)


OTHERS = [
    f for f in dataclasses.fields(Augment) if f.name not in ("flip", "pad", "erase")
]


@pytest.mark.parametrize("field", OTHERS, ids=lambda field: field.name)
def test_what_the_device_does_not_do_is_refused_by_name(tmp_path, field):
    value = 3 if field.type is int or field.type == "int" else field.default / 2 + 0.1
    how = dataclasses.replace(Augment(), **{field.name: value})
    with pytest.raises(ValueError) as error:
        dataset(JpegImages, tmp_path, InputSpec(), how)
    message = str(error.value)
    assert message.startswith(f"{field.name} is not done on the device")
    assert "flip, pad, erase" in message and "\n" not in message


def test_the_draws_are_those_of_augment():
    # the two must not drift apart: a stage may go on with the other decoder
    how = Augment(flip=0.5, pad=2, erase=0.5)
    picture = scene(32, 32)
    for row in range(5):
        one, other = (np.random.default_rng(row) for _ in range(2))
        augment(picture, InputSpec(size=32), how, one)
        draw(how, (32, 32), other)
        assert one.bit_generator.state == other.bit_generator.state
