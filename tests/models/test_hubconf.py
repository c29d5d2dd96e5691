"""torch.hub finds and builds every model from a checkout or a zip alone, in a Python that has no vt_zoo."""
import functools
import json
import os
import shutil
import site
import subprocess
import sys
from contextlib import contextmanager
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest
import timm
import torch
from documents import blocks
from timm_plugin import registered_models

(_, FROM_CLONE), (_, FROM_GITHUB) = blocks('docs/libraries.md', 'python', name='hub')

# Begins each program: the packages of this environment without vt_zoo are all that there is.
START = '''
import importlib.util, json, sys
sys.path.append(sys.argv[1])
assert importlib.util.find_spec('vt_zoo') is None
'''

# Ends a program that made `model`.
REPORT = '''
import timm
print(json.dumps({
    'files': sorted({m.__file__ for n, m in sys.modules.items() if n.split('.')[0] == 'vt_zoo'}),
    'weights': model.pretrained_cfg['file'],
    'logits': model.eval()(torch.ones(1, 3, 64, 64)).tolist(),
    'registered': timm.list_models('*vt_resnet*'),
    'path': sys.path,
}))
'''

# torch.hub.list and help take no local folder: they find it in the cache, where an earlier download would be
LIST_AND_HELP = '''
import torch
torch.hub.set_dir(sys.argv[2])
names = torch.hub.list('owner/vt_zoo:main', trust_repo=True, verbose=False)
print(json.dumps({name: torch.hub.help('owner/vt_zoo:main', name, trust_repo=True) for name in names}))
'''

# Every https://HOST/PATH is asked of our server as /HOST/PATH.
REDIRECT = '''
import urllib.request

class Redirect(urllib.request.HTTPSHandler):
    def https_open(self, request):
        return urllib.request.urlopen(f'{sys.argv[3]}/{request.host}{request.selector}')

urllib.request.install_opener(urllib.request.build_opener(Redirect))
import torch
torch.hub.set_dir(sys.argv[2])
'''


@pytest.fixture(scope='module')
def packages(tmp_path_factory):
    """A folder with the packages of this environment but vt_zoo and what `pip install -e` left of it."""
    folder = tmp_path_factory.mktemp('packages')
    for path in (path for root in site.getsitepackages() if Path(root).is_dir() for path in Path(root).iterdir()):
        if 'vt_zoo' not in path.name and not (folder / path.name).exists():
            (folder / path.name).symlink_to(path)
    return folder


@pytest.fixture(scope='module')
def python(packages):
    """Runs a program by an interpreter that looks at none of PYTHONPATH, its folder and .pth files; its last line."""
    def run(code, *args, cwd):
        command = [sys.executable, '-I', '-S', '-c', START + code, packages, *args]
        result = subprocess.run(command, cwd=cwd, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        return json.loads(result.stdout.splitlines()[-1])
    return run


@contextmanager
def file_server(folder):
    """Serve the files of a folder; gives the address and the list of the paths that were asked for."""
    paths = []

    class Handler(SimpleHTTPRequestHandler):
        def log_message(self, *args):
            paths.append(self.path)

    server = ThreadingHTTPServer(('127.0.0.1', 0), functools.partial(Handler, directory=folder))
    thread = Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f'http://127.0.0.1:{server.server_port}', paths
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture(scope='module')
def github(checkout, tmp_path_factory):
    """What torch.hub asks of GitHub, with a zip of the checkout as GitHub makes it: one folder, named by commit."""
    root = tmp_path_factory.mktemp('github')
    repo = root / 'github.com' / 'owner' / 'vt_zoo'
    (repo / 'tree' / 'main').mkdir(parents=True)
    (repo / 'zipball').mkdir()
    commit = '0123456789abcdef0123456789abcdef01234567'
    branches = root / 'api.github.com' / 'repos' / 'owner' / 'vt_zoo' / 'branches'
    branches.parent.mkdir(parents=True)
    branches.write_text(json.dumps([{'name': 'main', 'commit': {'sha': commit}}]))
    prefix = f'owner-vt_zoo-{commit[:7]}'
    shutil.copytree(checkout, root / prefix)
    os.rename(shutil.make_archive(repo / 'zipball' / 'main', 'zip', root, prefix), repo / 'zipball' / 'main')
    return root


def test_list_and_help(python, checkout, tmp_path):
    docs = python(LIST_AND_HELP, checkout.parent, cwd=tmp_path)
    assert sorted(docs) == sorted(registered_models())
    for name, doc in docs.items():
        assert timm.model_entrypoint(name).__doc__.strip() in doc


def check_shipped_model(report, folder):
    """The model is that of the package, its code and its weights those of the folder."""
    assert report['files']
    assert all(Path(file).is_relative_to(folder) for file in [*report['files'], report['weights']])
    assert not any(Path(path).is_relative_to(folder) for path in report['path'])
    model = timm.create_model('test_vt_resnet', pretrained=True).eval()
    torch.testing.assert_close(torch.tensor(report['logits']), model(torch.ones(1, 3, 64, 64)))
    assert report['registered'] == timm.list_models('*vt_resnet*')


def test_document_from_a_clone(python, checkout, tmp_path):
    (tmp_path / 'clone').symlink_to(checkout)
    check_shipped_model(python(FROM_CLONE + REPORT, cwd=tmp_path), tmp_path / 'clone')


def test_document_from_a_zip(python, github, tmp_path):
    """Asked of the default branch, which torch.hub finds and checks first; then again, from its cache."""
    cache = tmp_path / 'cache'
    with file_server(github) as (url, paths):
        report = python(REDIRECT + FROM_GITHUB + FROM_GITHUB + REPORT, cache, url, cwd=tmp_path)
    check_shipped_model(report, cache / 'owner_vt_zoo_main')
    assert [path for path in paths if 'zipball' in path] == ['/github.com/owner/vt_zoo/zipball/main']
    assert [p.name for p in cache.iterdir() if p.is_dir()] == ['owner_vt_zoo_main']
