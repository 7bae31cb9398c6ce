"""The appendix's table 1: the effects of network width and of KAF.

kafjax experiment --table table1 --dataset chd
"""

from kafjax.study.plan import Row, Table


def get_table() -> Table:
    """The plain UNets from scratch, and KAF-UNet pretrained; then both the other way round."""
    return Table(
        title="Networks of different width, and KAF-UNet pretrained (the appendix's table 1)",
        rows=(
            Row(
                "UNet (c1)",
                "unet",
                paper={"chd": {15: "0.627(.05)"}, "acdc": {6: "0.782(.03)"}},
            ),
            Row(
                "UNet (c2)",
                "unet_c2",
                paper={"chd": {15: "0.646(.04)"}, "acdc": {6: "0.796(.03)"}},
            ),
            Row(
                "KAF-UNet, pretrained",
                "kaf_unet",
                "kaf",
                paper={"chd": {15: "0.712(.03)"}, "acdc": {6: "0.873(.01)"}},
            ),
            # Separates the network's share of the last row's lead from the pretraining's.
            Row("KAF-UNet", "kaf_unet", beyond=True),
            Row("UNet (c1), pretrained with PCL", "unet", "pcl", beyond=True),
        ),
        num_labeled={"chd": (15,), "acdc": (6,), "phantom": (2,)},
        reference="UNet (c1)",
        with_parameters=True,
    )
