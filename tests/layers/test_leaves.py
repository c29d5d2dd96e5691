"""Each module that owns weights is called, so that hooks, wrappers, pruning and parametrizations of it work.

What tools do to a model (adapters, offloading, sharding, pruning, counting) they do to its leaf modules; test_tools.py
runs such tools.
"""
import copy
from collections import Counter

import pytest
import timm
import torch
import torch.nn as nn
from helpers import COMBINED, FORMS, SINGLE, assert_equal, calibrated, images, in_form, leaves, name, norms_of, vt_fpn
from timm.utils import reparameterize_model
from torch.nn.utils import parametrizations, prune, remove_weight_norm, weight_norm

OPTIONS = [*SINGLE, *COMBINED, {'norm_layer': 'groupnorm1'}]
ZOO = ['vt_resnet18', pytest.param('vt_resnet34', marks=pytest.mark.slow), 'vt_resnet50',
       pytest.param('vt_resnet101', marks=pytest.mark.slow)]
def maps_of(model):
    return {n: m for n, m in leaves(model).items() if isinstance(m, (nn.Conv2d, nn.Linear))}


class Wrapper(nn.Module):
    """What an adapter is to the outside: a module that calls the one that it stands in place of."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, *args, **kwargs):
        return self.inner(*args, **kwargs)


def wrap_leaves(model):
    model = copy.deepcopy(model)
    for leaf in leaves(model):
        parent, _, child = leaf.rpartition('.')
        setattr(model.get_submodule(parent), child, Wrapper(model.get_submodule(leaf)))
    return model


def assert_leaves_are_called_once(model, x):
    calls = Counter()
    handles = [
        leaf.register_forward_hook(lambda *_, n=n: calls.update([n])) for n, leaf in leaves(model).items()]
    with torch.no_grad():
        model(x)
    for handle in handles:
        handle.remove()
    assert calls == dict.fromkeys(leaves(model), 1)


def assert_weights_are_in_leaves(model):
    owners = {n for n, m in model.named_modules() if list(m.parameters(recurse=False))}
    assert owners == leaves(model).keys()


def assert_wrapping_changes_nothing(model, x):
    wrapped = wrap_leaves(model)
    with torch.no_grad():
        assert torch.equal(wrapped(x), copy.deepcopy(model)(x))


@pytest.mark.parametrize('form', FORMS)
@pytest.mark.parametrize('options', OPTIONS, ids=name)
def test_leaves_of_the_options(options, form):
    model = in_form(calibrated(**options), form)
    assert_leaves_are_called_once(model, images())
    assert_wrapping_changes_nothing(model, images())


@pytest.mark.parametrize('form', FORMS)
@pytest.mark.parametrize('zoo_name', ZOO)
def test_leaves_of_the_zoo(zoo_name, form):
    model = in_form(timm.create_model(zoo_name).eval(), form)
    assert_leaves_are_called_once(model, images(2, 32, 32))
    if form != 'inference':  # a norm's scale of each token's logits has no layer to go into
        assert_weights_are_in_leaves(model)


@pytest.mark.parametrize('form', FORMS)
def test_leaves_of_vt_fpn(form):
    model = in_form(vt_fpn(), form)
    x = images(2, 64, 64)
    assert_leaves_are_called_once(model, x)
    assert_wrapping_changes_nothing(model, x)


@pytest.mark.parametrize('options', OPTIONS, ids=name)
def test_wrapped_leaves_stay_in_the_inference_form(options):
    model = calibrated(**options).double()
    x = images(dtype=torch.float64)
    with torch.no_grad():
        assert_equal(reparameterize_model(wrap_leaves(model))(x), model(x))


def apply_prune(layer):
    prune.random_unstructured(layer, 'weight', amount=0.3)
    return layer.weight_orig


def apply_weight_norm(layer):
    with pytest.warns(FutureWarning):
        weight_norm(layer)
    return layer.weight_v


def apply_parametrized_weight_norm(layer):
    parametrizations.weight_norm(layer)
    return layer.parametrizations.weight.original1


@pytest.mark.parametrize('model', [
    *[pytest.param(lambda o=o: calibrated(**{**o, 'last_projector': False}), id=name(o)) for o in ({}, *COMBINED)],
    pytest.param(vt_fpn, id='vt_fpn')])
@pytest.mark.parametrize('apply', [apply_prune, apply_weight_norm, apply_parametrized_weight_norm])
def test_parametrized_leaves_train_and_reparameterize(apply, model):
    model = model().train()
    weights = {n: apply(layer) for n, layer in maps_of(model).items()}
    before = {n: w.detach().clone() for n, w in weights.items()}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(3):
        optimizer.zero_grad()
        loss = model(images(2, 64, 64, seed=step)).square().mean()
        loss.backward()
        optimizer.step()
    assert loss.isfinite()
    assert [n for n, w in weights.items() if torch.equal(w, before[n])] == []
    model = model.double().eval()
    x = images(2, 64, 64, dtype=torch.float64)
    with torch.no_grad():
        expected = model(x)  # which also makes the weights anew: torch cannot copy those of a training step
        assert_equal(reparameterize_model(model)(x), expected)


def prune_for_good(layer):
    prune.random_unstructured(layer, 'weight', amount=0.3)
    prune.remove(layer, 'weight')


def weight_norm_and_back(layer):
    remove_weight_norm(weight_norm(layer))


def double(layer):
    layer.register_forward_hook(lambda module, inputs, output: 2 * output)


@pytest.mark.filterwarnings('ignore:.*weight_norm:FutureWarning')
@pytest.mark.parametrize('change', [prune_for_good, weight_norm_and_back, double])
def test_changed_leaves_reparameterize(change):
    model = calibrated().double()
    for layer in maps_of(model).values():
        change(layer)
    x = images(dtype=torch.float64)
    reduced = reparameterize_model(model)
    assert change is double or not norms_of(reduced)
    with torch.no_grad():
        assert_equal(reduced(x), model(x))


def test_classifier_is_the_last_child():
    for zoo_name in timm.list_models(module='vt_resnet'):
        with torch.device('meta'):
            model = timm.create_model(zoo_name)
        assert next(reversed(model._modules)) == 'fc'
        model.reset_classifier(7)
        assert next(reversed(model._modules)) == 'fc'
