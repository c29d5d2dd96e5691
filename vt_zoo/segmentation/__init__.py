"""Semantic segmentation: data sets, training, evaluation and prediction with VT-FPN and the panoptic FPN."""
