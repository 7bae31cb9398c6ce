"""Packed models in repositories of the Hugging Face Hub: `kafjax push` and `kafjax pull`.

    OWNER/NAME/model.kafjax    the model (`kafjax.inference.model_file`)
    OWNER/NAME/README.md       its card, from the model's own facts

The variable HF_ENDPOINT names another server. What is pulled is verified before it is put in its
place: whatever a repository holds, nothing of it is executed. Needs the extra `hub`.
"""

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from kafjax.errors import UserError, import_extra
from kafjax.files import replacing
from kafjax.inference.model_file import ENDING, Model, read_model

FILE = f"model{ENDING}"
CARD = "README.md"
_CARD = """\
---
library_name: kafjax
pipeline_tag: image-segmentation
tags:
- kafjax
- medical
---

# {title}

{networks} for slices of {rows} x {columns} pixels, packed by kafjax {version}.

| class | Dice |
|---|---|
{classes}

{scores}

```sh
pip install 'kafjax[data,hub]'
kafjax pull {repository} {file}
kafjax predict --model {file} --input scan.nii.gz --output labels.nii.gz
```

Versions: {versions}.
"""


def push(path: str | os.PathLike[str], repository: str, *, public: bool = False) -> str:
    """Uploads a packed model and, unless there is one, its card; makes a missing repository.

    Args:
      path: of the model, which is verified first.
      repository: OWNER/NAME.
      public: whether a new repository is public; an existing one stays as it is.

    Returns:
      The repository's address.

    Raises:
      UserError: not a packed model, no token, or the server refuses or cannot be reached.
    """
    model = _verified(path)
    hub, api = _api()
    if hub.get_token() is None:
        raise UserError("no token of the Hub: run `hf auth login`, or set HF_TOKEN")
    with _explained(api, repository):
        api.create_repo(repository, private=not public, exist_ok=True)
        files: dict[str, Any] = {FILE: str(path)}
        if not api.file_exists(repository, CARD):
            files[CARD] = card(model, repository).encode()
        api.create_commit(
            repository,
            [hub.CommitOperationAdd(name, content) for name, content in files.items()],
            commit_message="Model of kafjax",
        )
    return f"{api.endpoint}/{repository}"


def pull(repository: str, target: str | os.PathLike[str], *, revision: str | None = None) -> None:
    """Downloads a packed model, and verifies it before it gets its name.

    Args:
      repository: OWNER/NAME.
      target: `.kafjax`.
      revision: a branch, tag or commit; by default main.

    Raises:
      UserError: no such repository or revision, one without a model, a damaged model, or a server
        that refuses or cannot be reached.
    """
    path = Path(target)
    if path.suffix != ENDING:
        raise UserError(f"output is {path}; expected a name that ends in {ENDING}")
    _, api = _api()
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".pull") as folder:
        with _explained(api, repository):
            found = api.hf_hub_download(repository, FILE, revision=revision, local_dir=folder)
        try:
            _verified(found)
        except UserError as error:
            fault = str(error).removeprefix(f"{found}: ")
            raise UserError(f"{repository}: its {FILE} {fault}") from None
        with replacing(path) as partial:
            shutil.move(found, partial)


def card(model: Model, repository: str) -> str:
    """The text of a model's card: what it segments, its scores and its versions, and its use."""
    configs = [member["config"] for member in model.members]
    number = len(configs)
    names = sorted({config["model"]["name"] for config in configs})
    rows, columns = configs[0]["data"]["patch_size"]
    dice = [
        member["scores"]["validation"]["pooled_dice"]
        for member in model.members
        if "validation" in member["scores"]
    ]
    classes = [
        f"| {name} | {_mean([of_network.get(name) for of_network in dice])} |"
        for name in [*model.preparation["classes"][1:], "mean"]
    ]
    scores = "The validation volumes were not scored."
    if dice:
        scores = (
            "Dice is pooled over the pixels of the volumes that each network was validated on, "
            f"and is the mean over {len(dice)} of {number}."
        )
    return _CARD.format(
        title=repository.split("/")[-1],
        networks=f"{'A network' if number == 1 else f'{number} networks'} ({', '.join(names)})",
        rows=rows,
        columns=columns,
        version=model.versions.get("kafjax"),
        classes="\n".join(classes),
        scores=scores,
        repository=repository,
        file=FILE,
        versions=", ".join(f"{name} {version}" for name, version in model.versions.items()),
    )


def _mean(values: list[float | None]) -> str:
    numbers = [value for value in values if value is not None]
    return f"{np.mean(numbers):.3f}" if numbers else ""


def _verified(path: str | os.PathLike[str]) -> Model:
    model = read_model(path)
    for _ in model.arrays():
        pass
    return model


def _api() -> tuple[Any, Any]:
    """The library, and its client of the server in HF_ENDPOINT, read now and not at import."""
    hub = import_extra("huggingface_hub")
    return hub, hub.HfApi(endpoint=os.environ.get("HF_ENDPOINT"), library_name="kafjax")


@contextlib.contextmanager
def _explained(api: Any, repository: str) -> Iterator[None]:
    """Errors of the Hub's client as one line."""
    errors = import_extra("huggingface_hub.errors")
    try:
        yield
    except errors.HFValidationError:
        raise UserError(f"repository is {repository!r}; expected OWNER/NAME") from None
    except errors.GatedRepoError as error:
        raise UserError(f"{repository}: ask its owners for access on {api.endpoint}") from error
    except errors.RepositoryNotFoundError as error:
        raise UserError(
            f"{repository}: no such repository on {api.endpoint}, or a private one that your "
            "token may not see (`hf auth login`, or HF_TOKEN)"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise UserError(f"{repository}: no such revision") from error
    except errors.RemoteEntryNotFoundError as error:
        raise UserError(
            f"{repository}: holds no {FILE}: it is not a model of kafjax push"
        ) from error
    except errors.HfHubHTTPError as error:
        status = error.response.status_code
        if status in (401, 403):
            raise UserError(
                f"{repository}: {api.endpoint} refuses your token ({status}); it needs the right "
                "to write for push, and to read for pull"
            ) from error
        raise UserError(f"{repository}: {api.endpoint} answered {status}; try later") from error
    # Of the HTTP library, and of downloads that find no server.
    except (errors.HTTPError, errors.LocalEntryNotFoundError, ConnectionError) as error:
        reason = " ".join(str(error.__cause__ or error).split())[:100]
        raise UserError(f"{api.endpoint} cannot be reached ({reason})") from error
