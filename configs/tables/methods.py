"""Pretraining methods side by side (docs/method.md 6), as in the paper's table 1.

kafjax experiment --table methods --dataset chd
"""

from kafjax.study.plan import Row, Table

_NAMES = {"simclr": "SimCLR", "gcl": "GCL", "glcl": "GLCL", "pcl": "PCL"}


def get_table() -> Table:
    """The UNet pretrained by each method, and KAF-UNet."""
    return Table(
        title="Methods of pretraining",
        rows=(
            Row("UNet from scratch", "unet"),
            *(Row(f"UNet, {name}", "unet", method) for method, name in _NAMES.items()),
            Row("KAF-UNet from scratch", "kaf_unet"),
            Row("KAF-UNet, KAF", "kaf_unet", "kaf"),
        ),
        num_labeled={"chd": (2, 6, 15), "acdc": (2, 6, 15), "phantom": (2,)},
        reference="UNet from scratch",
    )
