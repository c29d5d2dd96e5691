"""Model weights as files: writing, loading, converting and publishing them."""
from .._lazy import exports

__all__, __getattr__, __dir__ = exports(__name__, {
    'loading': ['Loaded', 'load', 'load_model'],
    'files': ['write_model', 'write_segmenter'],
    'conversion': ['Converted', 'convert'],
    'publish': ['upload', 'write_release'],
})
