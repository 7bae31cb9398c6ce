"""Keypoint-augmented self-supervised pretraining and few-label segmentation in JAX.

The packages; each lists its public names in `__all__`:

    models, losses, assignment, augment, segmentation_metrics    the library: JAX and Flax only
    data                      prepared datasets: records, slices, batches, patches, splits
    checkpoint, workdir       checkpoints, and the folder of a run
    tasks, training           objectives, and the training loop
    inference, study          prediction and evaluation, and studies of many runs
    drawing, figures, report  pictures, figures and HTML reports
"""

__version__ = "0.2.0"
