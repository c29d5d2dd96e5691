"""benchmarks/paper_tables.py: its page is the committed one, its cells follow from the numbers, its errata add up."""
import copy
import re
from decimal import Decimal

import pytest

pytest.importorskip('segmentation_models_pytorch')

import paper_tables
from paper_tables import PAPER


def read(page):
    """Table, row, column, printed number, ours, difference, what runs and status of each cell."""
    table, cells = 0, []
    for line in page.read_text().splitlines():
        if line.startswith('## Table '):
            table = int(line.split()[-1])
        elif len(found := line.split(' | ')) == 7 and found[1] != 'column':
            cells.append((table, found[0].removeprefix('| '), *found[1:6], found[6].removesuffix(' |').split(':')[0]))
    return cells


@pytest.fixture(scope='module')
def page(tmp_path_factory):
    path = tmp_path_factory.mktemp('tables') / 'paper_tables.md'
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(paper_tables, 'PAGE', path)
        assert paper_tables.main() == 0
    return path


def test_the_committed_page_has_the_same_cells(page):
    cells, committed = ([(*cell[:4], cell[7]) for cell in read(path)] for path in (page, paper_tables.PAGE))
    assert cells == committed
    assert len(cells) > 200
    assert {table for table, *_ in cells} == set(range(1, 11))


def test_accuracies_are_unverified(page):
    for _, _, column, _, ours, *_, status in read(page):
        assert (status == 'unverified') == (not ours)
        assert column not in ('accuracy, %', 'mIoU, %') or status == 'unverified'


def test_statuses_follow_from_the_numbers(page):
    for cell in read(page):
        *_, paper, ours, _, _, status = cell
        if ours:
            paper, ours = Decimal(paper), Decimal(ours)
            half = Decimal('0.5').scaleb(paper.as_tuple().exponent)
            slack = Decimal('0.5').scaleb(ours.as_tuple().exponent)  # the page rounds ours too
            if status == 'reproduced':
                assert abs(ours - paper) <= max(half, paper / 1000) + slack, cell
            else:
                assert abs(ours - paper) >= max(half, paper / 1000) - slack, cell


def test_every_difference_has_a_reason():
    rows = [row for table in PAPER['tables'].values() for row in table['rows']]
    assert [row for row in rows if ('*' in row['cells']) != ('why' in row)] == []


def test_fpn_modules_are_shown(page):
    text = page.read_text()
    assert '| 800x1216 | 55.099 | 8.591 | 0.102 | 6.41 | 6.49 |' in text
    assert '| 473x473 | 12.893 | 2.113 | 0.102 | 6.10 | 6.41 |' in text


@pytest.mark.parametrize('cells, column', [
    ('74.5 3369 20.7', 'multiply-adds, M'), ('74.5 3369* 20.7*', 'parameters, M')])
def test_a_star_too_few_or_too_many_fails(cells, column, tmp_path, monkeypatch, capsys):
    table = copy.deepcopy(PAPER['tables'][4])
    row = next(row for row in table['rows'] if row['row'] == 'R34, w/o RT')
    assert row['cells'] == '74.5 3369* 20.7'
    row['cells'] = cells
    monkeypatch.setattr(paper_tables, 'PAPER', {'tables': {4: table}})
    monkeypatch.setattr(paper_tables, 'PAGE', tmp_path / 'page.md')
    assert paper_tables.main() == 1
    _, line = capsys.readouterr().err.splitlines()
    assert f"row='R34, w/o RT', column='{column}'" in line
    assert not list(tmp_path.iterdir())


def test_arithmetic_of_the_errata():
    number = r'(\d+(?:\.\d+)?)'
    operand = rf'(?:{number}|\({number} - {number}\))'
    formula = re.compile(rf'{number} ([-/]) {operand} = {number}')
    checked = 0
    for where, what in PAPER['errata']:
        found = formula.findall(what)
        assert len(found) == what.count('='), (where, what)
        for a, sign, b, c, d, result in found:
            b = Decimal(b) if b else Decimal(c) - Decimal(d)
            value = Decimal(a) - b if sign == '-' else Decimal(a) / b
            assert abs(value - Decimal(result)) <= Decimal('0.5').scaleb(Decimal(result).as_tuple().exponent), what
            checked += 1
    assert checked >= 10
