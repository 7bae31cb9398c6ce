"""Campaigns of faults: `python -m tests.campaigns.main`.

There is a module for each kind of file or moment.
"""

import os

# Before JAX starts: campaigns compile much and compute little. Not below what a caller asks for.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")
