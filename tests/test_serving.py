"""The program of docs/serving.md, as it stands there: a real server process, asked well and badly."""
import ast
import http.client
import io
import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from documents import blocks
from PIL import Image
from timm.data import create_transform

from vt_zoo.data.images import load_image
from vt_zoo.weights import load

for package in ('fastapi', 'onnx', 'onnxruntime', 'uvicorn'):
    pytest.importorskip(package)

(_, PROGRAM), = blocks('docs/serving.md', 'python')
EXPORT, SERVE, *ASK = ''.join(block for _, block in blocks('docs/serving.md', 'sh')).splitlines()
MAX_BYTES = 10_000_000
SECONDS = 60
MEGABYTES = 1100  # that the server may ever need: two images of 25 million pixels, each of 16 bytes for a while


@pytest.fixture(scope='module')
def folder(command, tmp_path_factory):
    """serve.py and model.onnx."""
    folder = tmp_path_factory.mktemp('serving')
    (folder / 'serve.py').write_text(PROGRAM)
    result = command(*shlex.split(EXPORT)[1:], cwd=folder)
    assert result.code == 0, result.stderr
    return folder


@pytest.fixture(scope='module')
def server(folder):
    """A process of the document's command. What the tests send must neither end it nor fill the memory."""
    environment = {**os.environ, 'PATH': f'{Path(sys.executable).parent}{os.pathsep}{os.environ["PATH"]}'}
    environment.pop('PYTHONPATH', None)
    log = folder / 'log'
    with log.open('w') as file:
        process = subprocess.Popen(
            shlex.split(SERVE.replace('--port 8000', '--port 0')), cwd=folder, env=environment, stdout=file,
            stderr=subprocess.STDOUT)
    try:
        deadline = time.monotonic() + SECONDS
        while not (address := re.search(r'running on http://127\.0\.0\.1:(\d+)', log.read_text())):
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(0.05)
        yield SimpleNamespace(port=int(address[1]), pid=process.pid)
        assert process.poll() is None
        assert 'Traceback' not in log.read_text()
        status = Path(f'/proc/{process.pid}/status')
        if status.exists():
            assert int(re.search(r'VmHWM:\s+(\d+) kB', status.read_text())[1]) < 1000 * MEGABYTES
        process.terminate()
        assert process.wait(SECONDS) in (0, -15)
    finally:
        process.kill()
        process.wait()


@pytest.fixture(scope='module')
def ask(server):
    """Sends a request; gives status and the JSON of the answer."""
    def ask(body=None, path='/predict', method='POST', headers=()):
        with closing(http.client.HTTPConnection('127.0.0.1', server.port, timeout=SECONDS)) as connection:
            connection.request(method, path, body, dict(headers))
            response = connection.getresponse()
            return response.status, json.loads(response.read())
    return ask


@pytest.fixture(scope='module')
def subject():
    return load('test_vt_resnet')


@pytest.fixture(scope='module')
def expected(subject):
    """Probabilities of a file's classes, by timm's model and transform."""
    @torch.no_grad()
    def expected(path):
        return subject.model(subject.prepare(load_image(path))[None]).softmax(-1)[0].numpy()
    return expected


def check_answer(answer, probabilities):
    status, best = answer
    assert status == 200
    assert [entry['index'] for entry in best] == probabilities.argsort()[::-1][:5].tolist()
    assert [entry['label'] for entry in best] == [str(entry['index']) for entry in best]
    found = [entry['probability'] for entry in best]
    np.testing.assert_allclose(found, np.sort(probabilities)[::-1][:5], rtol=0, atol=1e-4)


def check_refused(answer, status, words):
    assert answer[0] == status
    assert list(answer[1]) == ['detail']
    assert re.search(words, answer[1]['detail'])
    assert not re.search(r'[/\\]|PIL|Error|line \d', answer[1]['detail'])


@pytest.fixture(scope='module')
def scans(digits):
    """A held-out scan of each digit."""
    return [sorted((digits / 'val' / name).iterdir())[1] for name in '0123456789']


def encoded(image, file_format, **kwargs):
    content = io.BytesIO()
    image.save(content, file_format, **kwargs)
    return content.getvalue()


def noise(width, height, channels=3):
    return np.random.default_rng(0).integers(0, 256, (height, width, channels), dtype=np.uint8)


def test_program():
    assert len(PROGRAM.splitlines()) < 60
    modules = {
        name.split('.')[0] for node in ast.walk(ast.parse(PROGRAM)) if isinstance(node, (ast.Import, ast.ImportFrom))
        for name in ([node.module] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names])}
    of_fastapi = {'anyio', 'starlette'}
    assert modules - set(sys.stdlib_module_names) - of_fastapi == {'fastapi', 'numpy', 'onnxruntime', 'PIL'}


@pytest.mark.skipif(shutil.which('curl') is None, reason='there is no curl')
def test_commands(server, folder, scans, expected):
    shutil.copy(scans[7], folder / 'seven.png')
    answers = [
        json.loads(subprocess.run(
            shlex.split(line.replace(':8000', f':{server.port}')), cwd=folder, capture_output=True, check=True).stdout)
        for line in ASK]
    (_, block), = blocks('docs/serving.md', 'json')
    shown = [json.loads(line) for line in block.splitlines()]
    check_answer((200, answers[0]), expected(scans[7]))
    assert answers[0][0]['label'] == shown[0][0]['label'] == '7'
    assert answers[1] == shown[1]


@pytest.fixture
def program(folder, monkeypatch):
    """Gives the program's names for a model of this preprocessing."""
    onnx = pytest.importorskip('onnx')
    proto = onnx.load(folder / 'model.onnx')
    said = {entry.key: entry.value for entry in proto.metadata_props}

    def program(cwd, **preprocessing):
        said['preprocessing'] = json.dumps({**json.loads(said['preprocessing']), **preprocessing})
        onnx.helper.set_model_props(proto, said)
        onnx.save(proto, cwd / 'model.onnx')
        monkeypatch.chdir(cwd)
        monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', Image.MAX_IMAGE_PIXELS)  # the program sets it
        names = {}
        exec(compile(PROGRAM, 'docs/serving.md', 'exec'), names)
        return names, json.loads(said['preprocessing'])
    return program


@pytest.mark.parametrize('preprocessing', [
    {}, {'crop_pct': 0.875, 'interpolation': 'bicubic', 'input_size': [3, 224, 224]},
    {'crop_pct': 0.95, 'interpolation': 'nearest', 'mean': [0.5, 0.4, 0.3], 'std': [0.1, 0.2, 0.3]}],
    ids=['digits', 'bicubic', 'nearest'])
def test_preprocessing_is_that_of_timm(program, tmp_path, preprocessing):
    names, config = program(tmp_path, **preprocessing)
    transform = create_transform(**config)
    for width, height in ((8, 8), (64, 64), (65, 64), (301, 200), (97, 334), (500, 11), (256, 255)):
        content = encoded(Image.fromarray(noise(width, height)), 'PNG')
        x = names['prepare'](content)
        assert x.dtype == np.float32
        (tmp_path / 'image.png').write_bytes(content)
        np.testing.assert_allclose(x[0], transform(load_image(tmp_path / 'image.png')), rtol=0, atol=1e-6)


@pytest.mark.parametrize('preprocessing', [
    {'input_size': [3, None, None], 'crop_mode': 'squash'}, {'input_size': [3, 64, 96]}, {'crop_mode': 'border'}],
    ids=['segmenter', 'oblong', 'border'])
def test_models_that_it_does_not_serve(program, tmp_path, preprocessing):
    with pytest.raises(AssertionError, match='not a classifier of square images'):
        program(tmp_path, **preprocessing)


def test_digits(ask, scans, expected):
    for i, path in enumerate(scans):
        answer = ask(path.read_bytes())
        check_answer(answer, expected(path))
        assert answer[1][0]['label'] == str(i)


def kinds():
    """Names and contents of image files of many kinds."""
    image = Image.fromarray(noise(40, 30))
    grey = image.convert('L')
    alpha = Image.fromarray(noise(40, 30, 4))
    exif = Image.Exif()
    exif[0x0112] = 6  # turn it by 90 degrees
    sixteen = Image.fromarray(noise(40, 30, 2).view(np.uint16)[..., 0])
    palette = image.quantize(16)
    yield 'jpeg', encoded(image, 'JPEG')
    yield 'progressive', encoded(image, 'JPEG', progressive=True)
    yield 'turned', encoded(image, 'JPEG', exif=exif)
    yield 'turned_png', encoded(image, 'PNG', exif=exif)
    yield 'cmyk', encoded(image.convert('CMYK'), 'JPEG')
    yield 'grey_jpeg', encoded(grey, 'JPEG')
    yield 'grey', encoded(grey, 'PNG')
    yield 'bits', encoded(grey.convert('1'), 'PNG')
    yield 'sixteen_bits', encoded(sixteen, 'PNG')
    yield 'palette', encoded(palette, 'PNG')
    yield 'clear_palette', encoded(palette, 'PNG', transparency=3)
    yield 'clear_colour', encoded(image, 'PNG', transparency=tuple(noise(40, 30)[0, 0].tolist()))
    yield 'rgba', encoded(alpha, 'PNG')
    yield 'la', encoded(alpha.convert('LA'), 'PNG')
    yield 'webp', encoded(image, 'WEBP')
    yield 'clear_webp', encoded(alpha, 'WEBP', lossless=True)
    yield 'moving', encoded(image, 'PNG', save_all=True, append_images=[grey.convert('RGB')])
    yield 'upright_strip', encoded(image.resize((4, 200)), 'PNG')


@pytest.mark.parametrize('name, content', list(kinds()), ids=lambda value: value if isinstance(value, str) else '')
def test_kinds_of_images(ask, expected, tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    check_answer(ask(content), expected(tmp_path / name))


def test_type_is_what_the_file_is(ask, scans, expected):
    check_answer(ask(scans[3].read_bytes(), headers={'Content-Type': 'image/gif'}), expected(scans[3]))


SVG = b'<svg xmlns="http://www.w3.org/2000/svg" width="8" height="8"><rect width="8" height="8"/></svg>'


@pytest.mark.parametrize('content', [
    *(encoded(Image.fromarray(noise(8, 8)), name) for name in ('GIF', 'BMP', 'TIFF', 'PPM', 'ICO', 'JPEG2000', 'PDF')),
    SVG, b'<!DOCTYPE html><script>alert(1)</script>', b'Dear reader', b'', b'\0' * 5000, b'{"image": "/etc/passwd"}',
    b'%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n'],
    ids=['gif', 'bmp', 'tiff', 'ppm', 'ico', 'jpeg2000', 'pdf', 'svg', 'html', 'text', '', 'zeros', 'json', 'eps'])
def test_other_types(ask, content):
    answer = ask(content, headers={'Content-Type': 'image/png'})
    check_refused(answer, 415, '^the body must be an image file, one of JPEG, PNG, WEBP$')


@pytest.mark.parametrize('file_format', ['PNG', 'JPEG', 'WEBP'])
def test_truncated_and_damaged(ask, file_format):
    content = encoded(Image.fromarray(noise(90, 90)), file_format)
    assert ask(content)[0] == 200
    check_refused(ask(content[:len(content) // 2]), 400, '^the image is damaged$')
    rng = np.random.default_rng(0)
    for end in range(1, len(content) // 2, len(content) // 20):
        assert ask(content[:end])[0] in (400, 415)
        changed = bytearray(content)
        for i in rng.integers(0, len(content), 20):
            changed[i] ^= 0xff
        assert ask(changed)[0] in (200, 400, 413, 415)  # what only changes colours is an image still


def png(width, height):
    """An image of one colour, small as a file."""
    return encoded(Image.new('1', (width, height)), 'PNG')


@pytest.mark.parametrize('content', [
    png(20000, 20000), png(5000, 5001), png(1, 51), png(1000000, 1),
    encoded(Image.new('L', (5001, 5000)), 'JPEG'), encoded(Image.new('RGB', (16383, 1600)), 'WEBP', method=0)],
    ids=['bomb', 'png', 'thin', 'line', 'jpeg', 'webp'])
def test_too_many_pixels(ask, content):
    assert len(content) < MAX_BYTES
    check_refused(ask(content), 413, '^the image may have 25000000 pixels and sides of 50 to 1, not more$')


def test_the_most_pixels(ask):
    assert ask(png(5000, 5000))[0] == ask(png(2, 100))[0] == 200


class Raw:
    """A connection on which bytes are sent as they are."""

    def __init__(self, server):
        self.socket = socket.create_connection(('127.0.0.1', server.port), timeout=SECONDS)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.socket.close()

    def send(self, *headers, body=b''):
        lines = ['POST /predict HTTP/1.1', 'Host: localhost', *headers, '', '']
        self.socket.sendall('\r\n'.join(lines).encode() + body)

    def flood(self, piece, limit):
        """Send a piece again and again until the server closes the connection; gives how many bytes it took."""
        sent = 0
        try:
            while sent < limit:
                self.socket.sendall(piece)
                sent += len(piece)
        except OSError:
            pass
        return sent

    def content(self):
        """All that the server sends; it must close the connection."""
        content = b''
        while piece := self.socket.recv(65536):
            content += piece
        return content

    def answer(self):
        """Status and JSON of the only answer."""
        head, _, body = self.content().partition(b'\r\n\r\n')
        return int(head.split()[1]), json.loads(body)


def test_most_bytes(ask):
    content = png(8, 8)
    assert ask(content + bytes(MAX_BYTES - len(content)))[0] == 200


@pytest.mark.parametrize('headers, piece', [
    ([f'Content-Length: {MAX_BYTES + 1}'], bytes(MAX_BYTES + 1)),
    (['Transfer-Encoding: chunked'], b'2710\r\n%b\r\n' % bytes(10000) * 1001)], ids=['with length', 'chunked'])
def test_too_many_bytes(server, headers, piece):
    with Raw(server) as connection:
        connection.send(*headers, body=piece)
        check_refused(connection.answer(), 413, '^the body must have at most 10000000 bytes$')


@pytest.mark.parametrize('headers, piece', [
    (['Content-Length: 1000000000000'], bytes(100000)),
    (['Transfer-Encoding: chunked'], b'186a0\r\n%b\r\n' % bytes(100000))], ids=['with length', 'chunked'])
def test_endless_body_is_cut_off(server, headers, piece):
    with Raw(server) as connection:
        connection.send(*headers)
        assert MAX_BYTES <= connection.flood(piece, 10 * MAX_BYTES) < 4 * MAX_BYTES  # the kernel's buffers take some


def test_lengths_that_lie(server, ask, scans):
    content = scans[5].read_bytes()
    with Raw(server) as connection:  # the rest is taken for a second request, which is none
        connection.send('Content-Length: 40', body=content + b'\r\n\r\n')
        assert re.findall(rb'HTTP/1.1 (\d+)', connection.content()) == [b'415', b'400']
    for headers in (['Content-Length: -5'], ['Content-Length: many'], ['Content-Length: 1', 'Content-Length: 2']):
        with Raw(server) as connection:
            connection.send(*headers, body=content)
            assert re.findall(rb'HTTP/1.1 (\d+)', connection.content()) == [b'400']
    with Raw(server) as connection:  # and leaves
        connection.send('Content-Length: 5000', body=content)
    assert ask(content)[0] == 200


def test_other_requests(ask):
    for method in ('GET', 'PUT', 'DELETE', 'PATCH'):
        check_refused(ask(method=method), 405, 'Method Not Allowed')
    check_refused(ask(path='/health'), 405, 'Method Not Allowed')
    for path in ('/', '/docs', '/openapi.json', '/predict/../serve.py', '/model.onnx'):
        check_refused(ask(path=path, method='GET'), 404, 'Not Found')


def test_does_not_redirect(ask):
    check_refused(ask(png(8, 8), path='/predict/'), 404, 'Not Found')
    check_refused(ask(path='/health/', method='GET'), 404, 'Not Found')


@pytest.mark.parametrize(('host', 'status'), [
    ('evil.example', 400), ('127.0.0.1.evil.example', 400), ('localhost', 200), ('127.0.0.1:8000', 200)])
def test_host(server, host, status):
    with closing(http.client.HTTPConnection('127.0.0.1', server.port, timeout=SECONDS)) as connection:
        connection.request('GET', '/health', headers={'Host': host})
        assert connection.getresponse().status == status


def test_concurrent_requests(ask, digits, expected):
    paths = sorted((digits / 'val').glob('*/*.png'))[::5]
    with ThreadPoolExecutor(12) as pool:
        answers = list(pool.map(lambda path: ask(path.read_bytes()), paths))
    for path, answer in zip(paths, answers):
        check_answer(answer, expected(path))


def test_answers_while_it_computes(ask):
    content = encoded(Image.new('RGBA', (5000, 5000), (255, 0, 0, 99)), 'PNG')
    with ThreadPoolExecutor(4) as pool:
        answers = [pool.submit(ask, content) for _ in range(4)]
        time.sleep(0.1)
        assert ask(path='/health', method='GET')[0] == 200
        assert not all(answer.done() for answer in answers)
    assert [answer.result()[0] for answer in answers] == [200] * 4


def test_slow_requests(server, ask, scans):
    content = scans[2].read_bytes()
    connections = [Raw(server) for _ in range(16)]
    for connection in connections:
        connection.send(f'Content-Length: {len(content)}', body=content[:50])
    deadline = time.monotonic() + SECONDS
    while (answer := ask(content))[0] == 200:  # until the server has begun with all of them
        assert time.monotonic() < deadline
    check_refused(answer, 503, '^too many requests at a time, try again later$')
    assert ask(path='/health', method='GET')[0] == 200
    connections[0].socket.sendall(content[50:])
    assert connections[0].socket.recv(65536).startswith(b'HTTP/1.1 200')
    assert ask(content)[0] == 200
    for connection in connections[1:]:
        check_refused(connection.answer(), 408, '^the body must arrive within 10 seconds$')
    for connection in connections:
        connection.socket.close()
    assert ask(content)[0] == 200
