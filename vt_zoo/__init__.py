"""Visual Transformers (Wu et al., arXiv 2006.03677) as timm models. Importing this package registers them."""
from ._lazy import exports
from ._moved import find_old_modules
from ._requirements import check_timm
from ._version import __version__

check_timm()
find_old_modules()

from . import layers, models  # noqa: E402

__all__, __getattr__, __dir__ = exports(__name__, {'weights.loading': ['Loaded', 'load']}, [
    'analysis', 'classification', 'data', 'export', 'inference', 'layers', 'models', 'recipes', 'segmentation',
    'training', 'weights'])
