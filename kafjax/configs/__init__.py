"""The shipped configs, in a clone: they lie in the folder `configs/` next to `kafjax/`.

A wheel has that folder itself in this place (`package_dir` in setup.cfg), and not this file.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

__path__ = [str(Path(__file__).parents[2] / "configs")]

if TYPE_CHECKING:  # which does not follow the path

    def __getattr__(name: str) -> Any: ...
