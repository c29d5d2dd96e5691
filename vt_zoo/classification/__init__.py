"""Training classifiers on folders of pictures, and using them."""
