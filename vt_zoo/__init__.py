"""Visual Transformers (Wu et al., arXiv 2006.03677) as timm models. Importing this package registers them."""
from . import models

__version__ = '0.1.0'
