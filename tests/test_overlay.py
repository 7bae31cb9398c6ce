"""Colours of classes, dots of keypoints, and nothing else."""

import numpy as np

from kafjax.drawing.overlay import CLASS_COLOURS, class_colours, draw_labels, draw_sample, grey


def test_grey_runs_between_percentiles() -> None:
    image = np.arange(101.0).reshape(1, 101)
    picture = grey(image)
    np.testing.assert_array_equal(picture[..., 0], picture[..., 2])
    assert (picture[0, :2] == 0).all()
    assert (picture[0, 99:] == 255).all()
    assert picture[0, 50, 0] == round(255 * 49 / 98)
    assert not grey(np.zeros((3, 3))).any()


def test_classes_have_their_colours_and_the_background_none() -> None:
    label = np.arange(12).reshape(3, 4)
    picture = draw_labels(np.zeros((3, 4)), label, opacity=1.0)
    assert not picture[0, 0].any()
    np.testing.assert_array_equal(picture[0, 1], CLASS_COLOURS[0])
    np.testing.assert_array_equal(picture[1, 3], CLASS_COLOURS[6])
    np.testing.assert_array_equal(picture[2, 1], CLASS_COLOURS[0] // 2)
    half = draw_labels(np.zeros((3, 4)), label)
    np.testing.assert_array_equal(half[0, 1], np.round(CLASS_COLOURS[0] / 2))


def test_colours_of_many_classes_differ() -> None:
    colours = class_colours(25)
    assert len(np.unique(colours, axis=0)) == 25
    np.testing.assert_array_equal(colours[1:9], CLASS_COLOURS[:8])
    assert class_colours(1).shape == (1, 3)


def test_real_keypoints_are_dots_on_the_left() -> None:
    image = np.zeros((32, 32))
    keypoints, mask = np.array([[3, 20], [8, 9], [0, 0]]), np.array([True, True, False])
    picture = draw_sample(image, np.zeros((32, 32), int), keypoints, mask)
    zoom = len(picture) // 32
    small = picture[::zoom, ::zoom]
    assert small.shape == (32, 64, 3)
    np.testing.assert_array_equal(np.argwhere(small.any(-1)), [[3, 20], [8, 9]])
