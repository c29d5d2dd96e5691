"""pytest plug-in (`-p timm_plugin`) that makes timm's own tests/test_models.py test the models of vt_zoo.

Those tests take their models from timm's listings, filtered by patterns and modules that name timm's own families. With
this plug-in the listings hold vt_zoo's models only, and a filter that stands for a kind of model takes in ours of that
kind. Importing this module changes nothing, the listings are replaced when pytest loads it as a plug-in.
"""
from functools import cache

import timm
import torch

import vt_zoo  # noqa: F401  registers the models

_timm_list_models = timm.list_models

# it compares with files that it downloads from timm's own organisation on the Hugging Face Hub
_TIMM_WEIGHTS_TEST = 'test_model_inference'


@cache
def registered_models():
    """Names of the models that vt_zoo registers, without tags."""
    return [name for name in _timm_list_models() if timm.model_entrypoint(name).__module__.startswith('vt_zoo.')]


@cache
def token_models():
    """Those whose `forward_features` gives tokens (B, L, C) instead of a map: 'non standard' in timm's tests."""
    names = []
    for name in registered_models():
        model = timm.create_model(name, device='meta').eval()
        image = torch.empty(1, *model.default_cfg['input_size'], device='meta')
        if model.forward_features(image).ndim == 3:
            names.append(name)
    return names


def _arch(model_name):
    return timm.models.split_model_name_tag(model_name)[0]


def _with_token_models(patterns):
    """timm's list of non standard families is known by its first pattern, vision transformers."""
    is_non_standard = not isinstance(patterns, str) and 'vit_*' in patterns
    return [*patterns, *token_models()] if is_non_standard else patterns


def list_models(filter='', module='', pretrained=False, exclude_filters='', **kwargs):
    """`timm.list_models`, of vt_zoo's models.

    A list of modules is timm's list of those with `forward_intermediates`. All models of vt_zoo have it.
    """
    names = _timm_list_models(
        _with_token_models(filter),
        module=module if isinstance(module, str) else '',
        pretrained=pretrained,
        exclude_filters=_with_token_models(exclude_filters),
        **kwargs,
    )
    return [name for name in names if _arch(name) in registered_models()]


def list_pretrained(filter='', exclude_filters=''):
    """`timm.list_pretrained`, of vt_zoo's models."""
    return list_models(filter, pretrained=True, exclude_filters=exclude_filters, include_tags=True)


def pytest_configure():
    for module in (timm, timm.models):
        module.list_models = list_models
        module.list_pretrained = list_pretrained


def pytest_collection_modifyitems(config, items):
    """Keep the tests of vt_zoo's models, each with its model as the property 'model' in the junit report.

    What goes are tests that name timm's own models, and placeholders for listings in which none of ours is.
    """
    kept, dropped = [], []
    for item in items:
        params = item.callspec.params if hasattr(item, 'callspec') else {}
        model = _arch(str(params.get('model_name', '')))
        if model in registered_models() and item.originalname != _TIMM_WEIGHTS_TEST:
            item.user_properties.append(('model', model))
            kept.append(item)
        else:
            dropped.append(item)
    config.hook.pytest_deselected(items=dropped)
    items[:] = kept
