"""Pretraining on ACDC on a CPU core: almost whole slices on a grid of 4 mm.

    kafjax prepare --dataset acdc --raw_dir ACDC/database/training --name acdc_small \
        --pixel_spacing 4 --max_keypoints 128
    kafjax train --config acdc_small_pretrain

96 x 96 pixels hold more than half of the volumes whole, and of the others all except a margin;
f = 8, one attention layer, batches of 16 pairs, some 620 steps. Views turn as patients do and are
not mirrored: with the paper's ranges the global losses stay at their plateau (docs/results.md).
Random smaller patches of the paper's grid do not save time: they do not reveal a slice's position
in its volume, and the losses stay there too.
"""

import ml_collections

from kafjax.configs import acdc_pretrain


def get_config(method: str = "kaf") -> ml_collections.ConfigDict:
    """ACDC's run, smaller."""
    config = acdc_pretrain.get_config(method)
    config.batch_size = 16
    config.num_epochs = 9
    config.data.update(
        # A patch has 54 keypoints in the mean.
        {"name": "acdc_small", "patch_size": (96, 96), "patch_keypoints": 48, "num_threads": 1}
    )
    config.model.update({"filters": 8, "num_attention_layers": 1, "embedding": 64})
    # At 1e-3 the first steps enlarge the common part of all embeddings so much that the CNN head's
    # gradient vanishes; at 1e-4 it does not (docs/results.md).
    config.optimizer.update({"name": "adam", "learning_rate": 1e-4})
    config.augment.transform.update(
        {
            "mirror_probability": 0.0,
            "rotation": (-0.5, 0.5),
            # The paper's at 1.25 mm: sigma times 1.25 / 4, alpha, on which sigma acts too, twice.
            "elastic_sigma": (4.4, 5.3),
            "elastic_alpha": (9.8, 34.0),
        }
    )
    config.every.update({"log": 10, "checkpoint": 50, "picture": 0})
    return config
