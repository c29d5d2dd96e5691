"""The inference form: a trained stage or neck in, the same function with less work out."""
from .fold import fold_norms
from .stage import InferenceStage, merge_neck

__all__ = ['InferenceStage', 'fold_norms', 'merge_neck']
