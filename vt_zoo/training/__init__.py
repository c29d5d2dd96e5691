"""Training code shared by classification and segmentation."""
from .._lazy import exports

__all__, __getattr__, __dir__ = exports(__name__, {'run_state': ['RunFinishedError']})
