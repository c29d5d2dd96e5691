"""Semantic segmentation: data sets, augmentation of image and mask together, and a set composed of real digits."""
