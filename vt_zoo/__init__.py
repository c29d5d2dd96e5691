"""Visual Transformers (Wu et al., arXiv 2006.03677) as timm models. Importing this package registers them."""
from . import models
from ._version import __version__
