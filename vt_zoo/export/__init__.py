"""Exporting models to files for other runtimes."""
from .._lazy import exports

__all__, __getattr__, __dir__ = exports(__name__, {
    'formats': ['Exported', 'export'],
    'int8': ['Quantized', 'quantize'],
})
