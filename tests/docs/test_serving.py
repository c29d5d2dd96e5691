"""The program of docs/serving.md, as it stands there: a real server process, asked well and badly."""
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

from vt_zoo.cli import main
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
def folder(tmp_path_factory):
    """serve.py and model.onnx."""
    folder = tmp_path_factory.mktemp('serving')
    (folder / 'serve.py').write_text(PROGRAM)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert main(shlex.split(EXPORT)[1:]) == 0
    return folder


@pytest.fixture(scope='module')
def server(folder):
    """A process of the document's command. What the tests send must neither end it nor fill the memory."""
    environment = {**os.environ, 'PATH': f'{Path(sys.executable).parent}{os.pathsep}{os.environ["PATH"]}'}
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
        yield SimpleNamespace(port=int(address[1]))
        assert process.poll() is None
        assert 'Traceback' not in log.read_text()
        status = Path(f'/proc/{process.pid}/status')
        if status.exists():
            assert int(re.search(r'VmHWM:\s+(\d+) kB', status.read_text())[1]) < 1000 * MEGABYTES
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
def check_answer():
    """The answer to a file has the probabilities of timm's model and transform."""
    subject = load('test_vt_resnet')

    @torch.no_grad()
    def check(answer, path):
        probabilities = subject.model(subject.prepare(load_image(path))[None]).softmax(-1)[0].numpy()
        status, best = answer
        assert status == 200
        assert [entry['index'] for entry in best] == probabilities.argsort()[::-1][:5].tolist()
        assert [entry['label'] for entry in best] == [str(entry['index']) for entry in best]
        found = [entry['probability'] for entry in best]
        np.testing.assert_allclose(found, np.sort(probabilities)[::-1][:5], rtol=0, atol=1e-4)
    return check


def encoded(image, file_format, **kwargs):
    content = io.BytesIO()
    image.save(content, file_format, **kwargs)
    return content.getvalue()


def noise(width, height, channels=3):
    return np.random.default_rng(0).integers(0, 256, (height, width, channels), dtype=np.uint8)


def png(width, height):
    """An image of one colour, small as a file."""
    return encoded(Image.new('1', (width, height)), 'PNG')


def test_it_needs_neither_torch_nor_vt_zoo():
    assert not re.search(r'^(import|from) (torch|timm|vt_zoo)', PROGRAM, re.MULTILINE)


@pytest.mark.skipif(shutil.which('curl') is None, reason='there is no curl')
def test_commands(server, folder, digits, check_answer):
    seven = sorted((digits / 'val' / '7').iterdir())[1]
    (folder / 'seven.png').write_bytes(seven.read_bytes())
    answers = [
        json.loads(subprocess.run(
            shlex.split(line.replace(':8000', f':{server.port}')), cwd=folder, capture_output=True, check=True).stdout)
        for line in ASK]
    (_, block), = blocks('docs/serving.md', 'json')
    shown = [json.loads(line) for line in block.splitlines()]
    check_answer((200, answers[0]), seven)
    assert answers[0][0]['label'] == shown[0][0]['label'] == '7'
    assert answers[1] == shown[1]


@pytest.mark.parametrize('changes', [
    {'crop_pct': 0.875, 'interpolation': 'bicubic', 'input_size': [3, 224, 224]},
    {'crop_pct': 0.95, 'interpolation': 'nearest', 'mean': [0.5, 0.4, 0.3], 'std': [0.1, 0.2, 0.3]}],
    ids=['bicubic', 'nearest'])
def test_preprocessing_is_that_of_timm(folder, tmp_path, monkeypatch, changes):
    monkeypatch.chdir(folder)
    monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', Image.MAX_IMAGE_PIXELS)  # the program sets it
    names = {}
    exec(compile(PROGRAM, 'docs/serving.md', 'exec'), names)
    names['config'].update(changes)
    names['side'] = names['config']['input_size'][-1]
    transform = create_transform(**names['config'])
    for width, height in ((8, 8), (65, 64), (301, 200), (97, 334), (500, 11)):
        content = encoded(Image.fromarray(noise(width, height)), 'PNG')
        (tmp_path / 'image.png').write_bytes(content)
        expected = transform(load_image(tmp_path / 'image.png'))
        np.testing.assert_allclose(names['prepare'](content)[0], expected, rtol=0, atol=1e-6)


def test_many_at_once(ask, digits, check_answer):
    paths = sorted((digits / 'val').glob('*/*.png'))[::5]
    with ThreadPoolExecutor(12) as pool:
        for path, answer in zip(paths, pool.map(lambda path: ask(path.read_bytes()), paths)):
            check_answer(answer, path)


def test_kinds_of_images(ask, check_answer, tmp_path):
    """The type is what the file is, whatever the request says."""
    image, clear = Image.fromarray(noise(40, 30)), Image.fromarray(noise(40, 30, 4))
    sixteen_bits = Image.fromarray(noise(40, 30, 2).view(np.uint16)[..., 0])
    exif = Image.Exif()
    exif[0x0112] = 6  # turn it by 90 degrees
    for content in (
            encoded(image, 'JPEG', progressive=True, exif=exif), encoded(image.convert('CMYK'), 'JPEG'),
            encoded(image.convert('L'), 'JPEG'), encoded(image.convert('1'), 'PNG'), encoded(sixteen_bits, 'PNG'),
            encoded(image.quantize(16), 'PNG', transparency=3), encoded(clear, 'PNG'),
            encoded(image, 'PNG', transparency=tuple(noise(40, 30)[0, 0].tolist())),
            encoded(clear.convert('LA'), 'PNG'), encoded(image, 'WEBP'), encoded(clear, 'WEBP', lossless=True),
            encoded(image, 'PNG', save_all=True, append_images=[image.convert('L').convert('RGB')]),
            encoded(image.resize((4, 200)), 'PNG')):
        (tmp_path / 'image').write_bytes(content)
        check_answer(ask(content, headers={'Content-Type': 'image/gif'}), tmp_path / 'image')


NO_IMAGE = 415, {'detail': 'the body must be an image file, one of JPEG, PNG, WEBP'}
DAMAGED = 400, {'detail': 'the image is damaged'}
MANY_PIXELS = 413, {'detail': 'the image may have 25000000 pixels and sides of 50 to 1, not more'}
MANY_BYTES = 413, {'detail': 'the body must have at most 10000000 bytes'}


@pytest.mark.parametrize('content, answer', [
    *((encoded(Image.fromarray(noise(8, 8)), name), NO_IMAGE) for name in ('GIF', 'TIFF', 'PPM', 'PDF')),
    (b'<svg xmlns="http://www.w3.org/2000/svg" width="8" height="8"/>', NO_IMAGE), (b'', NO_IMAGE),
    (b'%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n', NO_IMAGE), (b'\0' * 5000, NO_IMAGE),
    *((encoded(Image.fromarray(noise(90, 90)), name)[:2000], DAMAGED) for name in ('PNG', 'JPEG', 'WEBP')),
    *((png(*size), MANY_PIXELS) for size in ((20000, 20000), (5000, 5001), (1, 51), (1000000, 1))),
    (encoded(Image.new('L', (5001, 5000)), 'JPEG'), MANY_PIXELS), (png(8, 8) + bytes(MAX_BYTES), MANY_BYTES)],
    ids=lambda value: None if isinstance(value, bytes) else str(value[0]))
def test_refused(ask, content, answer):
    assert ask(content) == answer


def test_the_most_pixels_and_bytes(ask):
    for content in (png(5000, 5000), png(2, 100), png(8, 8).ljust(MAX_BYTES, b'\0')):
        assert ask(content)[0] == 200


@pytest.mark.parametrize('file_format', ['PNG', 'JPEG', 'WEBP'])
def test_damaged(ask, file_format):
    content, rng = encoded(Image.fromarray(noise(90, 90)), file_format), np.random.default_rng(0)
    for _ in range(10):
        changed = bytearray(content)
        for i in rng.integers(0, len(content), 20):
            changed[i] ^= 0xff
        assert ask(changed)[0] in (200, 400, 413, 415)  # what only changes colours is an image still


def connect(server, header, host='localhost'):
    """A connection on which a request has begun."""
    connection = socket.create_connection(('127.0.0.1', server.port), timeout=SECONDS)
    connection.sendall(f'POST /predict HTTP/1.1\r\nHost: {host}\r\n{header}\r\n\r\n'.encode())
    return connection


@pytest.mark.parametrize('header, piece', [
    ('Content-Length: 1000000000000', bytes(100000)),
    ('Transfer-Encoding: chunked', b'186a0\r\n%b\r\n' % bytes(100000))], ids=['with length', 'chunked'])
def test_endless_body_is_cut_off(server, header, piece):
    sent = 0
    with closing(connect(server, header)) as connection, pytest.raises(OSError):
        while sent < 4 * MAX_BYTES:  # the kernel's buffers take some
            connection.sendall(piece)
            sent += len(piece)
    assert sent >= MAX_BYTES


def test_other_requests(ask):
    for method, path, status, words in (
            ('GET', '/predict', 405, 'Method Not Allowed'), ('POST', '/health', 405, 'Method Not Allowed'),
            ('POST', '/predict/', 404, 'Not Found'), ('GET', '/docs', 404, 'Not Found'),
            ('GET', '/predict/../serve.py', 404, 'Not Found'), ('GET', '/model.onnx', 404, 'Not Found')):
        assert ask(png(8, 8), path, method) == (status, {'detail': words})


@pytest.mark.parametrize('host', ['evil.example', '127.0.0.1.evil.example'])
def test_other_hosts(server, host):
    with closing(connect(server, 'Content-Length: 0', host)) as connection:
        assert connection.recv(65536).startswith(b'HTTP/1.1 400')


def test_answers_while_it_computes(ask):
    content = encoded(Image.new('RGBA', (5000, 5000), (255, 0, 0, 99)), 'PNG')
    with ThreadPoolExecutor(4) as pool:
        answers = [pool.submit(ask, content) for _ in range(4)]
        time.sleep(0.1)
        assert ask(path='/health', method='GET')[0] == 200
        assert not all(answer.done() for answer in answers)
    assert [answer.result()[0] for answer in answers] == [200] * 4


def test_slow_requests(server, ask):
    content = png(8, 8)
    slow = [connect(server, f'Content-Length: {len(content)}') for _ in range(16)]
    deadline = time.monotonic() + SECONDS
    while (answer := ask(content))[0] == 200:  # until the server has begun with all of them
        assert time.monotonic() < deadline
    assert answer == (503, {'detail': 'too many requests at a time, try again later'})
    assert ask(path='/health', method='GET')[0] == 200
    slow[0].sendall(content)
    assert slow[0].recv(65536).startswith(b'HTTP/1.1 200')
    assert ask(content)[0] == 200
    for connection in slow[1:]:
        assert connection.recv(65536).startswith(b'HTTP/1.1 408')
    for connection in slow:
        connection.close()
    assert ask(content)[0] == 200
