"""The command line, `vt-zoo` or `python -m vt_zoo`: one file per command."""
from .main import main
