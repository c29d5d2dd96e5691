"""The versions that a benchmark's result states."""
import platform

import timm
import torch

import vt_zoo


def versions() -> str:
    """Of Python and the libraries that decide a result."""
    return (
        f'Python {platform.python_version()}, torch {torch.__version__}, timm {timm.__version__}, vt_zoo '
        f'{vt_zoo.__version__}')
