"""`vt-zoo explore`: a real server, a real browser."""
import io
import os
import shutil
import signal
import socket
import subprocess
import sys
from contextlib import contextmanager
from itertools import pairwise
from urllib.parse import urlsplit

import numpy as np
import pytest
import timm
import torch
from helpers import check_refused
from PIL import Image

from vt_zoo.analysis.explorer import look
from vt_zoo.analysis.records import capture_tokens
from vt_zoo.data.images import load_image
from vt_zoo.models.vt_fpn import VTFPN
from vt_zoo.segmentation.predict import predict_classes
from vt_zoo.weights import load
from vt_zoo.weights.files import write_segmenter

CHROMIUM = next(filter(None, map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome'))), None)
FLAGS = [
    '--headless', '--no-sandbox', '--disable-gpu', '--disable-quic', '--no-first-run', '--disable-sync',
    '--disable-background-networking', '--disable-component-update']
SECONDS = 60


@contextmanager
def explorer(model):
    """A process of the command and the address that it prints. No request leaves it: a proxy would see each."""
    with socket.create_server(('127.0.0.1', 0)) as proxy:
        address = f'http://127.0.0.1:{proxy.getsockname()[1]}'
        process = subprocess.Popen(
            [sys.executable, '-m', 'vt_zoo', 'explore', '--model', str(model), '--port', '0'],
            env={**os.environ, **dict.fromkeys(('http_proxy', 'https_proxy', 'all_proxy'), address), 'no_proxy': ''},
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler))
        try:
            line = process.stdout.readline()
            assert line.startswith('open '), process.stderr.read()
            yield process, line.split()[1]
            proxy.setblocking(False)
            with pytest.raises(BlockingIOError):
                proxy.accept()
        finally:
            process.kill()
            process.communicate()


@pytest.fixture(scope='module')
def browser():
    pytest.importorskip('gradio')
    sync_api = pytest.importorskip('playwright.sync_api')
    if CHROMIUM is None:
        pytest.skip('there is no Chromium')
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture(scope='module')
def classifier():
    """Address of an explorer of test_vt_resnet."""
    pytest.importorskip('gradio')
    with explorer('test_vt_resnet') as (_, url):
        yield url


class Page:
    """A page of the explorer. It may ask this machine only, which `close` checks."""

    def __init__(self, browser, url):
        self.page = browser.new_page(viewport={'width': 1280, 'height': 900})
        self.page.set_default_timeout(1000 * SECONDS)
        self.requests = []
        self.page.on('request', lambda request: self.requests.append(request.url))
        self.page.goto(url)
        self.page.wait_for_selector('#file input[type=file]', state='attached')

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.page.close()
        addresses = [urlsplit(url) for url in self.requests]
        assert {a.hostname for a in addresses if a.scheme not in ('data', 'blob')} == {'127.0.0.1'}

    def upload(self, path):
        if self.page.locator('#file table').count():  # lists the file that is open
            self.page.click('#file button[aria-label="Clear"]')
            self.page.wait_for_selector('#file table', state='detached')  # a file chosen before this is lost
            self.page.wait_for_selector('#token img', state='detached')
        self.page.set_input_files('#file input[type=file]', path)

    def wait_for(self, text):
        self.page.get_by_text(text).first.wait_for()

    def picture(self, selector):
        """The pixels that are shown there."""
        content = self.page.evaluate(
            'async s => [...new Uint8Array(await (await fetch(document.querySelector(s).src)).arrayBuffer())]',
            f'{selector} img')
        return np.asarray(Image.open(io.BytesIO(bytes(content))).convert('RGB')).astype(int)

    def captions(self):
        return [image.get_attribute('alt') for image in self.page.locator('#tokens img').all()]


def literal_entropy(attention):
    """Of a map in nats, and as a share of uniform attention's."""
    attention = attention.double().numpy().ravel()
    nats = -(attention * np.log(attention)).sum()
    return nats, nats / np.log(attention.size)


@pytest.fixture(scope='module')
def seven(digits):
    return sorted((digits / 'val' / '7').iterdir())[0]


@torch.no_grad()
def test_classifier(browser, classifier, seven):
    subject = load('test_vt_resnet')
    x = subject.prepare(load_image(seven))[None]
    records = capture_tokens(subject.model, x)
    with Page(browser, classifier) as page:
        page.upload(seven)
        page.wait_for('Token 1')
        meters = page.page.locator('#prediction meter').all()
        shown = {meter.get_attribute('aria-label'): float(meter.get_attribute('value')) for meter in meters}
        top = subject.model(x).softmax(-1)[0].topk(5)
        assert list(shown) == [str(i) for i in top.indices.tolist()] and next(iter(shown)) == '7'
        np.testing.assert_allclose(list(shown.values()), top.values, atol=1e-5)
        assert page.captions() == [
            f'{i}: {literal_entropy(a)[1]:.2f}' for i, a in enumerate(records[0].attention[0], 1)]

        pictures = [page.picture('#token')]
        for i in range(1, 7):  # faster than the page draws
            page.page.click(f'#tokens button[aria-label="Thumbnail {i} of 16"]')
        page.wait_for('Token 6')
        pictures.append(page.picture('#token'))
        thumbnails = page.picture('#tokens')
        for record, module in zip(records, (1, 2)):
            nats, share = literal_entropy(record.attention[0, 5])
            page.page.click(f'[data-testid="{module}-radio-label"]')
            page.wait_for(f'{nats:.3f}')
            assert f'{nats:.3f} nats, {share:.3f} of' in page.page.locator('#entropy').inner_text()
        pictures.append(page.picture('#token'))
        for before, after in pairwise(pictures):
            assert before.shape == after.shape and np.abs(before - after).max() > 50
        assert np.abs(page.picture('#tokens') - thumbnails).max() > 50
        assert page.captions()[5] == f'6: {share:.2f}'


def test_bad_uploads(browser, classifier, seven, tmp_path):
    (tmp_path / 'letter.png').write_text('Dear reader')
    (tmp_path / 'half.png').write_bytes(seven.read_bytes()[:60])
    (tmp_path / 'heavy.png').write_bytes(bytes(21 * 2 ** 20))
    Image.new('1', (20000, 20000)).save(tmp_path / 'huge.png')
    with Page(browser, classifier) as page:
        for name, expected in (
                ('letter.png', 'image letter.png cannot be read: it is not an image'),
                ('heavy.png', 'exceed the maximum allowed size of 20.0 Mb'),
                ('half.png', 'image half.png cannot be read: '),
                ('huge.png', 'image huge.png cannot be read: Image size (400000000 pixels) exceeds limit')):
            page.upload(seven)
            page.wait_for('Token 1')
            page.upload(tmp_path / name)
            page.wait_for(expected)
            page.page.wait_for_selector('#token img', state='detached')
            assert page.captions() == []


@pytest.fixture(scope='module')
def save_segmenter(tmp_path_factory):
    torch.manual_seed(0)
    model = VTFPN('tu-test_resnet', classes=3, num_tokens=4, token_dim=16, pyramid_channels=32, head_channels=32)

    def save(eval_size=None):
        folder = tmp_path_factory.mktemp('segmenter') / 'model'
        write_segmenter(folder, model.eval(), ['sky', 'sea', 'land'], (0.5,) * 3, (0.25,) * 3, eval_size)
        return folder
    return save


@pytest.fixture(scope='module')
def landscape(tmp_path_factory):
    path = tmp_path_factory.mktemp('landscape') / 'landscape.png'
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 96, 3), dtype=np.uint8)).save(path)
    return path


def test_segmenter(browser, save_segmenter, landscape):
    folder = save_segmenter()
    loaded = load(folder)
    present = {loaded.classes[i] for i in np.unique(predict_classes(loaded, load_image(landscape)))}
    with explorer(folder) as (_, url), Page(browser, url) as page:
        page.upload(landscape)
        page.wait_for('Token 1')
        assert set(page.page.locator('#prediction .legend').inner_text().split()) == present
        assert page.page.locator('#prediction img').count() == 1 + len(present)
        page.page.wait_for_function(
            "[...document.querySelectorAll('#prediction img')].every(e => e.complete && e.naturalWidth == 96)")
        assert len(page.captions()) == 4
        first = page.picture('#token')
        page.page.click('[data-testid="4-radio-label"]')
        page.wait_for('ln(2 · 3)')
        assert np.abs(first - page.picture('#token')).max() > 50


@pytest.mark.slow  # without a page that is open it is a test of the gate
def test_ends_on_ctrl_c(browser):
    with explorer('test_vt_resnet') as (process, url), Page(browser, url):
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate(timeout=SECONDS)
        assert process.returncode == 130
        assert stderr == 'vt-zoo: interrupted\n'


def test_mask(save_segmenter, landscape):
    folder = save_segmenter()
    loaded, image = load(folder), load_image(landscape)
    classes = predict_classes(loaded, image)
    masks = look(load(str(folder)), image).prediction
    assert len(masks) > 1
    for name, mask in masks.items():
        np.testing.assert_array_equal(mask, classes == loaded.classes.index(name))
    assert sum(masks.values()).all()


@pytest.mark.parametrize(('eval_size', 'size', 'expected'), [
    (None, (1500, 30), (1024, 20)), (32, (96, 64), (48, 32)), ((32, 64), (96, 96), (64, 32))])
def test_size_that_a_segmenter_sees(save_segmenter, eval_size, size, expected):
    image = Image.new('RGB', size)
    seen = look(load(str(save_segmenter(eval_size))), image)
    assert seen.image.size == expected and image.size == size
    assert all(mask.shape == expected[::-1] for mask in seen.prediction.values())


@pytest.mark.parametrize(('words', 'expected'), [
    (['--model', 'no_such_model'], "'no_such_model'"),
    (['--model', 'test_vt_resnet', '--port', '65536'], "'65536' is not a port from 0 to 65535"),
    ([], '--model')])
def test_refused(command, words, expected):
    check_refused(command('explore', '--port', '0', *words), expected)


def test_model_without_tokens(command, tmp_path):
    pytest.importorskip('gradio')
    timm.models.save_for_hf(timm.create_model('test_resnet'), tmp_path / 'resnet', safe_serialization=True)
    check_refused(command('explore', '--port', '0', '--model', tmp_path / 'resnet'), 'has no tokens to look at')


def test_busy_port(command):
    with socket.create_server(('127.0.0.1', 0)) as other:
        port = other.getsockname()[1]
        result = command('explore', '--model', 'test_vt_resnet', '--port', port)
    check_refused(result, f'port {port} cannot be used: Address already in use')


def test_without_gradio(command):
    result = command('explore', '--model', 'test_vt_resnet', before="import sys; sys.modules['gradio'] = None")
    check_refused(result, "the explorer needs gradio: pip install 'vt_zoo[explore]'")
