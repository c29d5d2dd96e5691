"""Training classifiers on folders of images, and using them."""
from .._lazy import exports

__all__, __getattr__, __dir__ = exports(__name__, {
    'settings': ['FinetuneSettings'],
    'train': ['FinetuneResult', 'finetune'],
    'predict': ['load_classifier', 'predict_images'],
})
