"""The shipped configs, in a clone: they lie in the folder `configs/` next to `kafjax/`.

A wheel has that folder itself in this place (`package_dir` in setup.cfg), and not this file.
"""

from pathlib import Path

__path__ = [str(Path(__file__).parents[2] / "configs")]
