"""A packed model goes to a repository and comes back as it was, over HTTP on loopback."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from kafjax.configs import phantom_finetune
from kafjax.errors import UserError
from kafjax.inference.hub import card, pull, push
from kafjax.inference.model_file import Model, pack, read_model
from kafjax.tasks.segmentation import Segmentation
from kafjax.workdir.preparation import write_preparation
from tests.hub import TOKEN, Hub, served
from tests.runs import free_address, write_run

pytest.importorskip("huggingface_hub")

PREPARATION = {
    "kind": "folder",
    "classes": ["background", "liver", "tumour"],
    "max_keypoints": 8,
    "keypoint_selection": "random",
    "seed": 3,
    "subjects": {"ct_1": "Zaphod"},
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = phantom_finetune.get_config()
    config.update_from_flattened_dict(
        {
            "model.name": "unet",
            "model.filters": 2,
            "model.num_classes": 3,
            "data.max_keypoints": 8,
            "data.dir": "/home/zaphod/data",
            "data.patch_size": (32, 48),
        }
    )
    workdir = tmp_path_factory.mktemp("run")
    write_run(workdir, config, Segmentation(config).init(), step=5)
    write_preparation(workdir, PREPARATION)
    path = tmp_path_factory.mktemp("packed") / "mine.kafjax"
    pack([workdir], path)
    return path


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # another protocol, not HTTP alone
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no_token"))
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    with served() as running:
        monkeypatch.setenv("HF_ENDPOINT", running.address)
        yield running


def test_a_pulled_model_is_the_pushed_one(hub: Hub, model: Path, tmp_path: Path) -> None:
    assert push(model, "me/liver") == f"{hub.address}/me/liver"
    assert "me/liver" in hub.private
    target = tmp_path / "new" / "model.kafjax"
    pull("me/liver", target)
    assert target.read_bytes() == model.read_bytes()
    assert list(target.parent.iterdir()) == [target]

    text = hub.files["me/liver"]["README.md"].decode()
    assert text == card(read_model(model), "me/liver")
    for part in ("# liver", "| tumour |", "32 x 48", "kafjax pull me/liver model.kafjax", "jax "):
        assert part in text
    for word in ("aphod", "ct_1"):
        assert word not in text
    # The owner's card stays; another model replaces the first.
    hub.files["me/liver"] |= {"README.md": b"mine", "model.kafjax": b"old"}
    push(model, "me/liver", public=True)
    assert hub.files["me/liver"] == {"README.md": b"mine", "model.kafjax": model.read_bytes()}


def test_a_public_repository_is_asked_for(
    hub: Hub, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    push(model, "me/open", public=True)
    assert "me/open" not in hub.private
    monkeypatch.delenv("HF_TOKEN")
    pull("me/open", tmp_path / "model.kafjax")
    with pytest.raises(UserError, match="me/open: no such revision"):
        pull("me/open", tmp_path / "model.kafjax", revision="v2")


def test_a_card_has_the_mean_scores() -> None:
    def member(liver: float | None) -> dict[str, Any]:
        config = {"model": {"name": "kaf_unet"}, "data": {"patch_size": [64, 64]}}
        dice = {"pooled_dice": {"mean": liver, "liver": liver, "tumour": None}}
        return {"config": config, "scores": {} if liver is None else {"validation": dice}}

    found = Model(Path("a"), PREPARATION, (member(0.5), member(0.75), member(None)), {}, {})
    text = card(found, "me/x")
    assert "3 networks (kaf_unet)" in text
    assert "| liver | 0.625 |\n| tumour |  |\n| mean | 0.625 |" in text
    assert "mean over 2 of 3" in text
    assert "were not scored" in card(replace(found, members=(member(None),)), "me/x")


@pytest.mark.parametrize(
    ("files", "found"),
    [
        (None, "me/x: no such repository on http://127"),
        ({"weights.bin": b"x"}, r"me/x: holds no model\.kafjax: it is not a model of kafjax push"),
        ({"model.kafjax": b"<html>"}, r"me/x: its model\.kafjax is not a packed model"),
    ],
)
def test_what_is_no_model_is_one_line(
    files: dict[str, bytes] | None, found: str, hub: Hub, tmp_path: Path
) -> None:
    if files is not None:
        hub.files["me/x"] = files
    with pytest.raises(UserError, match=found) as caught:
        pull("me/x", tmp_path / "model.kafjax")
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_a_damaged_model_gets_no_name(hub: Hub, model: Path, tmp_path: Path) -> None:
    content = bytearray(model.read_bytes())
    content[len(content) // 3] ^= 1
    hub.files["me/x"] = {"model.kafjax": bytes(content)}
    with pytest.raises(UserError, match=r"me/x: its model\.kafjax .*damaged"):
        pull("me/x", tmp_path / "model.kafjax")
    with pytest.raises(UserError, match=r"expected a name that ends in \.kafjax"):
        pull("me/x", tmp_path / "model.zip")
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_pushed_is_one_line(
    hub: Hub, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = tmp_path / "other.kafjax"
    other.write_bytes(b"x")
    with pytest.raises(UserError, match=r"other\.kafjax: is not a packed model"):
        push(other, "me/x")
    with pytest.raises(UserError, match="repository is 'a b/c/d'; expected OWNER/NAME"):
        push(model, "a b/c/d")
    with pytest.raises(UserError, match=r"you/x: http.* refuses your token \(403\)"):
        push(model, "you/x")
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(UserError, match=r"me/x: http.* refuses your token \(401\)"):
        push(model, "me/x")
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(UserError, match="no token of the Hub: run `hf auth login`"):
        push(model, "me/x")
    assert not hub.files


def test_a_server_that_is_not_there_is_one_line(
    hub: Hub, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # between the client's five tries
    address = f"http://{free_address()}"
    monkeypatch.setenv("HF_ENDPOINT", address)
    for action in (
        lambda: pull("me/x", tmp_path / "model.kafjax"),
        lambda: push(model, "me/x"),
    ):
        with pytest.raises(UserError, match=f"{address} cannot be reached") as caught:
            action()
        assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())
