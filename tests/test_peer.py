"""The peer of the benchmarks is our network: parameters, outputs, gradients and statistics.

The golden values, which ours equals too (test_golden), say so quickly; a direct comparison is slow.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kafjax.models import build_model
from kafjax.torch_import import dead_weights, import_state_dict
from tests.release_weights import by_release_names, draw_state_dict, load_golden
from tests.small_models import model_config

torch = pytest.importorskip("torch")
from benchmarks import peer  # noqa: E402

torch.set_num_threads(1)  # more wait for each other on a busy machine

SIZE, NUM_KEYPOINTS, CLASSES = 32, 20, 3


def peer_and_ours(name: str) -> tuple[Any, ...]:
    """A small peer with drawn weights and statistics, our network, its config and variables."""
    layers = 2 if name == "kaf_unet" else 0
    torch.manual_seed(0)
    network = peer.PeerUNet(4, layers, CLASSES, copies=name == "unet_c2").double()
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm1d | torch.nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
    config = model_config(name, num_attention_layers=layers, dtype="float64")
    # A copy, for PyTorch's running statistics change in place.
    state = {k: v.numpy().copy() for k, v in network.state_dict().items()}
    return network, build_model(config), config, import_state_dict(state, config)


def drawn_inputs() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(1)
    image = rng.standard_normal((2, SIZE, SIZE, 1))
    # Coarse levels hold several at a pixel.
    keypoints = rng.integers(0, SIZE, (2, NUM_KEYPOINTS, 2))
    label = rng.integers(0, CLASSES, (2, SIZE, SIZE))
    return image, keypoints, label


@pytest.mark.parametrize("name", ["unet", "kaf_unet"])
def test_the_peer_has_the_golden_values(name: str) -> None:
    facts, golden = load_golden(name)
    config, names = facts["config"], facts["state_dict"]
    network = peer.PeerUNet(config["filters"], 2 * config["num_layers"], config["num_classes"])
    drawn = draw_state_dict(names, config["salt"])
    dead = dead_weights(drawn)
    state = {n: torch.tensor(drawn[n]) for n in drawn if n not in dead}
    network.double().load_state_dict(state)
    inputs = torch.tensor(golden["image"]).double(), torch.tensor(golden["keypoints"]).long()

    evaluated = network.eval()(*inputs).detach()
    trained = network.train()(*inputs)
    loss = torch.nn.functional.cross_entropy(trained, torch.tensor(golden["label"]).long())
    loss.backward()

    np.testing.assert_allclose(evaluated, golden["logits_eval"], rtol=1e-7, atol=1e-7)
    np.testing.assert_allclose(trained.detach(), golden["logits_train"], rtol=1e-7, atol=1e-7)
    np.testing.assert_allclose(loss.item(), golden["loss_train"], rtol=1e-12)
    norms = {n: torch.norm(p.grad).item() for n, p in network.named_parameters()}
    expected = {n: facts["grad_norm"][n] for n in norms}
    assert norms == pytest.approx(expected, rel=1e-9, abs=1e-12)
    after = {n: a for n, a in golden.items() if n.startswith("after/")}
    found = network.state_dict()
    for n, array in after.items():
        np.testing.assert_allclose(found[n.removeprefix("after/")], array, rtol=1e-6, atol=1e-7)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["unet", "unet_c2", "kaf_unet"])
def test_the_peer_computes_what_we_do(name: str) -> None:
    with jax.enable_x64(True):
        compare_peer(name)


def compare_peer(name: str) -> None:
    """Outputs, gradients and statistics in float64, where rounding is not amplified to be seen."""
    network, model, config, variables = peer_and_ours(name)
    image, keypoints, label = drawn_inputs()
    inputs = torch.tensor(image).permute(0, 3, 1, 2), torch.tensor(keypoints)
    mask = jnp.ones(keypoints.shape[:2], bool)

    def loss(params: Any) -> Any:
        logits, updated = model.apply(
            {**variables, "params": params}, image, keypoints, mask, train=True, mutable=True
        )
        likelihood = jnp.take_along_axis(jax.nn.log_softmax(logits), label[..., None], axis=-1)
        return -likelihood.mean(), (logits, updated["batch_stats"])

    @jax.jit
    def both(params: Any) -> Any:
        evaluated = model.apply(variables, image, keypoints, mask, train=False)
        return evaluated, jax.value_and_grad(loss, has_aux=True)(params)

    ours_evaluated, ((_, (ours_trained, statistics)), ours_gradients) = both(variables["params"])
    evaluated = network.eval()(*inputs)
    trained = network.train()(*inputs)
    torch.nn.functional.cross_entropy(trained, torch.tensor(label)).backward()

    np.testing.assert_allclose(ours_evaluated, channels_last(evaluated), rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(ours_trained, channels_last(trained), rtol=1e-9, atol=1e-9)
    gradients = {n: p.grad.numpy().copy() for n, p in network.named_parameters()}
    state = {k: v.numpy() for k, v in network.state_dict().items()}
    theirs = import_state_dict({**state, **gradients}, config)
    compare_trees(ours_gradients, theirs["params"])
    compare_trees(statistics, theirs["batch_stats"])


def channels_last(logits: Any) -> np.ndarray:
    return logits.detach().permute(0, 2, 3, 1).numpy()


def compare_trees(ours: Any, theirs: Any) -> None:
    """Each array to 1e-9 of its norm."""
    expected = by_release_names(theirs)
    for name, array in by_release_names(ours).items():
        error = np.linalg.norm(array - expected[name])
        # Biases before batch norm have no gradient but rounding.
        assert error <= 1e-9 * np.linalg.norm(expected[name]) + 1e-12, name


@pytest.mark.parametrize(
    ("sizes", "copies", "count"),
    [
        ((32, 0, 8), False, 7_763_584),
        ((32, 0, 8), True, 27_911_328),
        ((32, 16, 8), False, 71_467_264),
        ((48, 16, 4), False, 106_546_624),
    ],
)
def test_the_peer_has_the_papers_parameters(
    sizes: tuple[int, int, int], copies: bool, count: int
) -> None:
    with torch.device("meta"):
        assert peer.count_parameters(peer.PeerUNet(*sizes, copies=copies)) == count
