"""The analysis of arithmetic and memory: published and hand-counted FLOP, and what is written."""

import csv
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.image import imread

from benchmarks.case import Case
from benchmarks.compute import NETWORKS, Point, analyse, count_flop, draw, make_tables, write_csv
from kafjax.models import build_model
from tests.small_models import model_config

K = 64


def case(network: str, layers: int = 2, **fields: Any) -> Case:
    sizes = {"size": 32, "filters": 4, "num_keypoints": K, **fields}
    return Case(network=network, num_attention_layers=layers, **sizes)


# By hand, 3x3 convolutions counted as if the image had no border: at 256 pixels 2 % too many.
@pytest.mark.parametrize(("network", "giga"), [("unet", 24.1), ("unet_c2", 78.1)])
def test_unets_have_their_flop_counted_by_hand(network: str, giga: float) -> None:
    flop = count_flop(case(network, size=256, filters=32))
    assert math.isclose(flop, giga * 1e9, rel_tol=0.025)


def test_an_attention_layer_costs_its_matrix_products_whatever_the_size() -> None:
    # Of 256 features: query, key, value and merge; MLP of 512, 512 and 256; weights and messages.
    products = 4 * K * 256**2 + K * (512 * 512 + 512 * 256) + 2 * K**2 * 256
    few, many = (count_flop(case("kaf_unet", n)) for n in (1, 2))
    layer = (many - few) / 4  # one more on each of four levels, whose sizes differ
    # Biases, batch norms and softmaxes are under 2 %.
    assert 2 * products < layer < 1.02 * 2 * products


def test_a_transformer_block_costs_its_matrix_products() -> None:
    # Fourth stage of 64 x 64 pixels with f = 32: 2 x 2 tokens of 768 channels, all in one window.
    t, c = 4, 768
    products = 12 * t * c**2 + 2 * t**2 * c
    few, many = (count_flop(case("swin_unet", n, size=64, filters=32)) for n in (2, 4))
    # Biases, layer norms and GELU are under 3 %.
    assert 2 * products < (many - few) / 2 < 1.03 * 2 * products


def test_memory_is_what_the_program_needs_beside_its_parameters() -> None:
    point = analyse(case("unet", size=128, filters=32))
    # docs/method.md section 5, and two running statistics for each of 60 f normalised channels.
    assert point.parameters == 4 * (7_763_584 + 2 * 60 * 32)
    assert point.measured is None  # on the CPU
    # The finest level's maps in float32, and the logits; not the maps of all levels at once.
    logits, level = (128 * 128 * channels * 4 for channels in (8, 32))
    assert logits + 2 * level < point.memory < logits + 12 * level


@pytest.mark.parametrize("network", NETWORKS)
def test_curves_have_the_layers_that_they_tell(network: Any) -> None:
    layers = network.num_attention_layers
    assert network.name in ("unet", "unet_c2") or str(network.blocks) in network.label
    levels = {"kaf_unet": 4, "swin_unet": 1}.get(network.name, 0)
    assert layers * levels == network.blocks
    build_model(model_config(network.name, num_attention_layers=layers))


@pytest.fixture
def curves() -> dict[Any, list[Point]]:
    """A curve for each network; memory in another order than arithmetic."""
    return {
        network: [
            Point(edge, (i + 1) * edge**2 * 1e5, 10**6, (9 - i) * edge**2 * 100, 1e6 * edge)
            for edge in (128, 512)
        ]
        for i, network in enumerate(NETWORKS)
    }


def test_tables_and_csv_hold_every_point(curves: dict[Any, list[Point]], tmp_path: Path) -> None:
    flop, memory, measured = make_tables(curves, 512)
    assert flop.rows[0] == ["UNet", "1.64", "26.2"]
    assert memory.rows[-1] == ["Swin, 100 layers", "1 MB", "4.92 MB", "78.6 MB"]
    assert measured.rows[3] == ["KAF-UNet, 64 layers", "0.13 GB", "0.51 GB"]
    assert "16 times the pixels" in measured.notes[0]
    write_csv(curves, tmp_path / "points.csv")
    rows = list(csv.DictReader((tmp_path / "points.csv").open()))
    assert len(rows) == 2 * len(NETWORKS)
    assert rows[7]["network"] == "kaf_unet"
    assert [float(rows[7][field]) for field in ("attention_layers", "edge", "memory")] == [
        *(64, 512),
        6 * 512**2 * 100,
    ]


def test_a_picture_is_drawn_of_every_curve(curves: dict[Any, list[Point]], tmp_path: Path) -> None:
    draw(curves, tmp_path / "new" / "curves.png")
    pixels = imread(tmp_path / "new" / "curves.png")
    red, green, blue = (255 * pixels[..., i].ravel().astype(float) for i in range(3))
    seen = set(np.unique(np.round(red * 2**16 + green * 2**8 + blue).astype(int)))
    assert {int(network.colour[1:], 16) for network in NETWORKS} <= seen


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "benchmarks.compute", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_an_edge_that_no_network_takes_is_named(tmp_path: Path) -> None:
    done = run("--edges", "64,100", "--output", str(tmp_path / "out"))
    assert done.returncode == 2
    assert done.stderr == "error: --edges has [100], expected positive multiples of 16\n"
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_the_command_writes_picture_tables_and_numbers(tmp_path: Path) -> None:
    sizes = ("--edges", "32,16", "--filters", "4", "--num_keypoints", "8")
    done = run(*sizes, "--output", str(tmp_path))
    assert done.returncode == 0, done.stderr
    names = {"compute.csv", "compute.json", "compute.md", "compute.png"}
    assert {path.name for path in tmp_path.iterdir()} == names
    assert "| UNet c2 |" in done.stdout
