"""The floor plan: a package imports only what stands below it, and docs/api lists what is public."""
import ast
import importlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / 'vt_zoo'
GROUND = {'_version', '_requirements', '_lazy', '_moved', 'errors', 'files', 'devices', 'fonts', 'run', 'recipes'}
FLOORS = [  # from the ground up; what stands on one floor does not import its neighbours
    GROUND, {'layers', 'data'}, {'inference'}, {'models'}, {'weights'}, {'training'},
    {'classification', 'segmentation', 'export'}, {'analysis'}, {'cli'}]
FLOOR = {room: i for i, floor in enumerate(FLOORS) for room in floor}
SOURCES = sorted(PACKAGE.rglob('*.py'))


def name_of(path):
    return '.'.join(path.relative_to(ROOT).with_suffix('').parts).removesuffix('.__init__')


def imports(path):
    """Modules of the package that a file imports, wherever in it."""
    package = list(path.relative_to(ROOT).parent.parts)
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            start = package[:len(package) - node.level + 1] if node.level else []
            base = '.'.join([*start, *filter(None, [node.module])])
            for alias in node.names:
                whole = f'{base}.{alias.name}'
                found = (ROOT / whole.replace('.', '/')).with_suffix('.py').exists()
                yield whole if base.startswith('vt_zoo') and (found or base == 'vt_zoo') else base
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def room_of(module):
    return module.split('.')[1] if module.startswith('vt_zoo.') else None


def test_every_room_has_a_floor():
    rooms = {path.relative_to(PACKAGE).parts[0].removesuffix('.py') for path in SOURCES}
    assert rooms - {'__init__', '__main__'} == set(FLOOR)


@pytest.mark.parametrize('path', SOURCES, ids=name_of)
def test_nothing_is_imported_from_above(path):
    room = room_of(f'{name_of(path)}.')
    if room in ('', '__main__'):  # vt_zoo itself, which is above all
        return
    climbs = {
        module for module in imports(path) if room_of(module) in FLOOR and room_of(module) != room
        and FLOOR[room_of(module)] >= max(FLOOR[room], room in GROUND)}
    assert climbs == set()


def module_imports():
    names = {name_of(path) for path in SOURCES}
    return {name_of(path): {m for m in imports(path) if m in names} for path in SOURCES}


def test_no_circle():
    left = module_imports()
    while left:
        free = {name for name, needs in left.items() if not (needs - {name}) & set(left)}
        assert free, f'these import each other: {sorted(left)}'
        left = {name: needs for name, needs in left.items() if name not in free}


PUBLIC = {
    name_of(path) for path in SOURCES
    if path.name != '__init__.py' and 'cli' not in path.parts and '__all__ = [' in path.read_text()}
PUBLIC.add('vt_zoo.recipes')


def test_reference_lists_what_is_public():
    pages = '\n'.join(path.read_text() for path in (ROOT / 'docs' / 'api').glob('*.rst'))
    assert sorted(re.findall(r'^\.\. automodule:: (\S+)$', pages, re.MULTILINE)) == sorted(PUBLIC)


@pytest.mark.parametrize('room', [
    'analysis', 'classification', 'data', 'export', 'inference', 'layers', 'segmentation', 'training', 'weights'])
def test_a_room_exports_what_is_public_in_it(room):
    if room == 'segmentation':
        pytest.importorskip('segmentation_models_pytorch')
    exported = importlib.import_module(f'vt_zoo.{room}')
    modules = [importlib.import_module(name) for name in PUBLIC if room_of(name) == room]
    assert sorted(exported.__all__) == sorted(name for module in modules for name in module.__all__)
    for module in modules:
        for name in module.__all__:
            assert getattr(exported, name) is getattr(module, name)


@pytest.mark.parametrize('path', [path for path in SOURCES if path.name != '__init__.py'], ids=name_of)
def test_a_module_is_not_named_after_what_is_in_it(path):
    names = importlib.import_module(name_of(path).rpartition('.')[0])
    assert path.stem not in getattr(names, '__all__', ())
