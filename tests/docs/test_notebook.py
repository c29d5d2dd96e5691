"""docs/quickstart.ipynb runs from top to bottom, and its committed outputs are what comes of it."""
import copy
import itertools
import re
import sys

import pytest

nbformat = pytest.importorskip('nbformat')
pytest.importorskip('nbclient')
pytest.importorskip('ipykernel')
pytest.importorskip('onnxscript')

from run_notebook import NOTEBOOK, run_notebook  # noqa: E402

COMMITTED = nbformat.read(NOTEBOOK, nbformat.NO_CONVERT)
MAX_BYTES = 600_000


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == 'code']


def text(cell):
    """What a cell printed."""
    return ''.join(output.text for output in cell.outputs if output.output_type == 'stream')


def kinds(cell):
    """Of what kinds the outputs of a cell are; a kernel may send what it prints in several pieces."""
    found = [(output.output_type, output.get('name'), sorted(output.get('data', {}))) for output in cell.outputs]
    return [kind for kind, _ in itertools.groupby(found)]


@pytest.fixture(scope='module')
def executed(tmp_path_factory):
    """The notebook as it runs here in a folder of its own, and what it left in that folder."""
    folder = tmp_path_factory.mktemp('notebook')
    notebook = copy.deepcopy(COMMITTED)
    for cell in code_cells(notebook):
        cell.update(outputs=[], execution_count=None)
    notebook.cells.append(nbformat.v4.new_code_cell('import sys\nprint(sys.executable)'))
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (('TMPDIR', folder), ('IPYTHONDIR', folder / 'ipython'), ('JUPYTER_PREFER_ENV_PATH', 1)):
            patch.setenv(name, str(value))
        patch.chdir(folder)
        run_notebook(notebook)
    assert text(notebook.cells.pop()) == f'{sys.executable}\n'  # the kernel has the packages that are tested
    return notebook


def check_outputs(notebook):
    nbformat.validate(notebook)
    cells = code_cells(notebook)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    for cell in cells:
        assert cell.outputs, cell.source
        for output in cell.outputs:
            assert output.output_type != 'error' and output.get('name') != 'stderr', output
    printed = ''.join(map(text, cells))
    (accuracy,) = re.findall(r'^accuracy ([\d.]+) %, \d+ of 450 digits$', printed, re.MULTILINE)
    assert float(accuracy) >= 94
    assert '450 of 450 predictions are the same' in printed
    assert float(re.search(r'largest difference of a logit: (\S+)', printed)[1]) < 1e-4


def test_committed_outputs():
    check_outputs(COMMITTED)


@pytest.mark.slow
def test_outputs_of_a_run(executed):
    check_outputs(executed)


@pytest.mark.slow
def test_committed_outputs_are_those_of_the_sources(executed):
    assert [cell.source for cell in executed.cells] == [cell.source for cell in COMMITTED.cells]
    for committed, cell in zip(code_cells(COMMITTED), code_cells(executed)):
        assert kinds(committed) == kinds(cell)
        assert re.sub(r'[\d.]+(e-\d+)?', '#', text(committed)) == re.sub(r'[\d.]+(e-\d+)?', '#', text(cell))


def test_file_is_lean():
    content = NOTEBOOK.read_text()
    assert len(content) < MAX_BYTES
    assert COMMITTED.metadata == {'kernelspec': {'display_name': 'Python 3', 'language': 'python', 'name': 'python3'}}
    assert all(cell.metadata == {} for cell in COMMITTED.cells)
    words = re.sub(r'"image/png": "[^"]+"', '', content)
    assert not re.search(r'/tmp|/home|/root|/work|/usr|site-packages|20\d\d-\d\d|\d%\|', words)
