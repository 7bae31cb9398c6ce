"""Findings about a whole dataset: equal images, and volumes cut in different planes."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from data_prep.faults import Fault, finding
from data_prep.volumes import Facts, Reader, Source
from kafjax.data.splits import PAPER_KINDS


def equal_images(facts: Iterable[Facts]) -> list[list[str]]:
    """Groups of volumes whose images have the same values, each in order, by id."""
    groups: dict[str, list[str]] = defaultdict(list)
    for fact in sorted(facts, key=lambda fact: fact.id):
        groups[fact.content].append(fact.id)
    return [group for group in groups.values() if len(group) > 1]


def planes(facts: Iterable[Facts]) -> list[str]:
    """The planes that a dataset's slices lie in, most volumes first."""
    return _by_number(fact.plane for fact in facts)


def dataset_findings(
    reader: Reader,
    sources: Iterable[Source],
    groups: Iterable[Sequence[str]],
    plane_of: Mapping[str, str],
) -> list[Fault]:
    """A finding for each repeated image, and for each volume outside the most common plane.

    Args:
      reader: of the volumes.
      sources: of all volumes.
      groups: ids of volumes with equal images.
      plane_of: planes of the volumes by id.
    """
    known = {source.id: source for source in sources}
    found = []
    for first, *others in groups:
        for other in others:
            source, original = known[other], known[first]
            where = "" if source.frame is None else f"frame {source.frame + 1} "
            what = f"{where}has the same values as {original.image_name}"
            remedy = f"folds take {first} and {other} as one subject"
            if reader.kind in PAPER_KINDS:
                remedy = f"the paper's folds stay: {first} and {other} may lie on both sides of one"
            found.append(finding(source.image, what, remedy))
    if reader.one_plane:
        usual, *_ = [*_by_number(plane_of.values()), ""]
        for id, plane in plane_of.items():
            if plane != usual:
                what = f"is cut in {plane} slices, most other volumes in {usual} ones"
                remedy = "the network treats both alike; move it away if that is wrong"
                found.append(finding(known[id].image, what, remedy))
    return found


def findings_of(
    reader: Reader, sources: Iterable[Source], facts: Mapping[str, Facts]
) -> list[Fault]:
    """`dataset_findings` for volumes just read."""
    plane_of = {id: fact.plane for id, fact in facts.items()}
    return dataset_findings(reader, sources, equal_images(facts.values()), plane_of)


def recorded_findings(
    reader: Reader, sources: Iterable[Source], metadata: Mapping[str, Any]
) -> list[Fault]:
    """`dataset_findings` for a prepared dataset."""
    volumes = metadata["volumes"].items()
    plane_of = {id: volume["plane"] for id, volume in volumes if "plane" in volume}
    return dataset_findings(reader, sources, metadata.get("equal_images", ()), plane_of)


def _by_number(names: Iterable[str]) -> list[str]:
    counts = Counter(names)
    return sorted(counts, key=lambda name: (-counts[name], name))
