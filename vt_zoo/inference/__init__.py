"""The inference form of a trained stage or neck, which computes the same function with less work."""
from .fold import fold_norms
from .stage import InferenceStage, fold_neck

__all__ = ['InferenceStage', 'fold_neck', 'fold_norms']
