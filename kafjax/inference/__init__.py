"""Prediction of slices and volumes, and evaluation."""

from kafjax._lazy import public

__all__, __getattr__ = public(
    __name__,
    {
        ".predictor": (
            "Predictor",
            "load_predictor",
        ),
        ".prediction": (
            "VolumePredictor",
            "load_volume_predictor",
            "predict_file",
            "predict_files",
            "predict_volume",
        ),
        ".evaluation": (
            "Evaluation",
            "evaluate",
            "evaluate_run",
        ),
    },
)
