"""The appendix's table 3: every fold with every number of labelled volumes M.

kafjax experiment --table table3 --dataset chd
"""

from kafjax.study.plan import Row, Table

_CHD = {
    2: "0.392(.062)",
    6: "0.636(.058)",
    10: "0.693(.034)",
    15: "0.712(.035)",
    20: "0.728(.038)",
    30: "0.754(.039)",
    51: "0.788(.033)",
}
_ACDC = {
    2: "0.741(.034)",
    6: "0.873(.013)",
    10: "0.895(.014)",
    15: "0.908(.008)",
    20: "0.915(.003)",
    30: "0.921(.003)",
    80: "0.930(.003)",
}


def get_table() -> Table:
    """KAF-UNet pretrained, and from scratch."""
    return Table(
        title="Folds and numbers of labelled volumes (the appendix's table 3)",
        rows=(
            Row("pretrained", "kaf_unet", "kaf", paper={"chd": _CHD, "acdc": _ACDC}),
            Row("from scratch", "kaf_unet", beyond=True),
        ),
        num_labeled={"chd": tuple(_CHD), "acdc": tuple(_ACDC), "phantom": (1, 2, 4, 8)},
        reference="from scratch",
        with_folds=True,
    )
