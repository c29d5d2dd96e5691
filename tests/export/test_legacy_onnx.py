"""ONNX files of torch's older exporter, which timm's onnx_export.py calls: with free sizes they run at each of them."""
import io

import numpy as np
import pytest
import torch
from helpers import COMBINED, FORMS, SINGLE, calibrated, images, in_form, name, vt_fpn

onnxruntime = pytest.importorskip('onnxruntime')

SIZES = [(2, 64, 64), (1, 64, 64), (3, 96, 64), (2, 64, 160), (1, 128, 96)]


def assert_runs_at_every_size(model):
    content = io.BytesIO()
    torch.onnx.export(
        model, images(2, 64, 64), content, dynamo=False, input_names=['x'], output_names=['y'], opset_version=18,
        dynamic_axes={'x': {0: 'batch', 2: 'height', 3: 'width'}})
    session = onnxruntime.InferenceSession(content.getvalue(), providers=['CPUExecutionProvider'])
    for size in SIZES:
        x = images(*size)
        with torch.no_grad():
            expected = model(x).numpy()
        result, = session.run(None, {'x': x.numpy()})
        np.testing.assert_allclose(result, expected, atol=1e-2 * np.abs(expected).max())  # nearest centroids may tie


@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('form', FORMS[1:])
@pytest.mark.parametrize('options', [
    {}, *[pytest.param(o, marks=pytest.mark.slow) for o in SINGLE[1:] + COMBINED]], ids=name)
def test_vt_resnet(options, form):
    assert_runs_at_every_size(in_form(calibrated(**options), form))


@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('form', FORMS[1:])
def test_vt_fpn(form):
    assert_runs_at_every_size(in_form(vt_fpn(), form))
