"""The documents' commands and Python run as they stand, from top to bottom, and print what they show."""
import re
import subprocess
from pathlib import Path

import pytest
from documents import blocks

from vt_zoo.cli import main
from vt_zoo.export.formats import FORMATS

ROOT = Path(__file__).parents[1]
SHAPE = r'\([\d, ]+\)'


def shapes_shown(block):
    comments = [line.split('#')[1] for line in block.splitlines() if line.lstrip().startswith('print(') and '#' in line]
    return re.findall(SHAPE, ''.join(comments))


def shell_words(line, folder):
    """Words of a command, with the files that its patterns stand for, as a shell gives them."""
    shell = f'{line.split()[0]}() {{ printf "%s\\n" "$@"; }}; {line}'
    return subprocess.run(['bash', '-c', shell], cwd=folder, capture_output=True, text=True).stdout.splitlines()


def run_blocks(document, folder, name=''):
    """Run blocks of a document in a folder and in this process; the shapes that Python prints are those it shows.

    Returns:
        The variables that its Python leaves.
    """
    names, printed = {}, []
    names['print'] = lambda *values: printed.append(' '.join(map(str, values)))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for language, block in blocks(document, 'python', 'sh', name=name):
            if language == 'sh':
                for line in block.splitlines():
                    assert main(shell_words(line, folder)) == 0, line
            else:
                printed.clear()
                exec(compile(block, 'a document', 'exec'), names)
                text = '\n'.join(printed).replace('torch.Size([', '(').replace('])', ')')
                assert re.findall(SHAPE, text) == shapes_shown(block)
    return names


@pytest.mark.slow
def test_analysis(tmp_path):
    run_blocks('docs/analysis.md', tmp_path)
    for pattern, number in (
            ('seen/*_tokens.png', 2), ('seen/tokens.png', 1), ('seen_by_module_2/*_tokens.svg', 1), ('figure6.png', 1),
            ('tokens.png', 1), ('seen_by_level_2/*_tokens.png', 1), ('locality_random.png', 1)):
        assert len(list(tmp_path.glob(pattern))) == number, pattern


def test_inference_form(capsys):
    (_, block), = blocks('docs/speed.md', 'python')
    exec(compile(block, 'docs/speed.md', 'exec'), {})
    assert capsys.readouterr().out == block.splitlines()[-1].split('# ')[1] + '\n'


@pytest.mark.slow
@pytest.mark.parametrize('document, name', [('export', ''), ('export', 'aoti'), ('int8', '')])
def test_document(document, name, tmp_path):
    run_blocks(f'docs/{document}.md', tmp_path, name)


def test_each_format_is_shown():
    text = (ROOT / 'docs' / 'export.md').read_text()
    assert set(re.findall(r'--format (\w+)', text)) == set(FORMATS)
    assert set(re.findall(r'^\| `(\w+)`', text, re.MULTILINE)) == set(FORMATS)


@pytest.mark.slow
def test_libraries(tmp_path):
    """All but torch.hub, which tests/test_hubconf.py runs where vt_zoo is not installed."""
    pytest.importorskip('transformers')
    names = run_blocks('docs/libraries.md', tmp_path)
    assert names['answers'][0]['label'] == '3'
    of_new, pixels, of_known = sorted(names['accuracy'].values())
    assert [names['accuracy'][k] for k in ('pixels', 'embeddings, trained on 0 to 4')] == [pixels, of_new]
    assert of_known > 0.97 and of_new > 0.4
