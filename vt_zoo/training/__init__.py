"""Training code shared by classification and segmentation."""
