import math

import cv2
import numpy as np
import pytest

from kit import files, launch
from kit.data import lists, perceptual
from kit.data.images import decode, read
from kit.data.perceptual import FLAT, HASHED, UNREADABLE
from kit.data.readers import UnreadableImage
from kit.data.sources import official


def picture(seed, height=240, width=320):
    """(H, W, 3) uint8, smooth shapes in colour as in a photo."""
    rng = np.random.default_rng(seed)
    coarse = rng.normal(128, 60, (9, 12, 3)).astype(np.float32)
    fine = rng.normal(0, 12, (60, 80, 3)).astype(np.float32)
    both = cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)
    both += cv2.resize(fine, (width, height), interpolation=cv2.INTER_LINEAR)
    return both.clip(0, 255).astype(np.uint8)


def jpeg(image, quality=90):
    options = [cv2.IMWRITE_JPEG_QUALITY, quality]
    return cv2.imencode(".jpg", image[..., ::-1], options)[1].tobytes()


def hashed(*pictures):
    """Their hashes, as a list's images have them."""
    grey = [
        perceptual.shrunk(decode(each, "it", perceptual.LEAST)) for each in pictures
    ]
    values, flat = perceptual.hashes(np.stack(grey))
    assert not flat.any()
    return values


def bits(*pictures):
    """How many bits of the others' hashes differ from the first one's."""
    first, *others = hashed(*pictures)
    return [int(each ^ first).bit_count() for each in others]


def slow(image):
    """64 coefficients and 64 bits by the definition, in loops; sides are multiples of 32."""
    red, green, blue = (image[..., n].astype(float) for n in range(3))
    grey = 0.299 * red + 0.587 * green + 0.114 * blue
    high, wide = (side // 32 for side in grey.shape)
    small = [
        [grey[high * y :, wide * x :][:high, :wide].mean() for x in range(32)]
        for y in range(32)
    ]
    found = []
    for v in range(1, 9):
        for u in range(1, 9):
            total = 0.0
            for y in range(32):
                for x in range(32):
                    total += (
                        small[y][x]
                        * math.cos(math.pi * (2 * y + 1) * v / 64)
                        * math.cos(math.pi * (2 * x + 1) * u / 64)
                    )
            found.append(total * 2 / 32)
    ordered = sorted(found)
    median = (ordered[31] + ordered[32]) / 2
    return found, [value > median for value in found], median


@pytest.mark.parametrize("seed", range(3))
def test_the_hash_matches_its_definition(seed):
    image = picture(seed, 160, 224)
    found, expected, median = slow(image)
    values, flat = perceptual.hashes(perceptual.shrunk(image)[None])
    assert not flat[0]
    for n in range(64):
        if abs(found[n] - median) > 0.5:  # grey is rounded before it is averaged
            assert bool(int(values[0]) >> n & 1) == expected[n], n
    assert sum(abs(value - median) > 0.5 for value in found) > 55


def test_half_of_the_bits_are_set():
    values = hashed(*(jpeg(picture(seed)) for seed in range(20)))
    assert {int(value).bit_count() for value in values} == {32}
    assert len(set(values.tolist())) == 20


def test_hashes_do_not_depend_on_the_images_beside_them():
    grey = np.stack([perceptual.shrunk(picture(seed)) for seed in range(5)])
    before = grey.copy()
    together = perceptual.hashes(grey)[0]
    alone = [int(perceptual.hashes(each[None])[0][0]) for each in grey]
    assert together.tolist() == alone
    assert (grey == before).all()


@pytest.mark.parametrize("seed", range(4))
def test_a_copy_differs_in_few_bits_and_another_picture_in_many(seed):
    image = picture(seed, 480, 640)
    darker = (image * 0.7).astype(np.uint8)
    small = cv2.resize(image, (200, 150), interpolation=cv2.INTER_AREA)
    wide = cv2.resize(image, (700, 480), interpolation=cv2.INTER_AREA)
    grey = np.repeat(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)[..., None], 3, 2)
    copies = [jpeg(image, 30), jpeg(darker), jpeg(small), jpeg(wide), jpeg(grey)]
    assert max(bits(jpeg(image, 95), *copies)) <= 6
    slightly = image[5:-5, 7:-7]
    assert max(bits(jpeg(image), jpeg(slightly))) <= 10
    others = [jpeg(picture(seed + 10)), jpeg(image[:, ::-1]), jpeg(image[::-1])]
    assert min(bits(jpeg(image), *others)) > 14


def test_a_large_picture_decoded_at_a_fraction_has_nearly_the_hash_of_the_whole():
    image = picture(7, 1200, 1600)
    part, whole = (
        perceptual.hashes(perceptual.shrunk(decode(jpeg(image), "it", least))[None])[0]
        for least in (perceptual.LEAST, 0)
    )
    assert decode(jpeg(image), "it", perceptual.LEAST).shape[0] == 150
    assert int(part[0] ^ whole[0]).bit_count() <= 4


@pytest.mark.parametrize("level", [0, 128, 255])
def test_a_picture_without_contrast_is_flat(level):
    grey = np.full((2, 32, 32), level, np.float32)
    grey[1] += np.random.default_rng(0).normal(0, 0.8, (32, 32))
    assert perceptual.hashes(grey)[1].tolist() == [True, True]


def test_the_least_contrast_is_a_standard_deviation_of_one_grey_level():
    wave = np.cos(np.pi * (2 * np.arange(32) + 1) / 64)  # frequency 1, variance 1/2
    both = 2 * wave[:, None] * wave[None, :]  # variance 1
    grey = np.stack([0.99 * both, 1.01 * both]).astype(np.float32)
    assert perceptual.hashes(grey)[1].tolist() == [True, False]


# --- a list's hashes ----------------------------------------------------------------------------


@pytest.fixture
def train(gldv2, tmp_path):
    """List full of the small folder: 11 images of one colour, one missing; some get pictures."""
    for number, name in enumerate(("aaaa000000000001", "0000000000012345")):
        path = gldv2 / "train" / name[0] / name[1] / name[2] / f"{name}.jpg"
        path.write_bytes(jpeg(picture(number)))
    lists.build(official(gldv2), gldv2, tmp_path / "lists", sizes=False)
    return gldv2, lists.find(tmp_path / "lists", "full")


def test_a_list_has_a_hash_and_a_state_for_every_image(train, tmp_path):
    data, full = train
    found = perceptual.build(data, full, tmp_path / "hashes", workers=2)
    ids = lists.load(full.path.parent, "full").ids
    assert found.ids.tolist() == ids.tolist()
    state = dict(zip(found.ids.tolist(), found.states.tolist(), strict=True))
    assert state.pop("aaaa000000000004") == UNREADABLE
    assert state.pop("aaaa000000000001") == state.pop("0000000000012345") == HASHED
    assert set(state.values()) == {FLAT}
    expected = hashed(jpeg(picture(0)), jpeg(picture(1)))
    assert found.values[found.rows].tolist() == expected.tolist()
    assert not found.values[found.states != HASHED].any()
    counts = {"new": 0, "hashed": 2, "flat": 8, "unreadable": 1}
    assert found.manifest["counts"] == counts
    assert found.manifest["list"] == {"name": "full", "hash": full.hash}


def test_an_image_that_stands_twice_in_a_list_is_hashed_once(
    train, tmp_path, monkeypatch
):
    monkeypatch.setattr(perceptual, "BLOCK", 3)
    monkeypatch.setattr(lists, "BLOCK", 4)
    data, full = train
    rows = lists.load(full.path.parent, "full").rows
    twice = rows.iloc[[0, 1, 0, 2, 3, 4, 1, 5, 6, 7, 8, 9, 9, 10, 0]]
    several = lists.ImageList("full", twice.reset_index(drop=True), "another hash")
    once = perceptual.build(data, full, tmp_path / "once")
    found = perceptual.build(data, several, tmp_path / "twice")
    assert found.ids.tolist() == once.ids.tolist()
    assert found.values.tolist() == once.values.tolist()
    assert found.states.tolist() == once.states.tolist()


def test_a_stopped_run_goes_on_where_it_was(train, tmp_path, monkeypatch):
    data, full = train
    whole = perceptual.build(data, full, tmp_path / "whole")
    monkeypatch.setattr(perceptual, "BLOCK", 4)
    out, looked = tmp_path / "hashes", []
    hash_some = perceptual._hashed

    def once(pool, reader, paths):
        looked.append(list(paths))
        if len(looked) == 2:
            raise KeyboardInterrupt
        return hash_some(pool, reader, paths)

    monkeypatch.setattr(perceptual, "_hashed", once)
    with pytest.raises(KeyboardInterrupt):
        perceptual.build(data, full, out)
    with pytest.raises(FileNotFoundError, match="no finished hashes"):
        perceptual.load(out)
    again = perceptual.build(data, full, out)
    assert [len(paths) for paths in looked] == [4, 4, 4, 3]  # the first four once
    assert again.values.tolist() == whole.values.tolist()
    assert again.states.tolist() == whole.states.tolist()
    for name in ("ids.npy", "values.npy", "states.npy"):
        assert files.sha256(out / name) == files.sha256(tmp_path / "whole" / name)


def test_when_the_time_is_over_the_next_run_goes_on(train, tmp_path, monkeypatch):
    data, full = train
    monkeypatch.setattr(perceptual, "BLOCK", 4)
    monkeypatch.setenv("KIT_STOP_AT", "1")
    with pytest.raises(launch.Stopped, match="full: stopped after 4 of 11 images"):
        perceptual.build(data, full, tmp_path / "hashes")
    monkeypatch.delenv("KIT_STOP_AT")
    assert len(perceptual.build(data, full, tmp_path / "hashes").rows) == 2


def test_what_could_not_be_read_is_tried_again_and_nothing_else(
    train, tmp_path, monkeypatch
):
    data, full = train
    perceptual.build(data, full, tmp_path / "hashes")
    (data / "train/a/a/a/aaaa000000000004.jpg").write_bytes(jpeg(picture(5)))
    looked = []
    hash_some = perceptual._hashed
    monkeypatch.setattr(
        perceptual,
        "_hashed",
        lambda pool, reader, paths: (
            looked.extend(paths) or hash_some(pool, reader, paths)
        ),
    )
    found = perceptual.build(data, full, tmp_path / "hashes")
    assert looked == ["train/a/a/a/aaaa000000000004.jpg"]
    assert len(found.rows) == 3
    perceptual.build(data, full, tmp_path / "hashes")
    assert len(looked) == 1


def test_hashes_of_another_list_are_replaced(train, tmp_path):
    data, full = train
    perceptual.build(data, full, tmp_path / "hashes")
    index = lists.find(full.path.parent, "index")
    found = perceptual.build(data, index, tmp_path / "hashes")
    assert len(found) == 10
    assert found.manifest["list"]["name"] == "index"


def test_another_folder_than_the_lists_is_refused(train, tmp_path):
    _, full = train
    with pytest.raises(FileNotFoundError, match="is this the folder"):
        perceptual.build(tmp_path, full, tmp_path / "hashes")


def test_a_list_of_which_much_is_unreadable_is_refused(train, tmp_path):
    data, full = train
    with pytest.raises(ValueError, match=r"full: 1 of 11 images cannot be read.*0004"):
        perceptual.build(data, full, tmp_path / "hashes", max_unreadable=0.05)
    for path in (data / "train" / "a").rglob("*.jpg"):
        path.write_bytes(b"")
    with pytest.raises(ValueError, match=r"full: 8 of 11 images cannot be read"):
        perceptual.build(data, full, tmp_path / "other")


def test_no_hashes_and_damaged_ones_are_refused(train, tmp_path):
    data, full = train
    with pytest.raises(FileNotFoundError, match="no finished hashes"):
        perceptual.load(tmp_path / "none")
    perceptual.build(data, full, tmp_path / "hashes")
    np.save(tmp_path / "hashes" / "values.npy", np.zeros(3, np.uint64))
    with pytest.raises(ValueError, match="values.npy: damaged.*audit"):
        perceptual.load(tmp_path / "hashes")
    again = perceptual.build(data, full, tmp_path / "hashes")  # which makes them anew
    assert np.array_equal(again.values, perceptual.load(tmp_path / "hashes").values)
    assert again.values.any()


def test_real_photos_copied_and_shrunk_are_near_and_others_are_not(photos):
    whole = []
    for path in sorted((photos / "packages" / "index").rglob("*.jpg"))[:40]:
        try:
            whole.append((path.read_bytes(), read(path)))
        except UnreadableImage:  # one of the set's odd files
            continue
    for data, image in whole:
        half = cv2.resize(image, None, fx=0.5, fy=0.5, interpolation=cv2.INTER_AREA)
        assert max(bits(data, jpeg(image, 40), jpeg(half, 80))) <= 6
    values = hashed(*(data for data, _ in whole))
    apart = np.bitwise_count(values[:, None] ^ values[None])
    assert np.median(apart[np.triu_indices(len(values), 1)]) >= 28
