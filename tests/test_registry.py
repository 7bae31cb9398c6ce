"""A name that is taken is refused, however it is given."""

import pytest

from data_prep.readers import READERS
from kafjax.models import MODELS
from kafjax.registry import Registry
from kafjax.tasks.registry import TASKS


def test_a_taken_name_is_refused_and_keeps_what_has_it() -> None:
    registry = Registry({"a": 1})
    registry["b"] = 2
    for give in (
        lambda: registry.__setitem__("a", 3),
        lambda: registry.update({"a": 3}),
        lambda: registry.__ior__({"a": 3}),
    ):
        with pytest.raises(ValueError, match="'a' is taken, by 1; expected another name than a, b"):
            give()
    assert dict(registry) == {"a": 1, "b": 2}
    del registry["a"]
    registry["a"] = 3
    assert registry["a"] == 3


@pytest.mark.parametrize("registry", [MODELS, READERS, TASKS], ids=["MODELS", "READERS", "TASKS"])
def test_every_registry_refuses(registry: Registry) -> None:
    name = next(iter(registry))
    before = registry[name]
    with pytest.raises(ValueError, match=f"'{name}' is taken"):
        registry[name] = object()
    assert registry[name] is before
