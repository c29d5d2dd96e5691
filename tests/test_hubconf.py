"""torch.hub finds and builds every model from a checkout alone."""
import json
import subprocess
import sys
from pathlib import Path

import pytest
import timm
from timm_plugin import registered_models

import vt_zoo

# torch.hub.list and help take no local folder: they find it in the cache, where an earlier download would be
SCRIPT = '''
import json, sys, torch
hub_dir, checkout = sys.argv[1:]
torch.hub.set_dir(hub_dir)
names = torch.hub.list('owner/vt_zoo:main', trust_repo=True, verbose=False)
docs = {name: torch.hub.help('owner/vt_zoo:main', name, trust_repo=True) for name in names}
model = torch.hub.load(checkout, 'vt_resnet50', source='local', num_classes=10, pretrained=False).eval()
digits = torch.hub.load(checkout, 'test_vt_resnet', source='local', pretrained=True)
assert checkout not in sys.path

import timm
twin = timm.create_model('vt_resnet50', num_classes=10).eval()
twin.load_state_dict(model.state_dict())
image = torch.randn(2, 3, 64, 64)
with torch.inference_mode():
    outputs, twin_outputs = model(image), twin(image)
print(json.dumps({
    'names': names,
    'docs': docs,
    'files': sorted({m.__file__ for n, m in sys.modules.items() if n.split('.')[0] == 'vt_zoo'}),
    'architecture': model.pretrained_cfg['architecture'],
    'same_type': type(model) is type(twin),
    'shape': list(outputs.shape),
    'same_outputs': torch.equal(outputs, twin_outputs),
    'weights': digits.pretrained_cfg['file'],
    'digits': {name: tensor.tolist() for name, tensor in digits.state_dict().items() if name.startswith('fc.')},
}))
'''


@pytest.fixture(scope='module')
def hub(checkout, tmp_path_factory):
    """What torch.hub makes of the checkout in an interpreter that looks neither at PYTHONPATH nor at the folder."""
    command = [sys.executable, '-I', '-c', SCRIPT, checkout.parent, checkout]
    run = subprocess.run(command, cwd=tmp_path_factory.mktemp('elsewhere'), stdout=subprocess.PIPE, text=True)
    assert run.returncode == 0
    return json.loads(run.stdout.splitlines()[-1])


def test_list_holds_the_registered_models_only(hub):
    assert sorted(hub['names']) == sorted(registered_models())


def test_help_describes_each_model(hub):
    for name in registered_models():
        assert 'VT-ResNet' in hub['docs'][name]


def test_load_imports_the_checkout(hub, checkout):
    assert len(hub['files']) > 1
    assert all(Path(file).is_relative_to(checkout) for file in hub['files'])
    assert not Path(vt_zoo.__file__).is_relative_to(checkout)


def test_load_finds_the_weights_in_the_checkout(hub, checkout):
    assert Path(hub['weights']).is_relative_to(checkout)
    shipped = timm.create_model('test_vt_resnet', pretrained=True)
    assert hub['digits'] == {'fc.weight': shipped.fc.weight.tolist(), 'fc.bias': shipped.fc.bias.tolist()}


def test_load_gives_the_model_of_timm(hub):
    assert hub['architecture'] == 'vt_resnet50'
    assert hub['same_type']
    assert hub['shape'] == [2, 10]
    assert hub['same_outputs']
