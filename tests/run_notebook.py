"""docs/quickstart.ipynb from top to bottom in a new kernel; `python tests/run_notebook.py` writes its outputs anew."""
from pathlib import Path

import nbformat
from nbclient import NotebookClient

NOTEBOOK = Path(__file__).parents[1] / 'docs' / 'quickstart.ipynb'
SECONDS = 600  # that a cell may take


def run_notebook(notebook: nbformat.NotebookNode) -> None:
    """Run all cells in the order in which they stand, and leave nothing of this machine beside their outputs."""
    NotebookClient(notebook, timeout=SECONDS, record_timing=False).execute()
    del notebook.metadata['language_info']


if __name__ == '__main__':
    notebook = nbformat.read(NOTEBOOK, 4)
    run_notebook(notebook)
    nbformat.write(notebook, NOTEBOOK)
