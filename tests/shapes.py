"""Checks the shapes and types that public signatures state, at each call in tests."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
from beartype import BeartypeConf, beartype
from beartype.roar import BeartypeCallHintViolation

MODULES = ("assignment", "augment", "components", "intensity", "losses", "mixing", "models")


def check_signatures() -> None:
    """Makes `MODULES` check every call, also under jit and vmap; call before importing them."""
    jaxtyping.install_import_hook([f"kafjax.{name}" for name in MODULES], "tests.shapes.checked")


def checked(function: Callable[..., Any]) -> Callable[..., Any]:
    """Beartype, except that NumPy arrays pass for JAX's and ints for floats."""
    strict = beartype(conf=BeartypeConf(is_pep484_tower=True))(function)

    @functools.wraps(function)
    def check(*args: Any, **kwargs: Any) -> Any:
        try:
            return strict(*args, **kwargs)
        except BeartypeCallHintViolation:
            args, kwargs = jax.tree.map(_as_jax, (args, kwargs))
            return strict(*args, **kwargs)

    return check


def _as_jax(x: Any) -> Any:
    return jnp.asarray(x) if isinstance(x, np.ndarray) else x
