"""The site of docs/ builds without a warning, needs nothing from elsewhere, and its links lead somewhere."""
import importlib
import inspect
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

pytest.importorskip('myst_nb')
pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
LIBRARY = [
    path for path in (ROOT / 'vt_zoo').rglob('*.py') if 'cli' not in path.parts and '__all__ =' in path.read_text()]


class Page(HTMLParser):
    """Anchors and links of a page, and what a browser loads with it."""

    def __init__(self, path):
        super().__init__()
        self.anchors, self.links, self.loaded = {''}, set(), set()
        self.feed(path.read_text())

    def handle_starttag(self, tag, attributes):
        for name, value in attributes:
            if name == 'id':
                self.anchors.add(value)
            elif name in ('href', 'src'):
                (self.links if tag == 'a' else self.loaded).add(value)


@pytest.fixture(scope='module')
def site(tmp_path_factory):
    """Folder of the site."""
    folder = tmp_path_factory.mktemp('site')
    command = [sys.executable, '-m', 'sphinx', '-q', '-W', '--keep-going', '-n', '-c', 'docs', '.', folder]
    result = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, 'PYTHONPATH': str(ROOT)})
    assert result.returncode == 0, result.stderr
    return folder


@pytest.fixture(scope='module')
def pages(site):
    """The pages by their paths."""
    return {path: Page(path) for path in site.rglob('*.html')}


def test_links(pages):
    dead = []
    for path, page in pages.items():
        for link in page.links | page.loaded:
            url = urlsplit(link)
            target = (path.parent / unquote(url.path)).resolve() if url.path else path
            anchors = pages[target].anchors if target in pages else {''}
            if not url.scheme and not (target.is_file() and unquote(url.fragment) in anchors):
                dead.append((path.name, link))
    assert dead == []


def test_nothing_is_loaded_from_elsewhere(site, pages):
    assert {link for page in pages.values() for link in page.loaded if urlsplit(link).netloc} == set()
    for style in site.rglob('*.css'):
        assert not re.search(r'(@import|url\()\s*["\']?(https?:)?//', style.read_text())


@pytest.mark.parametrize('path', LIBRARY, ids=lambda path: path.stem)
def test_reference_has_what_is_public(pages, path):
    name = '.'.join(path.relative_to(ROOT).with_suffix('').parts).removesuffix('.__init__')
    module = importlib.import_module(name)
    anchors = set().union(*(page.anchors for path, page in pages.items() if path.parent.name == 'api'))
    public = [x for x in map(module.__dict__.get, module.__all__) if inspect.isroutine(x) or inspect.isclass(x)]
    assert {f'{x.__module__}.{x.__name__}' for x in public} - anchors == set()


def test_no_option_became_a_dash(pages):
    assert [path.name for path in pages if re.search('[ >]\u2013[a-z]', path.read_text())] == []
