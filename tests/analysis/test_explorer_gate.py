"""What the explorer refuses: requests as curl would send them to a real server process, and how that process ends."""
import http.client
import importlib.util
import json
import multiprocessing
import os
import runpy
import signal
import socket
import sys
import tempfile
import time
import uuid
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import quote

import pytest
from PIL import Image

if importlib.util.find_spec('gradio') is None:  # to import it takes seconds, which the server alone has to spend
    pytest.skip('gradio is not installed', allow_module_level=True)

SECONDS = 60
PRIVATE = 'the file must be one that was uploaded'
FORKS = multiprocessing.get_context('forkserver')  # imports once what each process of the command needs
FORKS.set_forkserver_preload(['vt_zoo.cli.explore', 'gradio', 'uvicorn', 'matplotlib.pyplot', 'pytest'])


def explore(temporary, out, err):
    """Run the command as a shell would; what it prints goes into files."""
    os.environ['TMPDIR'] = str(temporary)
    tempfile.tempdir = None  # to be looked up anew
    for descriptor, path in (1, out), (2, err):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), descriptor)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    sys.argv = ['vt-zoo', 'explore', '--model', 'test_vt_resnet', '--port', '0']
    runpy.run_module('vt_zoo', run_name='__main__', alter_sys=True)


def wait_until(condition):
    deadline = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


class Explorer:
    """A process of the command whose temporary files are in a folder."""

    def __init__(self, temporary):
        self.temporary = temporary
        self.out, self.err = (temporary.with_name(f'{uuid.uuid4().hex}.{name}') for name in ('out', 'err'))
        self.process = FORKS.Process(target=explore, args=(temporary, self.out, self.err))
        self.process.start()

    def ready(self):
        wait_until(lambda: (self.out.exists() and self.out.read_text().endswith('\n')) or not self.process.is_alive())
        assert self.process.is_alive(), self.err.read_text()
        self.port = int(self.out.read_text().split()[1].rpartition(':')[2])
        return self

    def wait(self):
        """Exit code, and what was said on standard error."""
        self.process.join(SECONDS)
        return self.process.exitcode, self.err.read_text()

    def ask(self, path='/', method='GET', body=None, **headers):
        with closing(http.client.HTTPConnection('127.0.0.1', self.port, timeout=SECONDS)) as connection:
            connection.request(method, path, body, {k.replace('_', '-'): v for k, v in headers.items()})
            response = connection.getresponse()
            content = response.read()
        assert not [name for name, _ in response.getheaders() if name.lower().startswith('access-control')]
        return SimpleNamespace(status=response.status, content=content, text=content.decode(errors='replace'))

    def raw(self, *lines):
        """First line of the answer to a request of these lines."""
        with closing(socket.create_connection(('127.0.0.1', self.port), timeout=SECONDS)) as connection:
            connection.sendall('\r\n'.join([*lines, '', '']).encode())
            return connection.recv(65536).split(b'\r\n')[0]

    def post(self, path, data, **headers):
        return self.ask(path, 'POST', json.dumps(data), **{'Content-Type': 'application/json'}, **headers)

    def upload(self, *contents, name='{}.png', **headers):
        parts = b''.join(
            b'--edge\r\nContent-Disposition: form-data; name="files"; filename="%b"\r\n'
            b'Content-Type: image/png\r\n\r\n%b\r\n' % (name.format(i).encode(), content)
            for i, content in enumerate(contents))
        return self.ask(
            '/gradio_api/upload', 'POST', parts + b'--edge--\r\n',
            **{'Content-Type': 'multipart/form-data; boundary=edge'}, **headers)

    def call(self, name, *data, event=None):
        """Run a function of the page as its queue does; gives the answer or the refused request."""
        config = json.loads(self.ask('/config').content)
        number = next(d['id'] for d in config['dependencies'] if d['api_name'] == name)
        session = uuid.uuid4().hex
        joined = self.post('/gradio_api/queue/join', {
            'data': list(data), 'fn_index': number, 'session_hash': session, 'event_data': event})
        if joined.status != 200:
            return joined
        return self.ask(f'/gradio_api/queue/data?session_hash={session}')

    def files(self):
        return [Path(folder, name) for folder, _, names in os.walk(self.temporary) for name in names]

    def size(self):
        """Bytes of all files, of which some may be deleted meanwhile."""
        size = 0
        for path in self.files():
            with suppress(FileNotFoundError):
                size += path.stat().st_size
        return size

    def close(self):
        self.process.kill()
        self.process.join()


@contextmanager
def running(temporary):
    explorer = Explorer(temporary)
    try:
        yield explorer.ready()
    finally:
        explorer.close()


@pytest.fixture(scope='module')
def explorer(tmp_path_factory):
    with running(tmp_path_factory.mktemp('temporary')) as explorer:
        yield explorer
        assert explorer.process.is_alive()
        assert explorer.ask().status == 200


@pytest.fixture(scope='module')
def picture(tmp_path_factory):
    path = tmp_path_factory.mktemp('private') / 'private.png'
    Image.new('RGB', (40, 40), 'red').save(path)
    return path


def file(path):
    return {'path': str(path), 'meta': {'_type': 'gradio.FileData'}}


def uploaded(explorer, content):
    answer = explorer.upload(content)
    assert answer.status == 200, answer.text
    return Path(json.loads(answer.content)[0])


def test_opens_what_was_uploaded(explorer, picture):
    path = uploaded(explorer, picture.read_bytes())
    assert path.read_bytes() == picture.read_bytes()
    answer = explorer.call('open_image', file(path))
    assert '"success":true' in answer.text and 'confidences' in answer.text
    assert explorer.ask(f'/gradio_api/file={path}').content == picture.read_bytes()


@pytest.fixture(scope='module')
def paths(explorer, picture, tmp_path_factory):
    """Of files that were not uploaded, with what must be there for them."""
    uploads, folder = uploaded(explorer, b'content').parent, tmp_path_factory.mktemp('fifo')
    (uploads / 'link').symlink_to(picture)
    (uploads / 'loop').symlink_to('loop')
    (uploads / 'folder').mkdir()
    os.mkfifo(uploads / 'fifo')
    os.mkfifo(folder / 'fifo')
    return [str(path) for path in (
        picture, '/etc/passwd', '/no/such/file', folder / 'fifo', '/dev/zero', '/dev/stdin', folder,
        os.path.relpath(picture), picture.name, uploads / 'link', uploads / 'loop', uploads / 'fifo',
        uploads / 'folder', f'{uploads}/../../../../../../../../..{picture}', f'{picture}\0.png', 'x' * 5000, '',
        'http://127.0.0.1:1/private.png', f'file://{picture}')]


@pytest.mark.parametrize('path', [
    '/gradio_api/run/open_image', '/gradio_api/run/open_image/', '/gradio_api/api/open_image',
    '/gradio_api/call/open_image', '/gradio_api/call/v2/open_image', '/run/open_image', '//gradio_api/run/open_image',
    '/gradio_api/process_recording', '/gradio_api/vibe-edit', '/login', '/docs', '/redoc', '/openapi.json', '/docs/',
    '/docs/oauth2-redirect', '/gradio_api/openapi.json', '/gradio_api/docs', '/monitoring', '/monitoring/summary',
    '/gradio_api/vibe-code', '/gradio_api/runs', '/gradio_api/deep_link', '/gradio_api/token', '/gradio_api/dev/reload',
    '/gradio_api/proxy=http://127.0.0.1:1/', '/gradio_api/custom_component/1/client/component/x.js'])
def test_closed(explorer, picture, path):
    assert explorer.ask(path).status == explorer.post(path, {'data': [file(picture)]}).status == 404


def test_opens_nothing_else(explorer, paths):
    before = set(explorer.files())
    for path in paths:
        for value in (file(path), {**file(path), 'is_stream': True}, {**file(path), 'url': path}, [file(path)],
                      {'value': [{'deep': file(path)}]}):
            answer = explorer.call('open_image', value)
            assert (answer.status, answer.text.strip()) == (403, PRIVATE), path
    for value in (file(None), {'path': [1]}, {'path': {'path': 3}}):
        assert explorer.call('open_image', value).status == 403
    assert set(explorer.files()) == before


@pytest.mark.parametrize('name', [
    '../../../../up.png', '/tmp/up.png', '..', '.', '', 'a/../../up.png', '~/up.png', 'u\0p'])
def test_uploads_stay_in_their_folder(explorer, picture, name):
    answer = explorer.upload(picture.read_bytes(), name=name)
    assert answer.status in (200, 400, 422)
    for path in json.loads(answer.content) if answer.status == 200 else []:
        assert os.path.realpath(path) == path and explorer.temporary in Path(path).parents


def test_path_that_comes_twice(explorer, picture):
    own = uploaded(explorer, picture.read_bytes())
    for paths, status in (((picture, own), 200), ((own, picture), 403)):  # the last one counts, for gradio too
        twice = ', '.join(f'"path": {json.dumps(str(path))}' for path in paths)
        body = f'{{"data": [{{{twice}}}], "fn_index": 0, "session_hash": "twice"}}'
        answer = explorer.ask('/gradio_api/queue/join', 'POST', body, Content_Type='application/json')
        assert answer.status == status
    assert str(picture) not in explorer.ask('/gradio_api/queue/data?session_hash=twice').text


def test_shows_nothing_else(explorer, paths):
    for path in paths:
        for prefix in (
                '/gradio_api/file=', '/file=', '/gradio_api/file/', '/gradio_api/proxy=', '/static/', '/assets/'):
            answer = explorer.ask(prefix + quote(path))
            assert answer.status in (403, 404), (prefix, path)


@pytest.mark.parametrize('host', ['127.0.0.1:{}', 'localhost:{}', 'LOCALHOST:{}', '[::1]:{}'])
def test_own_hosts_and_origins(explorer, host):
    host = host.format(explorer.port)
    assert explorer.ask(Host=host).status == 200
    assert explorer.ask(Host=host, Origin=f'http://{host}').status == 200  # `ask` looks for headers of CORS
    asked = explorer.ask('/config', 'OPTIONS', Host=host, Origin=f'http://{host}', Access_Control_Request_Method='POST')
    assert asked.status == 405


@pytest.mark.parametrize('host', [
    'evil.example', 'evil.example:{}', 'localhost', '127.0.0.1:1', 'localhost.evil.example:{}', 'localhost.:{}',
    '0.0.0.0:{}', '127.0.0.2:{}', 'me@localhost:{}', '', '127.0.0.1:{}:{}'])
@pytest.mark.parametrize('path', ['/', '/config', '/gradio_api/upload'])
def test_other_hosts(explorer, host, path):
    host = host.format(*[explorer.port] * 2)
    method = 'POST' if path.endswith('upload') else 'GET'
    assert explorer.ask(path, method, Host=host).status == 403
    assert explorer.ask(path, method, Host=host, Origin=f'http://{host}').status == 403


@pytest.mark.parametrize('origin', [
    'http://evil.example', 'http://evil.example:{}', 'null', '', 'http://localhost', 'http://localhost:1',
    'http://127.0.0.1:1', 'https://127.0.0.1:{}', 'http://127.0.0.1:{}.evil.example', 'http://127.0.0.1:{}/',
    'file://', '127.0.0.1:{}'])
def test_other_origins(explorer, picture, origin):
    origin = origin.format(explorer.port)
    before = set(explorer.files())
    assert explorer.ask(Origin=origin).status == 403
    assert explorer.upload(picture.read_bytes(), Origin=origin).status == 403
    assert explorer.post('/gradio_api/queue/join', {}, Origin=origin).status == 403
    assert explorer.ask(
        '/gradio_api/upload', 'OPTIONS', Origin=origin, Access_Control_Request_Method='POST').status == 403
    assert set(explorer.files()) == before


def test_answer_to_a_body_that_comes_late(explorer):
    lines = ['POST /gradio_api/upload HTTP/1.1', 'Host: evil.example', 'Content-Length: 600000', '', '']
    with closing(socket.create_connection(('127.0.0.1', explorer.port), timeout=SECONDS)) as connection:
        connection.sendall('\r\n'.join(lines).encode())
        time.sleep(0.2)
        connection.sendall(bytes(600000))
        assert connection.recv(65536).startswith(b'HTTP/1.1 403')


def test_host_lines(explorer):
    own = f'Host: 127.0.0.1:{explorer.port}'
    assert b' 200 ' in explorer.raw('GET / HTTP/1.1', own)
    for lines in (['GET / HTTP/1.0'], ['GET / HTTP/1.1', own, 'Host: evil.example'],
                  ['GET http://evil.example/ HTTP/1.1', 'Host: evil.example']):
        assert explorer.raw(*lines).split()[1] in (b'400', b'403')
    upgrade = [
        'Upgrade: websocket', 'Connection: Upgrade', 'Sec-WebSocket-Version: 13',
        'Sec-WebSocket-Key: ' + 22 * 'A' + '==']
    assert explorer.raw('GET /gradio_api/queue/join HTTP/1.1', own, *upgrade).split()[1] in (b'400', b'403', b'404')


def test_proxy_headers_change_nothing(explorer):
    answer = explorer.ask('/config', X_Forwarded_Host='evil.example', X_Gradio_Server='http://evil.example')
    assert answer.status == 200 and 'evil.example' not in answer.text


def test_bad_bodies(explorer):
    for body in (b'', b'{', b'[' * 100000, b'\xff'):
        assert explorer.ask('/gradio_api/queue/join', 'POST', body).status == 400
    assert explorer.ask('/gradio_api/queue/join', 'POST', bytes(2 ** 20 + 1)).status == 413
    assert explorer.ask('/gradio_api/upload', 'POST', bytes(25 * 2 ** 20)).status == 413


def test_pick_before_an_image(explorer):
    for event in (None, {'index': 0, 'value': None}, {}):
        answer = explorer.call('pick', None, 1, event=event)
        assert 'open an image first' in answer.text and 'NoneType' not in answer.text


def test_uploads_are_bounded(tmp_path, picture):
    content = bytes(19 * 2 ** 20)
    with running(tmp_path) as explorer:
        for i in range(14):
            last = uploaded(explorer, bytes([i]) + content)
        # it answers before it deletes
        wait_until(lambda: explorer.size() <= 256 * 2 ** 20)
        assert last in explorer.files()
        for start in (0, 520):
            assert explorer.upload(*(b'%d' % i for i in range(start, start + 520))).status == 200
        wait_until(lambda: len(explorer.files()) <= 1000)
        assert len(explorer.files()) > 900


@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_deletes_at_the_end(tmp_path, picture, number):
    with running(tmp_path) as explorer:
        assert '"success":true' in explorer.call('open_image', file(uploaded(explorer, picture.read_bytes()))).text
        assert explorer.files()
        os.kill(explorer.process.pid, number)
        code, stderr = explorer.wait()
        assert code == 128 + number
        assert stderr == ('vt-zoo: interrupted\n' if number == signal.SIGINT else '')
        assert explorer.files() == []


def test_next_start_deletes_what_a_kill_left(tmp_path, picture):
    with running(tmp_path) as killed, running(tmp_path) as other:
        left, kept = (uploaded(each, picture.read_bytes()) for each in (killed, other))
        killed.close()
        assert left.exists()
        with running(tmp_path):
            assert not left.exists() and kept.exists()
        assert '"success":true' in other.call('open_image', file(kept)).text


def test_folder_of_someone_else(tmp_path):
    (tmp_path / f'vt_zoo_explore_{os.getuid()}').symlink_to(tmp_path)
    explorer = Explorer(tmp_path)
    code, stderr = explorer.wait()
    assert code == 2
    assert 'must be a folder that is yours alone' in stderr and 'Traceback' not in stderr
