"""The inference form: a trained stage or neck in, the same function with less work out."""
from .fold import fold_norms
from .stage import InferenceStage, fold_neck

__all__ = ['InferenceStage', 'fold_neck', 'fold_norms']
