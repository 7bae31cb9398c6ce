"""Compilation for tests, whose programs run once."""

import functools

import jax

# In half of `jax.jit`'s time, to programs that run slower.
quick_jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
