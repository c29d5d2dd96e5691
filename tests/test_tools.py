"""Other people's tools on models of the zoo, in training and inference form. Extra `tools`; `.ci/full tools` runs them.

What tools need of a model is tested in test_leaves.py without them.
"""
import copy
import warnings

import pytest
import timm
import torch
import torch.nn as nn
from helpers import images, leaves, vt_fpn
from timm.utils import reparameterize_model

import vt_zoo  # noqa: F401
from vt_zoo.layers.tokenizer import LearnedFilters

pytestmark = pytest.mark.filterwarnings('ignore')


def classifier():
    return timm.create_model('test_vt_resnet', pretrained=True).eval()


MODELS = {
    'classifier': classifier,
    'classifier, inference form': lambda: reparameterize_model(classifier()),
    'vt_fpn': vt_fpn,
    'vt_fpn, inference form': lambda: reparameterize_model(vt_fpn()),
}


def tool(package):
    return pytest.importorskip(package, reason=f"{package} is not installed, the extra `tools` brings it")


@pytest.fixture(params=MODELS)
def model(request):
    torch.manual_seed(0)
    return MODELS[request.param]()


@pytest.fixture
def x():
    return images(2, 64, 64)


@torch.no_grad()
def outputs(model, x):
    return model(x)


def count_parameters(model):
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize('kind', ['cpu_offload', 'disk_offload'])
def test_accelerate_offload(model, x, kind, tmp_path):
    accelerate = tool('accelerate')
    expected = outputs(model, x)
    folder = [tmp_path] if kind == 'disk_offload' else []
    getattr(accelerate, kind)(model, *folder, execution_device='cpu')
    assert torch.equal(outputs(model, x), expected)


@pytest.mark.parametrize('kind', ['LoRA', 'DoRA', 'LoHa', 'IA3'])
def test_peft(model, x, kind):
    peft = tool('peft')
    stage = 'vt_stage' if hasattr(model, 'vt_stage') else 'decoder.neck'
    targets = [n for n, m in leaves(model).items() if n.startswith(stage) and isinstance(m, (nn.Conv2d, nn.Linear))]
    for n in targets:  # DoRA divides by the norm of rows, which are zero where a branch starts at zero
        nn.init.normal_(model.get_submodule(n).weight, std=0.1)
    expected = outputs(model, x)
    config = {
        'LoRA': lambda: peft.LoraConfig(target_modules=targets),
        'DoRA': lambda: peft.LoraConfig(target_modules=targets, use_dora=True),
        'LoHa': lambda: peft.LoHaConfig(target_modules=targets),
        'IA3': lambda: peft.IA3Config(target_modules=targets, feedforward_modules=[]),
    }[kind]()
    adapted = peft.get_peft_model(model, config).eval()
    torch.testing.assert_close(outputs(adapted, x), expected, rtol=1e-4, atol=1e-4)
    trained = {n: p for n, p in adapted.named_parameters() if p.requires_grad}
    optimizer = torch.optim.SGD(trained.values(), lr=1)
    learns = set()
    for step in range(2):  # the second reaches what is multiplied by a part that starts at zero
        optimizer.zero_grad()
        adapted(x).log_softmax(1)[:, step].mean().backward()
        learns |= {n for n, p in trained.items() if p.grad.any()}
        optimizer.step()
    assert trained.keys() - learns == set()
    assert all(any(n.startswith(f'base_model.model.{target}.') for n in trained) for target in targets)


def test_thop_counts_every_parameter(x):
    thop = tool('thop')
    model = classifier()
    custom_ops = {LearnedFilters: lambda layer, inputs, output: None}  # of layers that it does not know it counts none
    _, parameters = thop.profile(copy.deepcopy(model), inputs=(x,), custom_ops=custom_ops, verbose=False)
    assert parameters == count_parameters(model)


def test_torchinfo_counts_every_parameter(model, x):
    assert tool('torchinfo').summary(model, input_data=x, verbose=0).total_params == count_parameters(model)


def test_torchao_weight_only_int8(model, x):
    quantization = tool('torchao.quantization')
    expected = outputs(model, x)
    linears = [n for n, m in model.named_modules() if isinstance(m, nn.Linear)]
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    assert linears and all(type(model.get_submodule(n).weight.data) is not torch.Tensor for n in linears)
    assert (outputs(model, x) - expected).abs().max() < 0.05 * expected.abs().max()


def test_captum_activations(model, x):
    attr = tool('captum.attr')
    layer = model.vt_stage[0] if hasattr(model, 'vt_stage') else model.decoder.neck
    activations = attr.LayerActivation(model, layer).attribute(x)
    assert all(isinstance(a, torch.Tensor) and a.isfinite().all() for a in activations)


@pytest.mark.parametrize('layer', ['vt_stage.0.projector', 'layer3'])
@pytest.mark.parametrize('form', ['classifier', 'classifier, inference form'])
def test_grad_cam(form, layer, x):
    cam = tool('pytorch_grad_cam')
    model = MODELS[form]()
    with cam.GradCAM(model, [model.get_submodule(layer)]) as grad_cam:
        heat = grad_cam(input_tensor=x, targets=None)
    assert heat.shape == (2, 64, 64) and heat.max() > 0


def test_openvino(model, x):
    openvino = tool('openvino')
    expected = outputs(model, x)
    compiled = openvino.compile_model(
        openvino.convert_model(model, example_input=x), 'CPU', {'INFERENCE_PRECISION_HINT': 'f32'})
    torch.testing.assert_close(torch.from_numpy(compiled(x.numpy())[0]), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize('form', ['classifier', 'classifier, inference form'])
def test_coremltools(form, x):
    coremltools = tool('coremltools')
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        traced = torch.jit.trace(MODELS[form](), x)
    converted = coremltools.convert(
        traced, inputs=[coremltools.TensorType(shape=x.shape)], convert_to='mlprogram',
        minimum_deployment_target=coremltools.target.iOS16)
    assert converted.get_spec().WhichOneof('Type') == 'mlProgram'


@pytest.mark.parametrize('form', ['classifier', 'classifier, inference form'])
def test_torch_pruning_of_the_trunk(form, x):
    """Its graph of dependencies has no products of two activations, so the stage is left out (docs/libraries.md)."""
    pruning = tool('torch_pruning')
    model = MODELS[form]()
    before = count_parameters(model)
    pruner = pruning.pruner.MagnitudePruner(
        model, x, pruning.importance.MagnitudeImportance(), pruning_ratio=0.3,
        ignored_layers=[model.vt_stage, model.fc])
    pruner.step()
    assert count_parameters(model) < 0.8 * before
    assert outputs(model, x).shape == (2, 10)


def test_byol_learns_on_features(x):
    byol = tool('byol_pytorch')
    model = classifier()
    learner = byol.BYOL(model, image_size=64, hidden_layer=-2, projection_size=16, projection_hidden_size=32)
    _, features = learner(x, return_embedding=True)
    assert torch.equal(features, model.forward_head(model.forward_features(x), pre_logits=True))


@pytest.mark.slow
@pytest.mark.parametrize('form', ['classifier', 'classifier, inference form'])
def test_compile_with_free_sizes(form):
    model = MODELS[form]()
    compiled = torch.compile(model, fullgraph=True, dynamic=True)
    for size in ((2, 64, 64), (3, 96, 64), (1, 64, 128)):
        torch.testing.assert_close(
            outputs(compiled, images(*size)), outputs(model, images(*size)), rtol=1e-3, atol=1e-3)
