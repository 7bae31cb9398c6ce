"""k-medoids: the k of n things that represent all best.

Partitioning around medoids (Kaufman and Rousseeuw, Finding Groups in Data, 1990, chapter 2):
medoids are added one by one, each where it lowers the total most, then swapped with others as long
as a swap lowers it. Plain NumPy, and the same input gives the same medoids.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from kafjax.errors import UserError

_TOLERANCE = 1e-9  # of the total: a swap must win more than rounding


class Medoids(NamedTuple):
    """The result of `k_medoids`.

    Attributes:
      indices: of the medoids, the fixed ones first, then in the order in which they were added.
      nearest: int [n], the position in `indices` of each thing's nearest medoid.
      total: the sum of the distances to them.
    """

    indices: tuple[int, ...]
    nearest: np.ndarray
    total: float


def k_medoids(distances: np.ndarray, k: int, *, fixed: Sequence[int] = ()) -> Medoids:
    """Chooses k medoids such that no swap of one lowers the total distance to the nearest.

    Args:
      distances: [n, n], from each thing to each.
      k: how many to choose.
      fixed: medoids that are given in addition to them.

    Raises:
      ValueError: `distances` is not square, or k is not between 1 and the number of others.
    """
    n = len(distances)
    if distances.shape != (n, n) or not 1 <= k <= n - len(fixed):
        raise UserError(
            f"distances are {distances.shape}, k is {k}; expected [n, n] and 1 to n - {len(fixed)}"
        )
    chosen = list(fixed)
    for _ in range(k):
        chosen.append(_best(distances, chosen)[0])
    total = _to_nearest(distances, chosen).sum()
    while swap := _best_swap(distances, chosen, first=len(fixed), below=total):
        place, index, total = swap
        chosen[place] = index
    return Medoids(tuple(chosen), distances[:, chosen].argmin(axis=1), float(total))


def _to_nearest(distances: np.ndarray, chosen: Sequence[int]) -> np.ndarray:
    return distances[:, list(chosen)].min(axis=1, initial=np.inf)


def _best(distances: np.ndarray, chosen: Sequence[int]) -> tuple[int, float]:
    """The thing that lowers the total most as a further medoid, and that total."""
    totals = np.minimum(_to_nearest(distances, chosen)[:, None], distances).sum(axis=0)
    totals[list(chosen)] = np.inf
    index = int(totals.argmin())
    return index, float(totals[index])


def _best_swap(
    distances: np.ndarray, chosen: Sequence[int], *, first: int, below: float
) -> tuple[int, int, float] | None:
    """The place in `chosen`, from `first` on, the thing to put there, and the total then."""
    swaps = []
    for place in range(first, len(chosen)):
        others = [*chosen[:place], *chosen[place + 1 :]]
        swaps.append((place, *_best(distances, others)))
    best = min(swaps, key=lambda swap: swap[2])
    return best if best[2] < below * (1 - _TOLERANCE) else None
