"""Drawing a synthetic chest slice by slice: tissue brightness in HU, labels, texture and noise.

Slices are [row, col] with rows to the back and columns to the left of the patient; coordinates are
those of `data_prep.phantom.anatomy`, in mm. `points` [3, h, w] is the anatomical position of each
pixel, after the subject's displacements.
"""

from dataclasses import dataclass

import cv2
import numpy as np

from data_prep.phantom import anatomy
from data_prep.phantom.anatomy import AORTA, LA, LV, MYOCARDIUM, PULMONARY, RA, RV, SPAN, Subject

_BLUR = 0.65  # mm, the scanner's point spread
_CHAMBER_LABELS = (LV, RV, LA, RA, AORTA, PULMONARY)
# Blood flows between these, so no wall is drawn where they meet.
_OPENINGS = ((LV, LA), (RV, RA), (LV, AORTA), (RV, PULMONARY))


@dataclass(frozen=True, eq=False)
class Canvas:
    """The voxel grid: coordinates of columns, rows and slices, and their spacing, mm."""

    x: np.ndarray  # [w]
    y: np.ndarray  # [h]
    z: np.ndarray  # [slices]
    pixel: float
    slice_spacing: float

    @classmethod
    def of(
        cls, size: tuple[int, int, int], *, pixel: float, slice_spacing: float, bottom: float
    ) -> "Canvas":
        """A grid of `size` (x, y, z), centred in the plane, from the height `bottom` upwards."""
        x, y = (((np.arange(n) - (n - 1) / 2) * pixel).astype(np.float32) for n in size[:2])
        z = bottom + (np.arange(size[2]) + 0.5) * slice_spacing
        return cls(x, y, z, pixel, slice_spacing)

    def points(self, displacements: tuple[np.ndarray, ...], z: float) -> np.ndarray:
        """The anatomical point [3, h, w] that each pixel of the slice at `z` shows, float32 mm."""
        plane = np.broadcast_arrays(self.x[None, :], self.y[:, None], np.float32(z))
        points = np.stack(plane).astype(np.float32)
        for grid in displacements:
            level = np.einsum("z,dzyx->dyx", _spline_weights(np.array([z]), 2, grid)[0], grid)
            rows = _spline_weights(self.y, 1, grid)
            columns = _spline_weights(self.x, 0, grid)
            for axis in range(3):
                points[axis] += rows @ level[axis] @ columns.T
        return points

    def window(self, x: tuple[float, float], y: tuple[float, float]) -> tuple[slice, slice]:
        """The [row, col] slices of the pixels between the given mm coordinates."""
        return (
            slice(*np.searchsorted(self.y, y).tolist()),
            slice(*np.searchsorted(self.x, x).tolist()),
        )


def _spline_weights(coordinates: np.ndarray, axis: int, grid: np.ndarray) -> np.ndarray:
    """Cubic B-spline weights [n, count] of a grid's nodes along x, y or z (axis 0, 1, 2)."""
    count = grid.shape[3 - axis]
    low, high = SPAN[axis]
    nodes = np.arange(count)
    t = np.abs((coordinates[:, None] - low) / (high - low) * (count - 1) - nodes)
    inner, outer = 2 / 3 - t**2 + t**3 / 2, (2 - t) ** 3 / 6
    return np.where(t < 1, inner, np.where(t < 2, outer, 0)).astype(np.float32)


def draw_slice(subject: Subject, canvas: Canvas, z: float) -> tuple[np.ndarray, np.ndarray]:
    """The slice at height `z`: blurred HU, float32 [h, w], and label, uint8 [h, w]."""
    points = canvas.points(subject.displacements, z)
    depth = _trunk_level(subject, points)
    tissue = _draw_trunk(subject, points, depth)
    lungs = _lungs(subject, points, depth)
    tissue[lungs] = subject.hu["lung"]
    _draw_lung_vessels(subject, canvas, points, lungs, tissue)
    _draw_airways(subject, canvas, points, tissue)
    _draw_spine(subject, canvas, points, tissue)
    _draw_ribs(subject, points, depth, tissue)
    label = np.zeros(tissue.shape, np.uint8)
    box = canvas.window((-85, 110), (-95, 68))
    _draw_heart(subject, points[:, *box], tissue[box], label[box])
    return cv2.GaussianBlur(tissue, (0, 0), max(0.7, _BLUR / canvas.pixel)), label


def _trunk_level(subject: Subject, points: np.ndarray) -> np.ndarray:
    """0 in the middle of the trunk, 1 on the skin: a superellipse, [h, w]."""
    half_x, half_y = subject.trunk
    return (np.abs(points[0] / half_x) ** 2.5 + np.abs(points[1] / half_y) ** 2.5) ** 0.4


def _draw_trunk(subject: Subject, points: np.ndarray, depth: np.ndarray) -> np.ndarray:
    """Air, skin, fat, the muscles of the wall, and the organs below the diaphragm."""
    hu = subject.hu
    tissue = np.full(depth.shape, hu["air"], np.float32)
    tissue[depth < 1] = hu["muscle"]  # skin
    tissue[depth < 0.985] = hu["fat"]
    x, y, _ = points
    # Muscle is thickest next to the spine and at the flanks.
    thickness = 0.10 + 0.07 * np.exp(-(((np.abs(x) - 40) / 30) ** 2)) * (y > 20)
    tissue[(depth < 0.84 + thickness) & (depth > 0.8)] = hu["muscle"]
    below = (depth < 0.8) & (_diaphragm(subject, points) > points[2])
    tissue[below & (x < 12)] = hu["liver"]
    tissue[below & (x >= 12)] = hu["stomach"]
    bubble = ((x - 62) / 24) ** 2 + ((y + 22) / 16) ** 2 + ((points[2] + 76) / 16) ** 2 < 1
    tissue[below & bubble] = hu["air"]
    return tissue


def _diaphragm(subject: Subject, points: np.ndarray) -> np.ndarray:
    """Height in mm of the diaphragm's two domes over each pixel, [h, w]."""
    x, y, _ = points
    domes = zip(subject.diaphragm, (-58.0, 62.0), strict=True)
    return np.maximum(*(top - 0.011 * ((x - mid) ** 2 + (y + 5) ** 2) for top, mid in domes))


def _lungs(subject: Subject, points: np.ndarray, depth: np.ndarray) -> np.ndarray:
    """Mask [h, w] of both lungs, before the heart takes its place."""
    x, y, z = points
    narrowing = np.sqrt(np.maximum(0.05, 1 - (np.maximum(z - 30, 0) / 130) ** 2))
    right = ((x + 70) / (57 * narrowing)) ** 2 + ((y - 6) / (82 * narrowing)) ** 2 < 1
    left = ((x - 72) / (56 * narrowing)) ** 2 + ((y - 8) / (82 * narrowing)) ** 2 < 1
    return (right | left) & (depth < 0.8) & (z > _diaphragm(subject, points))


def _draw_lung_vessels(
    subject: Subject, canvas: Canvas, points: np.ndarray, lungs: np.ndarray, tissue: np.ndarray
) -> None:
    """Draws the lungs' vessel trees into `tissue`, including vessels thinner than a pixel."""
    z = float(points[2].mean())
    ends = subject.lung_vessels
    near = (ends[:, :, 2].min(1) < z + 8) & (ends[:, :, 2].max(1) > z - 8)
    contrast = 0.8 * subject.hu["blood"] - subject.hu["lung"]
    coverage = np.zeros(tissue.shape, np.float32)
    for segment in ends[near]:
        low, high = segment[:, :2].min(0) - 14, segment[:, :2].max(0) + 14
        box = canvas.window((low[0], high[0]), (low[1], high[1]))
        local = points[:, *box]
        if local.size:
            tube = anatomy.Tube(segment[:, :3], segment[:, 3])
            distance = tube.distance(local.reshape(3, -1)).reshape(local.shape[1:])
            inside = np.clip(0.5 - distance / canvas.pixel, 0, 1)
            np.maximum(coverage[box], inside, out=coverage[box])
    tissue += coverage * lungs * contrast


def _draw_airways(subject: Subject, canvas: Canvas, points: np.ndarray, tissue: np.ndarray) -> None:
    """Draws trachea, main bronchi and oesophagus into `tissue`."""
    box = canvas.window((-80, 80), (-25, 70))
    local, view = points[:, *box].reshape(3, -1), tissue[box]
    gullet = subject.oesophagus.distance(local).reshape(view.shape)
    view[gullet < 0] = subject.hu["muscle"]
    view[gullet < -4.5] = subject.hu["air"]
    airway = np.minimum.reduce([tube.distance(local) for tube in subject.airways])
    airway = airway.reshape(view.shape)
    view[airway < 1.6] = subject.hu["muscle"]
    view[airway < 0] = subject.hu["air"]


def _draw_spine(subject: Subject, canvas: Canvas, points: np.ndarray, tissue: np.ndarray) -> None:
    """Draws vertebrae with discs, canal and processes, and the sternum into `tissue`."""
    box = canvas.window((-60, 60), (25, 125))
    (x, y, z), view, hu = points[:, *box], tissue[box], subject.hu
    phase = (z / 23 + subject.rib_phase) % 1
    body = np.sqrt((x / 18) ** 2 + ((y - 64) / 14.5) ** 2)
    wings = (np.abs(x) < 34) & (np.abs(y - 78 - 0.12 * np.abs(x)) < 5) & (np.abs(phase - 0.6) < 0.2)
    process = (np.abs(x) < 3.2) & (y > 84) & (y < 97)
    arch = np.sqrt((x / 13) ** 2 + ((y - 81) / 10) ** 2)
    view[(np.sqrt((x / 46) ** 2 + ((y - 84) / 15) ** 2)) < 1] = hu["muscle"]
    view[wings | process | (arch < 1)] = hu["cortex"] * 0.7
    view[arch < 0.74] = 20
    view[np.hypot(x, y - 81) < 4.5] = 45  # the cord
    view[body < 1] = np.where(phase < 0.2, hu["disc"], hu["cortex"])[body < 1]
    view[(body < 0.9) & (phase > 0.25) & (phase < 0.95)] = hu["marrow"]
    front = canvas.window((-40, 40), (-125, -60))
    (x, y, z), view = points[:, *front], tissue[front]
    sternum = np.sqrt((x / 19) ** 2 + ((y + 0.86 * subject.trunk[1]) / 6) ** 2)
    view[(sternum < 1) & (z > -50)] = hu["cortex"] * 0.8
    view[(sternum < 0.75) & (z > -50)] = hu["marrow"]


def _draw_ribs(subject: Subject, points: np.ndarray, depth: np.ndarray, tissue: np.ndarray) -> None:
    """Draws the ribs into `tissue`: rings that sink from the spine to the front, every 25 mm."""
    x, y, z = points
    angle = np.arctan2(np.abs(x), y)  # 0 at the spine, pi at the sternum
    phase = ((z + 34 * angle) / 25 + subject.rib_phase) % 1
    across = (depth - 0.855) * min(subject.trunk)
    ring = np.sqrt(((phase - 0.5) * 25 / 6.5) ** 2 + (across / 4.2) ** 2)
    ring[(angle < 0.25) | (angle > 2.9)] = np.inf
    bone = angle < 2.3  # cartilage in front of it
    tissue[ring < 1] = np.where(bone, subject.hu["cortex"], 1.6 * subject.hu["muscle"])[ring < 1]
    tissue[(ring < 0.6) & bone] = subject.hu["marrow"]


def _draw_heart(
    subject: Subject, points: np.ndarray, tissue: np.ndarray, label: np.ndarray
) -> None:
    """Draws the heart and the great vessels into `tissue` and `label`, both [h, w]."""
    flat, shape, hu = points.reshape(3, -1), tissue.shape, subject.hu
    chamber, distance, muscle = _chambers(subject, flat)
    veins = np.minimum.reduce([vein.distance(flat) for vein in subject.veins])
    coronaries = np.minimum.reduce([tube.distance(flat) for tube in subject.coronaries])
    papillary = np.minimum.reduce([tube.distance(flat) for tube in subject.papillary])
    hull = np.minimum(np.minimum(distance, veins + 3), coronaries + 1)
    hull = np.minimum(hull, np.where(muscle, -1, 99)).reshape(shape)
    tissue[(hull < 5) & (tissue < -500)] = hu["fat"]
    wall = muscle | (distance < subject.wall) | (veins < 0.8)
    blood = (chamber > 0) | ((veins < 0) & (distance > 0.5) & ~muscle) | (coronaries < 0)
    blood &= ~((papillary < 0) & (chamber == LV))
    tissue[wall.reshape(shape)] = hu["heart_muscle"]
    tissue[blood.reshape(shape)] = hu["blood"]
    label[:] = np.where((chamber == 0) & muscle, MYOCARDIUM, chamber).reshape(shape)


def _chambers(subject: Subject, points: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The chamber or vessel at each point [3, n], its distance, and the muscle.

    Returns labels uint8 [n] (0 also in the walls between chambers), the distance [n] in mm to the
    nearest chamber, and the mask [n] of the left ventricle's wall and cavity.
    """
    base, normal = subject.heart_base
    above_base = normal.astype(np.float32) @ (points - base[:, None].astype(np.float32))
    wall = np.maximum(subject.heart_muscle.distance(points), above_base)
    distances = np.stack(
        [
            np.minimum.reduce([solid.distance(points) for solid in subject.chambers[label]])
            for label in _CHAMBER_LABELS
        ]
    )
    for row in (1, 2, 3):  # the left ventricle's wall overrides right ventricle and atria
        np.maximum(distances[row], -wall, out=distances[row])
    nearest = distances.argmin(0)
    distance = distances.min(0)
    np.put_along_axis(distances, nearest[None], np.inf, 0)
    shut = _shut_table()[nearest, distances.argmin(0)]
    inside = (distance < 0) & ~(shut & (distances.min(0) - distance < subject.wall))
    labels = np.array(_CHAMBER_LABELS, np.uint8)[nearest] * inside
    return labels.astype(np.uint8), distance, wall < 0


def _shut_table() -> np.ndarray:
    """Whether a wall separates two chambers, bool [6, 6] in the order of `_CHAMBER_LABELS`."""
    opened = {frozenset(pair) for pair in _OPENINGS}
    return np.array([[{a, b} not in opened for b in _CHAMBER_LABELS] for a in _CHAMBER_LABELS])


class Texture:
    """Tissue texture, continuous across slices, and the scanner's noise, which is not."""

    # Tissue in HU, and the standard deviation in HU of its texture.
    _TISSUE = (-1000, -950, -850, -500, -110, 60, 300, 700)
    _STRENGTH = (0, 12, 55, 45, 18, 12, 9, 60)
    _SCALES = (1.3, 4.5)  # mm

    def __init__(self, rng: np.random.Generator, canvas: Canvas) -> None:
        self._rng = rng
        self._pixel = canvas.pixel
        self._shape = (len(canvas.y), len(canvas.x))
        self._carry = np.exp(-canvas.slice_spacing / np.array(self._SCALES) / 1.5)
        self._fields = [self._field(scale) for scale in self._SCALES]

    def next_slice(self, tissue: np.ndarray, noise: float) -> np.ndarray:
        """The next slice's texture [h, w], HU; `noise` is the standard deviation of its noise."""
        for i, (scale, carry) in enumerate(zip(self._SCALES, self._carry, strict=True)):
            fresh = self._field(scale) * np.float32(np.sqrt(1 - carry**2))
            self._fields[i] = self._fields[i] * np.float32(carry) + fresh
        strength = np.interp(tissue, self._TISSUE, self._STRENGTH).astype(np.float32)
        return strength * sum(self._fields) / np.sqrt(2) + noise * self._smooth(0.7)

    def _field(self, scale: float) -> np.ndarray:
        return self._smooth(max(0.5, scale / self._pixel))

    def _smooth(self, sigma: float) -> np.ndarray:
        """Normal noise [h, w] of unit variance with a Gaussian correlation of `sigma` pixels."""
        step = max(1, int(sigma / 1.5))  # coarse noise is drawn small and enlarged
        shape = [-(-n // step) + 4 for n in self._shape]
        field = cv2.GaussianBlur(self._rng.standard_normal(shape, np.float32), (0, 0), sigma / step)
        field = np.asarray(field / field.std())
        if step > 1:
            field = cv2.resize(field, None, fx=step, fy=step, interpolation=cv2.INTER_CUBIC)
        return field[: self._shape[0], : self._shape[1]]
