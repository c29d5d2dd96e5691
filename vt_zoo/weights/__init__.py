"""Weights of models as files: written, loaded, converted, published."""
