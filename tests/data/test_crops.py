import numpy as np
import pytest
from PIL import Image

from kit.data import images
from kit.data.crops import cut
from kit.data.readers import UnreadableImage


@pytest.fixture
def picture(tmp_path):
    """30 wide, 20 high, every pixel different."""
    y, x = np.mgrid[:20, :30]
    pixels = np.stack([x * 8, y * 12, x + y], axis=2).astype(np.uint8)
    Image.fromarray(pixels).save(tmp_path / "picture.png")
    return tmp_path / "picture.png", pixels


@pytest.mark.parametrize(
    ("box", "expected"),
    [
        ((0, 0, 30, 20), np.s_[:, :]),
        ((3, 5, 10, 9), np.s_[5:9, 3:10]),
        ((2.6, 4.4, 10.4, 9.2), np.s_[4:9, 3:10]),
        ((-5, -6, 7, 8), np.s_[:8, :7]),
        ((25, 15, 300, 200), np.s_[15:, 25:]),
    ],
)
def test_a_crop_has_the_pixels_of_the_box_and_loses_none(
    picture, tmp_path, box, expected
):
    path, pixels = picture
    made = cut(path, box, tmp_path / "new" / "crop.png")
    assert np.array_equal(images.read(made), pixels[expected])


@pytest.mark.parametrize("box", [(30, 0, 40, 9), (-9, 0, -1, 9), (3, 3, 3.4, 9)])
def test_a_box_without_a_pixel_is_refused(picture, tmp_path, box):
    with pytest.raises(ValueError, match="picture.png: box .* is not in its 30 x 20"):
        cut(picture[0], box, tmp_path / "crop.png")
    assert not (tmp_path / "crop.png").exists()


def test_what_is_no_picture_is_not_cropped(tmp_path):
    (tmp_path / "text.jpg").write_text("no picture")
    with pytest.raises(UnreadableImage):
        cut(tmp_path / "text.jpg", (0, 0, 5, 5), tmp_path / "crop.png")
