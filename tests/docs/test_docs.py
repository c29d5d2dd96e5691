"""The documents' commands and Python run as they stand, from top to bottom, and print what they show."""
import re
from pathlib import Path

import pytest
from documents import blocks
from helpers import run_blocks

from vt_zoo.export.formats import FORMATS

ROOT = Path(__file__).parents[2]
@pytest.mark.slow
def test_analysis(tmp_path):
    run_blocks('docs/analysis.md', tmp_path)
    for pattern, number in (
            ('seen/*_tokens.png', 2), ('seen/tokens.png', 1), ('seen_in_a_photograph/cat_tokens.png', 1),
            ('seen_by_module_2/*_tokens.svg', 1), ('figure6.png', 1), ('tokens.png', 1),
            ('seen_by_level_2/*_tokens.png', 1), ('locality_random.png', 1)):
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
    """All but torch.hub, which tests/models/test_hubconf.py runs where vt_zoo is not installed."""
    pytest.importorskip('transformers')
    names = run_blocks('docs/libraries.md', tmp_path)
    assert names['answers'][0]['label'] == '3'
    of_new, pixels, of_known = sorted(names['accuracy'].values())
    assert [names['accuracy'][k] for k in ('pixels', 'embeddings, trained on 0 to 4')] == [pixels, of_new]
    assert of_known > 0.97 and of_new > 0.4
