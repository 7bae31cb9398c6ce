"""The anatomy of one synthetic chest: solids, their random variation, and Hounsfield units.

Coordinates are patient millimetres (x, y, z), x to the patient's left, y to the back, z to the head
(DICOM's LPS), with the origin in the middle of the trunk at the height of the heart. Points are
float32 [3, n]. Distances are signed millimetres, negative inside, and accurate near a surface,
where they are used.

The landmarks below were placed by hand after an adult chest CT. `sample_subject` moves, turns,
stretches and jitters them, so that no two subjects share a shape, a pose or a contrast.
"""

from dataclasses import dataclass

import numpy as np
from scipy.spatial.transform import Rotation

Point = tuple[float, float, float]
Points = tuple[Point, ...]
Radii = tuple[float, ...]

# Label numbers of the CHD data set; 0 is everything else.
LV, RV, LA, RA, MYOCARDIUM, AORTA, PULMONARY = range(1, 8)

HEART_CENTRE = np.array([18.0, -22.0, -12.0])
# Solids farther than this from a slice are skipped: they do not affect it.
REACH = 12.0

# Centre, the point its first axis aims at, radii along and across that axis; all mm.
_CHAMBERS: dict[int, tuple[Point, Point, Point]] = {
    LV: ((50, -26, -29), (75, -50, -50), (40, 21, 21)),
    RV: ((6, -54, -32), (58, -64, -52), (46, 25, 31)),
    LA: ((10, 16, 4), (44, 20, 2), (31, 19, 22)),
    RA: ((-34, -20, -12), (-30, -26, 22), (33, 22, 25)),
}
# Waypoints and radii in mm.
_TUBES: dict[int, tuple[Points, Radii]] = {
    LV: (((34, -16, -12), (20, -17, -4), (11, -17, 2)), (11, 12, 12)),
    RV: (((8, -56, -18), (12, -57, 2), (16, -50, 16)), (15, 14, 13)),
    AORTA: (
        (
            *((8, -17, 5), (2, -20, 15), (-8, -22, 30), (-12, -19, 48), (-9, -9, 64), (2, 8, 72)),
            *((15, 27, 71), (23, 41, 60), (25, 45, 40), (23, 45, 0), (19, 44, -50)),
            (16, 44, -160),
        ),
        (15, 15, 14, 13.5, 13, 12, 11, 10.5, 10, 9.5, 9, 9),
    ),
    PULMONARY: (
        ((16, -48, 20), (19, -38, 32), (20, -20, 41), (24, -4, 45), (40, 8, 46), (58, 14, 42)),
        (13, 13, 12.5, 10.5, 9, 7),
    ),
}
_RIGHT_PULMONARY: tuple[Points, Radii] = (
    ((20, -18, 41), (8, -4, 41), (-12, 0, 39), (-34, 4, 35), (-52, 8, 28)),
    (10, 9, 9, 8, 6.5),
)
# Blood that carries no label: pulmonary veins, the venae cavae, coronary arteries.
_VEINS: tuple[tuple[Points, Radii], ...] = (
    (((30, 20, 14), (48, 24, 22), (72, 26, 30)), (7, 6, 4)),
    (((30, 26, -3), (48, 32, -8), (72, 38, -16)), (7, 6, 4)),
    (((-8, 16, 12), (-26, 16, 18), (-56, 16, 30)), (7, 6, 4)),
    (((-8, 22, -2), (-28, 28, -8), (-56, 36, -18)), (7, 6, 4)),
    (((-32, -12, 8), (-30, -8, 40), (-26, -6, 75), (-18, -8, 180)), (10, 9, 9, 8)),
    (((-28, -8, -28), (-24, 4, -52), (-20, 12, -90), (-18, 16, -180)), (12, 12, 11, 11)),
)
_CORONARIES: tuple[tuple[Points, Radii], ...] = (
    (((14, -26, 12), (30, -44, 6), (44, -62, -20), (66, -66, -44)), (2.2, 2.0, 1.6, 1.0)),
    (((20, -14, 12), (44, -4, 4), (66, -6, -20), (74, -22, -40)), (2.2, 1.9, 1.5, 1.0)),
    (((0, -28, 12), (-14, -46, 2), (-16, -52, -28), (4, -40, -58)), (2.2, 2.0, 1.7, 1.2)),
)
_PAPILLARY: tuple[tuple[Points, Radii], ...] = (
    (((62, -20, -46), (48, -14, -28)), (5.5, 3.0)),
    (((66, -40, -44), (52, -38, -24)), (5.0, 3.0)),
)
_AIRWAYS: tuple[tuple[Points, Radii], ...] = (
    (((0, 12, 180), (2, 13, 58)), (8.5, 8.5)),
    (((2, 13, 58), (-16, 13, 46), (-40, 16, 30), (-58, 22, 12)), (8, 6.5, 5.5, 3.5)),
    (((2, 13, 58), (22, 16, 44), (42, 20, 28), (60, 28, 8)), (8, 6.0, 5.0, 3.5)),
)
_OESOPHAGUS: tuple[Points, Radii] = (
    ((4, 30, 180), (4, 32, 50), (6, 38, 0), (14, 34, -60), (24, 20, -160)),
    (6, 6, 6, 6, 6),
)
_HILA: Points = ((-46.0, 12.0, 26.0), (-46.0, 24.0, -8.0), (50.0, 16.0, 34.0), (50.0, 30.0, -6.0))


@dataclass(frozen=True, eq=False)
class Ellipsoid:
    """An ellipsoid: centre [3], unit axes as rows [3, 3], radii [3], all in mm."""

    centre: np.ndarray
    axes: np.ndarray
    radii: np.ndarray

    def distance(self, points: np.ndarray) -> np.ndarray:
        """Signed distance [n] in mm, to first order, of points [3, n]."""
        matrix = (self.axes / self.radii[:, None]).astype(np.float32)
        local = matrix @ points - (matrix @ self.centre.astype(np.float32))[:, None]
        level = np.sqrt((local**2).sum(0))
        local /= self.radii[:, None].astype(np.float32)
        slope = np.sqrt((local**2).sum(0))
        return level * (level - 1) / np.maximum(slope, 1e-6)


@dataclass(frozen=True, eq=False)
class Tube:
    """A chain of round cones through waypoints [p, 3] with radii [p], in mm."""

    waypoints: np.ndarray
    radii: np.ndarray

    def distance(self, points: np.ndarray) -> np.ndarray:
        """Signed distance [n] in mm of points [3, n]; large where farther than `REACH` in z."""
        nearest = np.full(points.shape[1], 1e3, np.float32)
        low, high = points[2].min() - REACH, points[2].max() + REACH
        for i in range(len(self.waypoints) - 1):
            (z0, z1), radius = self.waypoints[i : i + 2, 2], self.radii[i : i + 2].max()
            if max(z0, z1) + radius >= low and min(z0, z1) - radius <= high:
                np.minimum(nearest, self._segment_distance(i, points), out=nearest)
        return nearest

    def _segment_distance(self, i: int, points: np.ndarray) -> np.ndarray:
        start = self.waypoints[i].astype(np.float32)[:, None]
        along = self.waypoints[i + 1].astype(np.float32)[:, None] - start
        offset = points - start
        share = np.clip((along * offset).sum(0) / (along**2).sum(), 0, 1)
        offset -= along * share
        radius = self.radii[i] + (self.radii[i + 1] - self.radii[i]) * share
        return np.sqrt((offset**2).sum(0)) - radius.astype(np.float32)


Solid = Ellipsoid | Tube


@dataclass(frozen=True, eq=False)
class Subject:
    """The drawn structures and their brightness. Lengths in mm, brightness in HU."""

    trunk: tuple[float, float]  # half axes of the trunk in x and y
    chambers: dict[int, tuple[Solid, ...]]  # label -> solids whose union is the structure
    heart_muscle: Ellipsoid  # the left ventricle with its wall
    heart_base: tuple[np.ndarray, np.ndarray]  # a point and the outward normal of the valve plane
    wall: float  # between chambers
    veins: tuple[Tube, ...]
    coronaries: tuple[Tube, ...]
    papillary: tuple[Tube, ...]
    airways: tuple[Tube, ...]
    oesophagus: Tube
    lung_vessels: np.ndarray  # [n, 2, 4]: both ends' x, y, z and radius
    diaphragm: tuple[float, float]  # height of the right and left dome
    rib_phase: float
    displacements: tuple[np.ndarray, ...]  # mm, [3, nz, ny, nx] over the box of `SPAN`
    hu: dict[str, float]
    noise: float  # standard deviation of the scanner's noise, HU


# The box over which displacements are defined, as (low, high) of x, y and z in mm.
SPAN = ((-200.0, 200.0), (-200.0, 200.0), (-140.0, 140.0))


def sample_subject(rng: np.random.Generator) -> Subject:
    """One random subject. The same generator state gives the same subject."""
    pose = _Pose.sample(rng)
    chambers = _sample_chambers(rng, pose)
    left_ventricle = chambers[LV][0]
    assert isinstance(left_ventricle, Ellipsoid)
    wall = rng.uniform(8.0, 12.0)
    return Subject(
        trunk=(rng.uniform(131, 149), rng.uniform(94, 106)),
        chambers=chambers,
        heart_muscle=Ellipsoid(
            left_ventricle.centre, left_ventricle.axes, left_ventricle.radii + wall
        ),
        heart_base=(
            left_ventricle.centre - left_ventricle.axes[0] * left_ventricle.radii[0] * 0.72,
            -left_ventricle.axes[0],
        ),
        wall=rng.uniform(1.6, 2.6),
        veins=tuple(pose.tube(rng, *vein) for vein in _VEINS),
        coronaries=tuple(pose.tube(rng, *artery) for artery in _CORONARIES),
        papillary=tuple(pose.tube(rng, *muscle, jitter=3.0) for muscle in _PAPILLARY),
        airways=tuple(_Pose().tube(rng, *airway, jitter=0.0) for airway in _AIRWAYS),
        oesophagus=_Pose().tube(rng, *_OESOPHAGUS),
        lung_vessels=_sample_lung_vessels(rng),
        diaphragm=(rng.uniform(-52, -34), rng.uniform(-62, -46)),
        rib_phase=rng.uniform(0, 1),
        displacements=(_sample_displacement(rng, 70, 5.0), _sample_displacement(rng, 18, 1.1)),
        hu=_sample_hounsfield(rng),
        noise=rng.uniform(12, 24),
    )


@dataclass(frozen=True, eq=False)
class _Pose:
    """The heart's pose: landmarks are rotated and scaled about its centre, then shifted."""

    rotation: np.ndarray | None = None  # [3, 3]
    scale: float = 1.0
    shift: np.ndarray | None = None  # [3], mm

    @classmethod
    def sample(cls, rng: np.random.Generator) -> "_Pose":
        rotation = Rotation.from_euler("xyz", rng.normal(0, 6, 3), degrees=True).as_matrix()
        return cls(rotation, rng.uniform(0.9, 1.08), rng.normal(0, 3, 3))

    def place(self, landmarks: np.ndarray) -> np.ndarray:
        rotation = np.eye(3) if self.rotation is None else self.rotation
        shift = np.zeros(3) if self.shift is None else self.shift
        return (landmarks - HEART_CENTRE) @ rotation.T * self.scale + HEART_CENTRE + shift

    def tube(
        self, rng: np.random.Generator, waypoints: Points, radii: Radii, *, jitter: float = 1.5
    ) -> Tube:
        points = self.place(np.array(waypoints, float)) + rng.normal(0, jitter, (len(waypoints), 3))
        return Tube(points, np.array(radii) * self.scale * rng.uniform(0.88, 1.15))

    def ellipsoid(
        self, rng: np.random.Generator, centre: Point, target: Point, radii: Point
    ) -> Ellipsoid:
        ends = self.place(np.array([centre, target], float)) + rng.normal(0, 2, (2, 3))
        first = (ends[1] - ends[0]) / np.linalg.norm(ends[1] - ends[0])
        # The second axis is horizontal; the third completes the frame.
        second = np.cross((0, 0, 1), first)
        second /= np.linalg.norm(second)
        axes = np.stack([first, second, np.cross(first, second)])
        return Ellipsoid(ends[0], axes, np.array(radii) * self.scale * rng.uniform(0.88, 1.13, 3))


def _sample_chambers(rng: np.random.Generator, pose: _Pose) -> dict[int, tuple[Solid, ...]]:
    chambers: dict[int, list[Solid]] = {label: [] for label in (*_CHAMBERS, AORTA, PULMONARY)}
    for label, shape in _CHAMBERS.items():
        chambers[label].append(pose.ellipsoid(rng, *shape))
    for label, (waypoints, radii) in _TUBES.items():
        chambers[label].append(pose.tube(rng, waypoints, radii))
    chambers[PULMONARY].append(pose.tube(rng, *_RIGHT_PULMONARY))
    return {label: tuple(solids) for label, solids in chambers.items()}


def _sample_lung_vessels(rng: np.random.Generator) -> np.ndarray:
    """Vessel trees that grow from the hila outwards, [n, 2, 4] (x, y, z, radius)."""
    segments: list[np.ndarray] = []
    for hilum in _HILA:
        outwards = np.array([3 * np.sign(hilum[0]), 0, 0])
        tips = [(np.array(hilum), outwards + rng.normal(0, 1, 3), 3.4)] * 5
        for _ in range(5):
            tips = [child for tip in tips for child in _branch(rng, *tip, segments)]
    return np.array(segments)


def _branch(
    rng: np.random.Generator,
    start: np.ndarray,
    direction: np.ndarray,
    radius: float,
    segments: list[np.ndarray],
) -> list[tuple[np.ndarray, np.ndarray, float]]:
    """Adds one segment and returns the two tips that continue from its end."""
    direction = direction / np.linalg.norm(direction) + rng.normal(0, 0.45, 3)
    direction /= np.linalg.norm(direction)
    end = start + direction * rng.uniform(10, 20)
    thinner = radius * rng.uniform(0.68, 0.82)
    segments.append(np.stack([np.append(start, radius), np.append(end, thinner)]))
    return [(end, direction + rng.normal(0, 0.5, 3), thinner) for _ in range(2)]


def _sample_displacement(rng: np.random.Generator, step: float, size: float) -> np.ndarray:
    """Smooth random displacement: normal noise of `size` mm on a grid of `step` mm."""
    counts = [max(4, round((high - low) / step) + 1) for low, high in SPAN[::-1]]
    return rng.normal(0, size, (3, *counts)).astype(np.float32)


def _sample_hounsfield(rng: np.random.Generator) -> dict[str, float]:
    """Brightness of tissues. All chambers share the blood's, so labels need context."""
    return {
        "air": -1000.0,
        "lung": rng.uniform(-870, -790),
        "fat": rng.uniform(-110, -90),
        "muscle": rng.uniform(45, 65),
        "heart_muscle": rng.uniform(85, 130),
        "blood": rng.uniform(280, 430),
        "liver": rng.uniform(90, 125),
        "stomach": rng.uniform(20, 45),
        "marrow": rng.uniform(150, 230),
        "cortex": rng.uniform(520, 750),
        "disc": rng.uniform(70, 100),
    }
