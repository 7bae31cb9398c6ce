"""kafjax.drawing.figures: the pixels it draws."""

import matplotlib.colors
import numpy as np
import pytest

from kafjax.drawing import colours
from kafjax.drawing import figures as drawing


def colour(name):
    return np.round(255 * np.array(matplotlib.colors.to_rgb(name))).astype(np.uint8)


def random_pair(num_keypoints=12):
    rng = np.random.default_rng(0)
    images = rng.standard_normal((2, 128, 96, 1)).astype(np.float32)
    keypoints = rng.integers(10, 86, (2, num_keypoints, 2)).astype(np.int32)
    mask = np.arange(num_keypoints) < num_keypoints - 2
    correspondence = np.where(np.arange(num_keypoints) % 2 == 0, np.arange(num_keypoints), -1)
    return [*images, keypoints[0], mask, keypoints[1], mask, correspondence]


def left_pixel(row, col, zoom):
    """Where the middle of a pixel of the left view is in the picture."""
    return drawing.TEXT_HEIGHT + row * zoom + zoom // 2, col * zoom + zoom // 2


def right_pixel(row, col, zoom, width):
    drawn_row, drawn_col = left_pixel(row, col, zoom)
    return drawn_row, drawn_col + width * zoom + drawing.GAP


@pytest.mark.parametrize(("height", "zoom"), [(128, 3), (400, 1)])
def test_keypoints_lines_and_grey_levels_are_where_they_belong(height, zoom):
    width = 96
    image = np.tile(np.linspace(-3, 5, width, dtype=np.float32), (height, 1))
    keypoints_1 = np.array([[20, 30], [80, 60], [100, 10], [50, 50]])
    keypoints_2 = np.array([[90, 80], [20, 70], [110, 40]])
    mask_1 = np.array([True, True, True, False])
    mask_2 = np.array([False, True, True])
    # 0 -> 1 is drawn; 1 -> 0 and 3 -> 2 each have a masked end.
    correspondence = np.array([1, 0, -1, 2])
    picture = drawing.draw_pair(
        image, image, keypoints_1, mask_1, keypoints_2, mask_2, correspondence
    )
    shape = (height * zoom + 2 * drawing.TEXT_HEIGHT, 2 * width * zoom + drawing.GAP, 3)
    assert picture.shape == shape
    assert picture.dtype == np.uint8
    matched, unmatched = colour(colours.MATCHED), colour(colours.UNMATCHED)
    for place, expected in [
        (left_pixel(20, 30, zoom), matched),
        (right_pixel(20, 70, zoom, width), matched),
        (left_pixel(80, 60, zoom), unmatched),
        (left_pixel(100, 10, zoom), unmatched),
        (right_pixel(110, 40, zoom, width), unmatched),
    ]:
        np.testing.assert_array_equal(picture[place], expected)
    for masked in (left_pixel(50, 50, zoom), right_pixel(90, 80, zoom, width)):
        assert np.ptp(picture[masked]) == 0
    # The only line is horizontal, and crosses the white gap in row 20.
    gap = picture[:, width * zoom + drawing.GAP // 2].astype(int)
    green = np.flatnonzero(gap[:, 1] - gap[:, 0] > 60)
    drawn_row = left_pixel(20, 0, zoom)[0]
    assert len(green) > 0
    assert np.abs(green - drawn_row).max() <= 1
    # Grey rises from black to white, both views alike.
    bottom = picture[drawing.TEXT_HEIGHT + height * zoom - 2]
    left, right = bottom[: width * zoom], bottom[-width * zoom :]
    np.testing.assert_array_equal(left, right)
    assert (np.diff(left[:, 0].astype(int)) >= 0).all()
    assert left[0, 0] == 0
    assert left[-1, 0] == 255


def test_same_input_same_picture_and_inputs_untouched():
    arguments = random_pair()
    copies = [np.copy(argument) for argument in arguments]
    first = drawing.draw_pair(*arguments, title="step 100")
    np.testing.assert_array_equal(first, drawing.draw_pair(*arguments, title="step 100"))
    for argument, copy in zip(arguments, copies, strict=True):
        np.testing.assert_array_equal(argument, copy)


def test_title_and_caption_stand_outside_the_views():
    arguments = random_pair()
    plain, titled = drawing.draw_pair(*arguments), drawing.draw_pair(*arguments, title="step 100")
    assert plain.shape == titled.shape
    strip = drawing.TEXT_HEIGHT
    assert (plain[:strip] == 255).all()
    assert (titled[:strip] < 128).any()
    np.testing.assert_array_equal(plain[strip:], titled[strip:])
    assert (plain[-strip:] < 128).any()


@pytest.mark.parametrize("num_places", [0, 5])
def test_no_keypoints(num_places):
    image = np.random.default_rng(1).standard_normal((64, 64, 1)).astype(np.float32)
    places = np.zeros((num_places, 2), np.int32)
    mask = np.zeros(num_places, bool)
    unmatched = np.full(num_places, -1)
    picture = drawing.draw_pair(image, image, places, mask, places, mask, unmatched)
    assert (picture == picture[..., :1]).all()


def test_constant_image():
    *_, keypoints_1, mask_1, keypoints_2, mask_2, correspondence = random_pair()
    image = np.zeros((128, 96, 1), np.float32)
    picture = drawing.draw_pair(
        image, image, keypoints_1, mask_1, keypoints_2, mask_2, correspondence
    )
    assert (picture[drawing.TEXT_HEIGHT + 2, :90] == 0).all()


@pytest.mark.parametrize("shape", [(64, 48, 1), (128, 96, 3), (128,)])
def test_images_of_unsuitable_shape(shape):
    image_1, _, *rest = random_pair()
    with pytest.raises(ValueError, match=r"shapes .*, expected the same \[h, w\] or \[h, w, 1\]"):
        drawing.draw_pair(image_1, np.zeros(shape), *rest)
