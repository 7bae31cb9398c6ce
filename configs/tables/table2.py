"""The appendix's table 2: weights w1, w2, w3 of the pretraining's three losses.

kafjax experiment --table table2 --dataset chd
"""

from kafjax.study.plan import Row, Table

# w1 of the CNN head's global loss, w2 of the KAF head's, w3 of the matching of keypoints.
_PAPER = {
    (1, 1, 0.1): "0.702(.04)",
    (1, 1, 0.01): "0.712(.03)",
    (1, 1, 0.001): "0.708(.04)",
    (0, 1, 0.08): "0.705(.03)",
    (0, 1, 0.04): "0.705(.03)",
    (0, 1, 0.02): "0.707(.03)",
    (0, 1, 0.01): "0.700(.03)",
    (0, 1, 0.005): "0.700(.03)",
    (0, 1, 0.001): "0.705(.03)",
    (0, 0, 1): "0.689(.04)",
}
_USUAL = (1, 1, 0.01)  # the method's default weights


def get_table() -> Table:
    """A KAF-UNet pretrained with each of the weights, and the text's reference from scratch."""
    weighted = tuple(
        Row(
            ", ".join(f"{weight:g}" for weight in weights),
            "kaf_unet",
            "kaf",
            None if weights == _USUAL else weights,
            paper={"chd": {15: dice}},
        )
        for weights, dice in _PAPER.items()
    )
    # 0.686 stands in the appendix's text.
    scratch = Row("from scratch", "kaf_unet", paper={"chd": {15: "0.686"}})
    return Table(
        title="Weights w1, w2, w3 of the losses of pretraining (the appendix's table 2)",
        rows=(*weighted, scratch),
        num_labeled={"chd": (15,), "acdc": (6,), "phantom": (2,)},
        reference="from scratch",
    )
