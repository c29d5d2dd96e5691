"""Visual Transformers (Wu et al., arXiv 2006.03677) as timm models. Importing this package registers them."""
from . import _moved
from ._requirements import check_timm
from ._version import __version__

check_timm()
_moved.install()

from . import models  # noqa: E402
