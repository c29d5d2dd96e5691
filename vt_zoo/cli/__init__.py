"""The command line, `vt-zoo` or `python -m vt_zoo`: one file a command."""
from .main import main
