"""Weights of models as files: written, loaded, converted, published."""
from .loading import Loaded, load

__all__ = ['Loaded', 'load']
