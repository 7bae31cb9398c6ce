"""The appendix's table 4: KAF layers in another network, the FCN, from scratch.

kafjax experiment --table table4 --dataset chd
"""

from kafjax.configs.tables import table3

from kafjax.study.plan import Row, Table

_FCN = {
    2: "0.286(.056)",
    6: "0.522(.052)",
    10: "0.591(.063)",
    15: "0.648(.033)",
    20: "0.672(.044)",
    30: "0.696(.054)",
    51: "0.748(.024)",
}
_KAF_FCN = {
    2: "0.297(.059)",
    6: "0.551(.058)",
    10: "0.626(.036)",
    15: "0.658(.039)",
    20: "0.683(.034)",
    30: "0.714(.040)",
    51: "0.752(.027)",
}


def get_table() -> Table:
    """The FCN without and with KAF layers."""
    return Table(
        title="KAF layers in the FCN, from scratch (the appendix's table 4)",
        rows=(
            Row("FCN", "fcn", paper={"chd": _FCN}),
            Row("FCN with KAF", "kaf_fcn", paper={"chd": _KAF_FCN}),
        ),
        num_labeled=table3.get_table().num_labeled,
        reference="FCN",
        with_folds=True,
    )
