"""Configs of a study's commands, and what is changed in them."""

import ast
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from kafjax.config_files import load_config
from kafjax.errors import UserError
from kafjax.files import flatten
from kafjax.training.config_checks import check_fields

# Of configs, by the end of their files' names, which changes can be for.
_KINDS = ("pretrain.", "finetune.")


class ConfigCommand(NamedTuple):
    """A config file with its variant (after a colon), and what is changed in it, by dotted path."""

    file: str
    changes: Mapping[str, Any]

    def config(self) -> Any:
        """The run's config; `ValueError` where there is no such file, or a field is refused."""
        config = load_config(self.file)
        try:
            config.update_from_flattened_dict(self.changes)
            check_fields(config)
        except (AttributeError, KeyError, TypeError, UserError) as error:
            text = str(error) if isinstance(error, UserError) else str(error.args[0])
            raise UserError(f"{self.file}: {'; '.join(text.splitlines())}") from None
        return config

    def arguments(self) -> list[str]:
        """The same on the command line; what the file says by itself is left out."""
        fields = flatten(load_config(self.file).to_dict())
        changed = {name: x for name, x in self.changes.items() if fields.get(name) != x}
        texts = {name: f"{x:g}" if isinstance(x, float) else x for name, x in changed.items()}
        return ["--config", self.file, *(f"--config.{name}={x}" for name, x in texts.items())]


def parse_changes(texts: Sequence[str]) -> dict[str, Any]:
    """Values by dotted path of `['model.dtype=bfloat16', 'batch_size=8']`."""
    changes = {}
    for text in texts:
        path, equals, value = text.partition("=")
        if not path or not equals:
            raise UserError(f"--set: found {text!r}, expected FIELD=VALUE, as model.dtype=bfloat16")
        try:
            changes[path] = ast.literal_eval(value)
        except (SyntaxError, ValueError):
            changes[path] = value
    return changes


def changes_of(changes: Mapping[str, Any], kind: str) -> dict[str, Any]:
    """Those of all configs, and then those of one kind, 'pretrain' or 'finetune'."""
    shared = {path: x for path, x in changes.items() if not path.startswith(_KINDS)}
    own = {path: x for path, x in changes.items() if path.startswith(f"{kind}.")}
    return shared | {path.removeprefix(f"{kind}."): x for path, x in own.items()}
