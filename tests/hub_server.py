"""A server on the loopback that speaks as much of the Hugging Face Hub's protocol as its client asks for.

Files go both ways over plain HTTP, as for a client without `hf_xet`, which HF_HUB_DISABLE_XET=1 turns off.
"""
import base64
import hashlib
import json
import os
import re
from contextlib import contextmanager
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import huggingface_hub
import pytest
import yaml
from huggingface_hub.repocard_data import model_index_to_eval_results
from packaging.version import Version

COMMIT = '0123456789abcdef0123456789abcdef01234567'
WRITER, READER = 'hf_writer', 'hf_reader'  # tokens
LICENSES = {'apache-2.0', 'mit', 'cc-by-4.0', 'other', 'unknown'}  # some of the hub's
newer_client = pytest.mark.skipif(
    Version(huggingface_hub.__version__) < Version('2.2'),
    reason='older clients of the hub ask huggingface.co about cards, whatever HF_ENDPOINT says, and resume less')
_REPO = r'(?P<repo>[^/]+/[^/]+)'


def environment(server, home, **others):
    """Environment of a process whose hub is this server."""
    return {
        **os.environ, 'HF_ENDPOINT': server.url, 'HF_HOME': str(home), 'HF_HUB_DISABLE_XET': '1',
        'HF_HUB_DISABLE_TELEMETRY': '1', **others}


def _is_large(path):
    return path.suffix == '.safetensors'


def _etag(path):
    return _digest(path, path.stat().st_mtime_ns)


@cache
def _digest(path, _):
    """As on the hub: of a large file the SHA-256, of another its name in git."""
    content = path.read_bytes()
    if _is_large(path):
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b'blob %d\0' % len(content) + content).hexdigest()


def _card_errors(content):
    """What the hub's validator would say of a README.md, as far as is known here."""
    header = re.match(r'---\n(.*?)\n---\n', content, re.DOTALL)
    metadata = yaml.safe_load(header[1]) if header else None
    if not isinstance(metadata, dict):
        return ['there is no metadata']
    errors = []
    if metadata.get('license') not in LICENSES:
        errors.append(f'"license" must be one of {sorted(LICENSES)}')
    if 'base_model' in metadata and not re.fullmatch(r'[\w.-]+/[\w.-]+', metadata['base_model']):
        errors.append('"base_model" with value is not valid')
    if 'model-index' in metadata:
        _, results = model_index_to_eval_results(metadata['model-index'])
        errors += [f'"value" is {r.metric_value}' for r in results if not isinstance(r.metric_value, (int, float))]
    return errors


class _Handler(BaseHTTPRequestHandler):
    protocol_version = 'HTTP/1.1'

    def do_HEAD(self):
        self._route()

    def do_GET(self):
        self._route()

    def do_POST(self):
        self._route()

    def do_PUT(self):
        self._route()

    def _route(self):
        self.server.requests.append((self.command, self.path))
        self.body = self.rfile.read(int(self.headers.get('Content-Length', 0)))
        path = self.path.split('?')[0]
        for pattern, method in self.ROUTES:
            match = re.fullmatch(f'(?:{pattern.replace("REPO", _REPO)})', f'{self.command} {path}')
            if match:
                return method(self, **match.groupdict())
        return self._json({'error': 'no such place'}, 404)

    def _send(self, status, body=b'', **headers):
        self.send_response(status)
        headers.setdefault('Content_Length', str(len(body)))
        for name, value in headers.items():
            self.send_header(name.replace('_', '-'), value)
        self.end_headers()
        if self.command != 'HEAD':
            self.wfile.write(body)

    def _json(self, content, status=200, **headers):
        self._send(status, json.dumps(content).encode(), **{'Content_Type': 'application/json', **headers})

    def _may_write(self):
        token = (self.headers.get('Authorization') or '').removeprefix('Bearer ')
        if token == WRITER:
            return True
        status, message = (403, 'no write access') if token == READER else (
            401, 'Invalid credentials in Authorization header')
        self._json({'error': message}, status, X_Error_Message=message)
        return False

    def _files(self, repo):
        return sorted(p for p in (self.server.folder / repo).rglob('*') if p.is_file())

    def _download(self, repo, file):
        path = self.server.folder / repo / file
        if not path.is_file():
            return self._send(404, X_Error_Code='EntryNotFound' if path.parent.is_dir() else 'RepoNotFound')
        headers = {'ETag': f'"{_etag(path)}"', 'X_Repo_Commit': COMMIT}
        if self.command == 'HEAD':
            return self._send(200, Content_Length=str(path.stat().st_size), **headers)
        content = path.read_bytes()
        fault = None
        if _is_large(path):
            fault, self.server.fault = self.server.fault, None
        if callable(fault):
            content = fault(content)
        if isinstance(fault, int):  # the connection breaks after so many bytes
            self._send(200, content[:fault], Content_Length=str(len(content)), **headers)
            self.close_connection = True
            return None
        return self._send(200, content, **headers)

    def _tree(self, repo):
        entries = []
        for path in self._files(repo):
            entry = {'type': 'file', 'path': path.name, 'size': path.stat().st_size, 'oid': _etag(path)}
            if _is_large(path):
                entry['lfs'] = {'oid': _etag(path), 'size': path.stat().st_size, 'pointerSize': 1}
            entries.append(entry)
        self._json(entries)

    def _info(self, repo):
        if (self.server.folder / repo).is_dir():
            private = self.server.visibility.get(repo) == 'private'
            self._json({
                'id': repo, 'sha': COMMIT, 'private': private,
                'siblings': [{'rfilename': p.name} for p in self._files(repo)]})
        else:
            self._send(404, X_Error_Code='RepoNotFound')

    def _create_repo(self):
        if self._may_write():
            asked = json.loads(self.body)
            repo = f'{asked["organization"]}/{asked["name"]}'
            exists = (self.server.folder / repo).is_dir()
            (self.server.folder / repo).mkdir(parents=True, exist_ok=True)
            if not exists:
                self.server.visibility[repo] = asked.get('visibility')
            self._json({'url': f'{self.server.url}/{repo}'}, 409 if exists else 200)

    def _validate_card(self):
        errors = _card_errors(json.loads(self.body)['content'])
        if self.headers.get('Accept') == 'text/plain':
            return self._send(400 if errors else 200, '; '.join(errors).encode())
        return self._json({'errors': [{'message': e} for e in errors], 'warnings': []}, 400 if errors else 200)

    def _preupload(self, repo):
        if self._may_write():
            files = [file['path'] for file in json.loads(self.body)['files']]
            modes = ['lfs' if _is_large(Path(file)) else 'regular' for file in files]
            self._json({'files': [
                {'path': f, 'uploadMode': mode, 'shouldIgnore': False} for f, mode in zip(files, modes)]})

    def _lfs_batch(self, repo):
        if self._may_write():
            self._json({'transfer': 'basic', 'objects': [{
                **o, 'actions': {'upload': {'href': f'{self.server.url}/lfs/{o["oid"]}'}}}
                for o in json.loads(self.body)['objects']]})

    def _lfs_upload(self, oid):
        right = hashlib.sha256(self.body).hexdigest() == oid
        if right:
            self.server.uploads[oid] = self.body
        self._send(200 if right else 400)

    def _commit(self, repo):
        if not self._may_write():
            return
        for line in self.body.splitlines():
            key, value = json.loads(line).values()
            if key == 'file':
                (self.server.folder / repo / value['path']).write_bytes(base64.b64decode(value['content']))
            elif key == 'lfsFile':
                (self.server.folder / repo / value['path']).write_bytes(self.server.uploads[value['oid']])
        self._json({'commitUrl': f'{self.server.url}/{repo}/commit/{COMMIT}', 'commitOid': COMMIT})

    ROUTES = (
        ('(?:HEAD|GET) /REPO/resolve/[^/]+/(?P<file>.+)', _download),
        ('GET /api/models/REPO/tree/.+', _tree),
        ('GET /api/models/REPO(?:/revision/.+)?', _info),
        ('POST /api/repos/create', _create_repo),
        ('POST /api/validate-yaml', _validate_card),
        ('POST /api/models/REPO/preupload/.+', _preupload),
        (r'POST /REPO\.git/info/lfs/objects/batch', _lfs_batch),
        ('PUT /lfs/(?P<oid>.+)', _lfs_upload),
        ('POST /api/models/REPO/commit/.+', _commit),
    )

    def log_message(self, *args):
        pass


@contextmanager
def hub_server(folder):
    """Serve the files folder/ORG/NAME/FILE, and take uploads with the token WRITER.

    Gives the server, with its address `url`, its `requests` as (method, path) and the `visibility` that was asked for
    each new repository. `fault` befalls the next download of weights: a number of bytes after which the connection
    breaks, or a function that changes the content.
    """
    server = ThreadingHTTPServer(('127.0.0.1', 0), _Handler)
    server.folder, server.requests, server.fault = Path(folder), [], None
    server.uploads, server.visibility = {}, {}
    server.url = f'http://127.0.0.1:{server.server_port}'
    thread = Thread(target=server.serve_forever)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
