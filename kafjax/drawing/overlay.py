"""Class numbers as colours over grey slices, in plain NumPy.

Images are [h, w] of any range, labels [h, w] of class numbers with 0 the background, pictures uint8
[h, w, 3]. Keypoints are (row, col).
"""

import numpy as np

from kafjax.drawing.colours import CLASSES

# Further classes repeat the palette, darker each time.
_BRIGHT = np.array([list(bytes.fromhex(colour[1:])) for colour in CLASSES], np.uint8)
CLASS_COLOURS = np.concatenate([_BRIGHT, _BRIGHT // 2, _BRIGHT // 4])


def class_colours(num_classes: int) -> np.ndarray:
    """Colours uint8 [d, 3] of class numbers; the background's is black and never drawn."""
    return np.vstack([np.zeros((1, 3), np.uint8), np.resize(CLASS_COLOURS, (num_classes - 1, 3))])


def grey(image: np.ndarray) -> np.ndarray:
    """An image as a picture, black at its 1st percentile and white at its 99th."""
    low, high = np.percentile(image, (1, 99))
    scaled = np.clip((image - low) / max(high - low, 1e-6), 0, 1)
    return np.repeat(np.round(255 * scaled).astype(np.uint8)[..., None], 3, axis=-1)


def draw_labels(image: np.ndarray, label: np.ndarray, *, opacity: float = 0.5) -> np.ndarray:
    """A slice with each class in its colour; the background is unchanged."""
    colours = CLASS_COLOURS[(label - 1) % len(CLASS_COLOURS)]
    picture = grey(image)
    mixed = np.round((1 - opacity) * picture + opacity * colours).astype(np.uint8)
    return np.where(label[..., None] > 0, mixed, picture)


def draw_sample(
    image: np.ndarray, label: np.ndarray, keypoints: np.ndarray, mask: np.ndarray
) -> np.ndarray:
    """A slice with its real keypoints as dots, next to the slice with its labels.

    Args:
      image: [h, w].
      label: int [h, w].
      keypoints: int [k, 2], (row, col).
      mask: bool [k], which are real.

    Returns:
      uint8 [z h, 2 z w, 3], RGB; small slices are enlarged by an integer factor z.
    """
    left = grey(image)
    left[tuple(keypoints[mask].T)] = CLASS_COLOURS[0]
    picture = np.concatenate([left, draw_labels(image, label)], axis=1)
    zoom = max(1, round(384 / len(image)))
    return picture.repeat(zoom, axis=0).repeat(zoom, axis=1)
