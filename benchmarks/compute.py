"""What do prediction's arithmetic and memory grow with? The appendix's figure 1, for our networks.

For each network and image edge: GFLOP and memory of one slice, in float32, from the programs that
XLA makes of prediction. GFLOP are XLA's own count, two for a multiply-add, of the program with its
loops over layers unrolled, since XLA counts a loop's body once. Memory is what the compiled program
plans in addition to the parameters: temporaries, image and logits. On a GPU the program also runs,
and the device's peak memory is reported. Swin is the whole swin_unet, with its decoder.
Two minutes of one core by default.
"""

import argparse
import csv
import functools
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

from benchmarks.case import Case
from benchmarks.flags import integers, make_parser, run, settings
from benchmarks.report import Result, Table, gigabytes
from benchmarks.workers import Side, workers
from kafjax.drawing.colours import BLUE, VERMILION

PICTURE, CSV = "compute.png", "compute.csv"
# The appendix marks the edges of its two datasets' images.
MARKED_EDGES = {352: "ACDC", 512: "CHD"}


class Network(NamedTuple):
    """A curve: a network with a total of `blocks` self-attention layers, and its look.

    The colours are of Okabe and Ito's palette; families differ in marker, numbers of layers in
    line style too, for readers who see no colours.
    """

    name: str
    blocks: int
    colour: str
    style: str

    @property
    def label(self) -> str:
        """Its name for readers."""
        names = {"unet": "UNet", "unet_c2": "UNet c2", "kaf_unet": "KAF-UNet", "swin_unet": "Swin"}
        return names[self.name] + (f", {self.blocks} layers" if self.blocks else "")

    @property
    def num_attention_layers(self) -> int:
        """`config.model.num_attention_layers`, which is of each of KAF-UNet's four levels."""
        return self.blocks // 4 if self.name == "kaf_unet" else self.blocks


NETWORKS = (
    Network("unet", 0, "#000000", "o-"),
    Network("unet_c2", 0, "#999999", "s-"),
    Network("kaf_unet", 20, BLUE, "D:"),
    Network("kaf_unet", 64, BLUE, "D-"),  # the paper's
    Network("kaf_unet", 100, BLUE, "D--"),
    Network("swin_unet", 20, VERMILION, "^:"),
    Network("swin_unet", 100, VERMILION, "^--"),
)


@dataclass(frozen=True)
class Point:
    """What prediction of one slice needs."""

    edge: int  # pixels
    flop: float
    parameters: int  # bytes, running statistics included
    memory: int  # bytes, without the parameters
    measured: float | None = None  # the same on the device, if it reports it


Curves = dict[Network, list[Point]]


def parser() -> argparse.ArgumentParser:
    """The command's flags."""
    flags = make_parser(__doc__)
    flags.add_argument("--edges", type=integers, default=(128, 512, 1024), help="pixels")
    flags.add_argument("--num_keypoints", type=int, default=512)
    flags.add_argument("--filters", type=int, default=32)
    return flags


def measure(arguments: argparse.Namespace) -> Result:
    """Analyses every network at every edge, each network in a process of its own."""
    edges = sorted(set(arguments.edges))
    if wrong := [edge for edge in edges if edge <= 0 or edge % 16]:
        raise ValueError(f"--edges has {wrong}, expected positive multiples of 16")
    curves = {}
    for network in NETWORKS:
        print(f"{network.label} ...", file=sys.stderr, flush=True)
        cases = [
            Case(
                network=network.name,
                size=edge,
                num_keypoints=arguments.num_keypoints,
                filters=arguments.filters,
                num_attention_layers=network.num_attention_layers,
            )
            for edge in edges
        ]
        with workers({"ours": ("benchmarks.compute:make_side", cases)}) as sides:
            curves[network] = sides["ours"].ask("points")
    draw(curves, arguments.output / PICTURE)
    write_csv(curves, arguments.output / CSV)
    tables = make_tables(curves, arguments.num_keypoints)
    numbers = {n.label: [asdict(point) for point in curve] for n, curve in curves.items()}
    title = "Arithmetic and memory against the image's size"
    return Result("compute", title, tables, numbers, settings(arguments))


def make_side(cases: Sequence[Case]) -> Side:
    """A network's curve, to be asked for in a process whose device has held no other's."""
    return Side({"points": lambda: [analyse(case) for case in cases]}, {})


def analyse(case: Case) -> Point:
    """Lowers and compiles prediction for a case; on a GPU, also runs it.

    A device's peak memory is that of its process until then: cases come in order of size.
    """
    import jax  # which --help does not need

    on_cpu = jax.default_backend() == "cpu"
    # Buffers are planned alike at every level of code generation, and this one compiles quickly.
    options = {"xla_backend_optimization_level": 0} if on_cpu else {}
    compiled = _lower(case).compile(compiler_options=options)
    plan = compiled.memory_analysis()
    parameters = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(_shapes(case)[0]))
    planned = plan.argument_size_in_bytes + plan.output_size_in_bytes + plan.temp_size_in_bytes
    measured = None if on_cpu else _run(case, compiled) - parameters
    return Point(case.size, count_flop(case), parameters, planned - parameters, measured)


def count_flop(case: Case) -> float:
    """Floating point operations of predicting a case, by XLA's analysis before optimisation."""
    with _unrolled_scans():
        return float(_lower(case).cost_analysis()["flops"])


@functools.cache
def _shapes(case: Case) -> tuple[Any, ...]:
    """Variables, image, keypoints and mask."""
    import jax

    from benchmarks.case import inputs
    from benchmarks.ours import model_config
    from kafjax.models import build_model, example_inputs, variable_shapes

    variables = variable_shapes(build_model(model_config(case)), *example_inputs("segmentation"))
    batch = inputs(case)
    arrays = (batch[name] for name in ("image", "keypoints", "keypoint_mask"))
    return variables, *(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in arrays)


def _lower(case: Case) -> Any:
    import jax

    from benchmarks.ours import model_config
    from kafjax.models import build_model

    model = build_model(model_config(case))

    def predict(variables: Any, *arrays: jax.Array) -> Any:
        return model.apply(variables, *arrays, train=False)

    return jax.jit(predict).lower(*_shapes(case))


@contextmanager
def _unrolled_scans() -> Iterator[None]:
    """Within it, loops over layers are traced as their bodies one after the other."""
    import jax

    scan = jax.lax.scan

    def unrolled(*args: Any, **options: Any) -> Any:
        return scan(*args, **{**options, "unroll": True})

    with mock.patch.object(jax.lax, "scan", unrolled):
        yield


def _run(case: Case, compiled: Any) -> float:
    """Predicts noise; most bytes that the device has ever had in use."""
    import jax

    from benchmarks.case import inputs
    from benchmarks.ours import device_peak, model_config
    from kafjax.models import build_model, example_inputs, init_variables

    variables = init_variables(build_model(model_config(case)), 0, *example_inputs("segmentation"))
    batch = inputs(case)
    arrays = jax.device_put([batch[name] for name in ("image", "keypoints", "keypoint_mask")])
    jax.block_until_ready(compiled(jax.device_put(variables), *arrays))
    return device_peak()


def make_tables(curves: Curves, num_keypoints: int) -> list[Table]:
    """GFLOP and memory by network and edge, and what the figure shows."""
    edges = [str(point.edge) for point in next(iter(curves.values()))]
    flop = [[n.label, *(_giga(p.flop) for p in curve)] for n, curve in curves.items()]
    memory = [
        [n.label, gigabytes(curve[0].parameters), *(gigabytes(p.memory) for p in curve)]
        for n, curve in curves.items()
    ]
    tables = [
        Table("GFLOP to predict a slice, by edge in pixels", ["", *edges], flop),
        Table(
            "Memory to predict a slice, without the parameters, by edge",
            ["", "parameters", *edges],
            memory,
        ),
    ]
    if all(point.measured is not None for curve in curves.values() for point in curve):
        rows = [[n.label, *(gigabytes(p.measured or 0) for p in c)] for n, c in curves.items()]
        tables.append(Table("The same, measured on the device", ["", *edges], rows))
    tables[-1].notes += [*explain(curves, num_keypoints), f"![GFLOP and memory]({PICTURE})"]
    return tables


def explain(curves: Curves, num_keypoints: int) -> list[str]:
    """What is constant as the image grows, and what is not, in the curves' own numbers."""
    by_name = {(n.name, n.blocks): curve for n, curve in curves.items()}
    kaf, c2 = by_name["kaf_unet", 64], by_name["unet_c2", 0]
    ends = (0, -1)
    small, large = (kaf[i].edge for i in ends)
    kaf_layer, swin_layer = (
        [(by_name[name, 100][i].flop - by_name[name, 20][i].flop) / 80 for i in ends]
        for name in ("kaf_unet", "swin_unet")
    )
    attention = [_giga(64 * layer) for layer in kaf_layer]
    added = [_giga(kaf[i].flop - c2[i].flop) for i in ends]
    memory = {name: [gigabytes(by_name[name][i].memory) for i in ends] for name in by_name}
    return [
        f"From {small} to {large} pixels an image has {(large / small) ** 2:.3g} times the pixels.",
        f"Constant: attention among K = {num_keypoints} keypoints. The paper's 64 layers cost "
        f"{attention[0]} GFLOP at {small} pixels and {attention[1]} at {large}, one layer "
        f"{_giga(kaf_layer[0])} and {_giga(kaf_layer[1])}; a block of the Swin Transformer "
        f"costs {_giga(swin_layer[0])} and {_giga(swin_layer[1])}, as its windows grow in number.",
        "Not constant: the convolutions, which grow with the pixels as everybody's. All that KAF "
        f"adds to UNet c2 is {added[0]} GFLOP at {small} pixels and {added[1]} at {large}: next to "
        "attention, the convolution that fuses the keypoints' context with the map.",
        f"Memory is the maps': KAF-UNet's grows from {memory['kaf_unet', 64][0]} to "
        f"{memory['kaf_unet', 64][1]}, UNet c2's from {memory['unet_c2', 0][0]} to "
        f"{memory['unet_c2', 0][1]}, that of Swin with 100 layers from "
        f"{memory['swin_unet', 100][0]} to {memory['swin_unet', 100][1]}. Further layers add "
        "parameters, and in prediction next to nothing else.",
        "All grow at most with the number of pixels: windows keep the Swin Transformer's attention "
        "from growing with its square, as attention among all patches would.",
    ]


def draw(curves: Curves, path: Path) -> None:
    """Draws GFLOP and memory against the edge, with logarithmic axes."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullFormatter

    figure = Figure(figsize=(9, 4.6), layout="constrained")
    panels = figure.subplots(1, 2)
    edges = [point.edge for point in next(iter(curves.values()))]
    for panel, title in zip(panels, ("GFLOP", "peak memory with parameters, GB"), strict=True):
        panel.set_xscale("log", base=2)
        panel.set_yscale("log")
        panel.set_xticks(edges, [str(edge) for edge in edges])
        panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        panel.yaxis.set_major_formatter("{x:g}")
        panel.yaxis.set_minor_formatter(NullFormatter())
        panel.set(xlabel="image edge, pixels", title=f"{title}, one slice")
        panel.grid(alpha=0.3)
        for edge in MARKED_EDGES.keys() & set(edges):
            panel.axvline(edge, color="0.6", linewidth=0.8)
            panel.annotate(
                f" {MARKED_EDGES[edge]}", (edge, 0.02), xycoords=("data", "axes fraction")
            )
    for network, curve in curves.items():
        look: dict[str, Any] = {"color": network.colour, "markersize": 4.5, "label": network.label}
        panels[0].plot(edges, [p.flop / 1e9 for p in curve], network.style, **look)
        panels[1].plot(
            edges, [(p.memory + p.parameters) / 1e9 for p in curve], network.style, **look
        )
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def write_csv(curves: Curves, path: Path) -> None:
    """Writes a row for each point: FLOP and bytes, unrounded."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        fields = ("edge", "flop", "parameters", "memory", "measured")
        writer.writerow(["network", "attention_layers", *fields])
        for network, curve in curves.items():
            for point in curve:
                writer.writerow([network.name, network.blocks, *asdict(point).values()])


def _giga(value: float) -> str:
    return f"{value / 1e9:.3g}" if value < 1e12 else f"{value / 1e9:.0f}"


if __name__ == "__main__":
    run(parser(), measure)
