"""VT-Net: Visual Transformer modules in place of the last stage of any convolutional timm model

Paper: `Visual Transformers: Where Do Transformers Really Belong in Vision Models?` - https://arxiv.org/abs/2006.03677

The paper puts VT modules on ResNets (vt_resnet.py). Here the trunk is any of timm's own models, down to its feature map
of stride 16, optionally with its pretrained weights.
"""
import copy
import logging
from typing import Any, Dict, List, Optional, Tuple, Union

import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import create_classifier
from timm.models import (
    adapt_input_conv,
    build_model_with_cfg,
    generate_default_cfgs,
    get_pretrained_cfg,
    register_model,
)
from timm.models._features import feature_take_indices

from vt_zoo._requirements import timm_is_at_least
from vt_zoo.inference import InferenceStage, fold_norms
from vt_zoo.inference.blocks import reparameterize_blocks
from vt_zoo.inference.fold import runs_alone
from vt_zoo.layers import VTStage
from vt_zoo.layers._checks import check_choice, check_positive

from ._classifier import HUB_FILE, PixelTokens, TokenClassifier, check_images, creation_args, project_to_features
from .trunk import STRIDE, count_levels, create_trunk, timms_modules

__all__ = ['VTNet']

torch.fx.wrap('check_images')

_logger = logging.getLogger(__name__)

PREPROCESSING = 'input_size', 'crop_pct', 'crop_mode', 'interpolation', 'mean', 'std'
CREATION_ARGS = 'trunk', 'trunk_args', 'depth'


class VTNet(TokenClassifier):
    """A convolutional trunk, a VT stage on its map of stride 16, and a classifier on the mean of the tokens.

    The feature maps returned by `features_only=True` and `forward_intermediates()` are the trunk's, followed by the map
    refined by the VT stage, which is max-pooled to stride 32 as in `VTResNet` unless `output_stride=16`.
    """

    asked = 'vt_stage'

    def __init__(
            self,
            trunk: str = 'resnet50d',
            trunk_pretrained: bool = False,
            trunk_args: Optional[Dict[str, Any]] = None,
            num_classes: int = 1000,
            in_chans: int = 3,
            output_stride: int = 32,
            global_pool: str = 'avg',
            depth: int = 2,
            feature_dim: Optional[int] = None,
            token_dim: int = 512,
            projector: bool = True,
            last_projector: bool = False,
            drop_rate: float = 0.,
            drop_path_rate: float = 0.,
            device=None,
            dtype=None,
            **stage_args,
    ) -> None:
        """
        Args:
            trunk: Name of a convolutional timm model, with a tag for weights other than its default ones.
            trunk_pretrained: Load the trunk's weights.
            trunk_args: Arguments of the timm model that the trunk is cut from.
            num_classes: Number of classes; 0 for no classifier, so that the output is the pooled tokens (B, CT).
            in_chans: Channels of the image.
            output_stride: Stride of the last feature map, 32 or 16; half of that if the trunk ends at stride 8, as with
                `trunk_args={'output_stride': 8}`. It does not affect the tokens.
            global_pool: Pooling over the tokens: 'avg' (the paper's), 'max', 'avgmax', 'catavgmax' or '' for none.
            depth: Number of VT modules.
            feature_dim: Channels C_out of the feature map that the VT modules refine; None to keep the trunk's.
            token_dim: Channels CT of a token.
            projector: Write the tokens back to the map. If False, modules after the first work on tokens only.
            last_projector: Give the last module a projector too; `features_only=True` sets this.
            drop_rate: Dropout rate before the classifier.
            drop_path_rate: Stochastic depth rate. In the trunk it rises over the blocks of the whole timm model; all VT
                modules use the full rate.
            **stage_args: Other arguments of `vt_zoo.layers.VTStage`.

        Raises:
            ValueError: An argument is not allowed.
        """
        dd = {'device': device, 'dtype': dtype}
        super().__init__()
        check_choice('output_stride', output_stride, [16, 32])
        check_choice('global_pool', global_pool, ['avg', 'max', 'avgmax', 'catavgmax', ''])
        check_positive('in_chans', in_chans)
        if last_projector and not projector:
            raise ValueError('last_projector=True needs projector=True, got projector=False')
        rates = {'drop_path_rate': drop_path_rate} if drop_path_rate else {}
        self.trunk = create_trunk(trunk, trunk_pretrained, in_chans=in_chans, **{**rates, **dd, **(trunk_args or {})})
        in_chs = self.trunk.feature_info.channels()[-1]
        self.vt_stage = VTStage(
            in_chs,
            feature_dim or in_chs,
            depth,
            token_dim=token_dim,
            projector=projector,
            last_projector=last_projector,
            drop_path=drop_path_rate,
            **stage_args,
            **dd,
        )
        self.in_chans = in_chans
        self.output_stride = output_stride
        self.feature_info = [
            dict(num_chs=info['num_chs'], reduction=info['reduction'], module=f'trunk.{info["module"]}')
            for info in self.trunk.feature_info.get_dicts()]
        reduction = self.trunk.feature_info.reduction()[-1] * output_stride // STRIDE
        self.feature_info.append(dict(num_chs=self.vt_stage.out_chs, reduction=reduction, module='vt_stage'))
        self.num_classes = num_classes
        self.num_features = token_dim
        self.drop_rate = drop_rate
        self.global_pool, self.fc = create_classifier(token_dim, num_classes, pool_type=global_pool, **dd)
        self.head_hidden_size = token_dim * self.global_pool.feat_mult()

    @torch.jit.ignore
    def reparameterize(self) -> None:
        """Turn the model, in place, into its inference form; timm's `reparameterize_model` does this to a copy.

        Trunks that have an inference form of their own, such as FastViT, MobileOne and RepVGG, take it too. If an error
        is raised, the model is left as it was.
        """
        trunk, stage = self.trunk, self.vt_stage
        self.trunk = copy.deepcopy(trunk)
        reparameterize_blocks(self.trunk)
        if type(stage) is VTStage and runs_alone(stage):
            self.vt_stage = InferenceStage(stage)
        try:
            fold_norms(self)
        except BaseException:
            self.trunk, self.vt_stage = trunk, stage
            raise

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the activations of the trunk and the VT modules in the backward pass, or keep them."""
        modules = timms_modules(self.trunk)[1]
        modules.set_grad_checkpointing(enable)
        if enable and not timm_is_at_least('1.0.31'):  # later ones skip in-place activations
            for part in modules.children():
                if getattr(part, 'inplace', False):
                    part.inplace = False
        self.vt_stage.grad_checkpointing = enable

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> Dict[str, Any]:
        """Regular expressions that group the parameters by depth: the trunk's modules, then the VT stage's."""
        prefix, modules = timms_modules(self.trunk)
        own = [name for name, _ in modules.named_parameters(recurse=False)]
        groups = {'parameters': rf'^trunk\.{prefix}(?:{"|".join(own)})$'} if own else {}
        for name, part in modules.named_children():
            whole = rf'^trunk\.{prefix}{name}\.'
            block = rf'{whole}(?:blocks\.|b)?(\d+)'
            if list(part.parameters()):
                groups[name] = whole if coarse else [(block, None), (whole, (0,))]
        return {**groups, 'vt_stage': r'^vt_stage' if coarse else r'^vt_stage\.(\d+)'}

    @torch.jit.ignore
    def get_classifier(self, name_only: bool = False) -> Union[str, nn.Module]:
        """The classifier, or its name."""
        return 'fc' if name_only else self.fc

    def reset_classifier(self, num_classes: int, global_pool: Optional[str] = None) -> None:
        """Replace the classifier by a new one.

        Args:
            num_classes: Number of classes; 0 for no classifier.
            global_pool: Pooling over the tokens; None to keep the current one.
        """
        parameter = next(self.parameters())
        self.num_classes = num_classes
        if global_pool is None:
            global_pool = self.global_pool.pool_type
        self.global_pool, self.fc = create_classifier(
            self.num_features, num_classes, pool_type=global_pool, device=parameter.device, dtype=parameter.dtype)
        self.head_hidden_size = self.num_features * self.global_pool.feat_mult()
        self.global_pool.train(self.training)
        self.fc.train(self.training)

    def forward_intermediates(
            self,
            x: torch.Tensor,
            indices: Optional[Union[int, List[int]]] = None,
            norm: bool = False,
            stop_early: bool = False,
            output_fmt: str = 'NCHW',
            intermediates_only: bool = False,
    ) -> Union[List[torch.Tensor], Tuple[torch.Tensor, List[torch.Tensor]]]:
        """Forward pass that also returns feature maps; arguments and return values are those of `VTResNet`.

        The trunk always runs as a whole, whichever maps are asked for.
        """
        if output_fmt != 'NCHW':
            raise ValueError(f"output_fmt must be 'NCHW', got {output_fmt!r}")
        take_indices, max_index = feature_take_indices(len(self.feature_info), indices)
        maps = list(self.trunk(check_images(x, self.in_chans)))
        x = maps[-1]
        tokens = x.flatten(2).transpose(1, 2)
        if not stop_early or max_index == len(maps):
            x, tokens = self.vt_stage(x)
            if self.output_stride == 32:
                x = F.max_pool2d(x, 3, stride=2, padding=1)
            maps.append(x)
        intermediates = [maps[i] for i in take_indices]
        return intermediates if intermediates_only else (tokens, intermediates)

    def prune_intermediate_layers(
            self,
            indices: Union[int, List[int]] = 1,
            prune_norm: bool = False,
            prune_head: bool = True,
    ) -> List[int]:
        """Remove the VT stage and the classifier if the given feature maps do not need them."""
        take_indices, max_index = feature_take_indices(len(self.feature_info), indices)
        last = len(self.feature_info) - 1
        if max_index < last:
            self.vt_stage = PixelTokens()
            self.output_stride = 0  # nothing left to pool
            self.num_features = self.head_hidden_size = self.feature_info[last - 1]['num_chs']
        if prune_head or max_index < last:
            self.reset_classifier(0, '')
        return take_indices

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        """Map images (B, in_chans, H, W) to tokens (B, L, CT).

        Raises:
            ValueError: H or W is less than 32, or the number of channels is not `in_chans`.
        """
        return self.vt_stage(self.trunk(check_images(x, self.in_chans))[-1])[1]


def _keep_trunk(state_dict: Dict[str, torch.Tensor], model: VTNet) -> Dict[str, torch.Tensor]:
    """Take the trunk from a timm model's weights; the VT stage and the classifier keep the model's own, untrained ones.

    Raises:
        RuntimeError: The weights are not from the model that the trunk is cut from.
    """
    prefix = f'trunk.{timms_modules(model.trunk)[0]}'
    given = {name.replace('.', '_'): weight for name, weight in state_dict.items()}  # cutting joins names by _
    own = model.state_dict()
    missing = [n for n in own if n.startswith(prefix) and n[len(prefix):].replace('.', '_') not in given]
    if missing:
        raise RuntimeError(
            f'these weights are for another trunk than this model has: {len(missing)} of its names are missing, the '
            f'first is {missing[0]}')
    _logger.warning('Only the trunk is pretrained: the VT stage and the classifier are new, train them.')
    trunk = {n: given[n[len(prefix):].replace('.', '_')] for n in own if n.startswith(prefix)}
    for name, weight in trunk.items():
        if weight.ndim == 4 and weight.shape[1] == 3 != own[name].shape[1]:  # first convolution, for other channels
            trunk[name] = adapt_input_conv(model.in_chans, weight)
    return {**own, **trunk}


def checkpoint_filter_fn(state_dict: Dict[str, torch.Tensor], model: VTNet) -> Dict[str, torch.Tensor]:
    """Return weights that fit the model: its own unchanged, or the trunk of a timm model's weights."""
    return state_dict if any(n.startswith('vt_stage.') for n in state_dict) else _keep_trunk(state_dict, model)


def _cfg(**kwargs: Any) -> Dict[str, Any]:
    return {
        'num_classes': 1000, 'input_size': (3, 224, 224), 'pool_size': None, 'crop_pct': 0.875,
        'interpolation': 'bicubic', 'mean': IMAGENET_DEFAULT_MEAN, 'std': IMAGENET_DEFAULT_STD,
        'first_conv': None, 'classifier': 'fc', 'license': 'apache-2.0', 'paper_ids': 'arXiv:2006.03677',
        'paper_name': 'Visual Transformers: Where Do Transformers Really Belong in Vision Models?', **kwargs}


def preprocessing(trunk: str) -> Dict[str, Any]:
    """timm's preprocessing for one of its own models; empty if timm has no config for it."""
    cfg = get_pretrained_cfg(trunk, allow_unregistered=True)
    return {} if cfg is None else {name: getattr(cfg, name) for name in PREPROCESSING}


def _trunk_cfg(name: str) -> Dict[str, Any]:
    """Config for the weights of a timm model, of which only the trunk is used; the classifier still needs training."""
    return _cfg(
        hf_hub_id=f'timm/{name}', hf_hub_filename=HUB_FILE, license=get_pretrained_cfg(name).license,
        **preprocessing(name))


# The `untrained*` entries after the others keep timm from taking a trunk as the weights of a bare name.
TRUNK_TAGS = {  # the best at 224x224 in timm's results of August 2026 among those under a licence like ours
    'resnet50d': 'ra4_e3600_r224_in1k', 'resnext50_32x4d': 'a1h_in1k', 'regnety_016': 'tv2_in1k',
    'convnext_tiny': 'in12k_ft_in1k', 'efficientnet_b0': 'ra4_e3600_r224_in1k', 'tf_efficientnet_lite0': 'in1k',
    'mobilenetv4_conv_small': 'e2400_r224_in1k'}
default_cfgs = generate_default_cfgs({
    'vt_net.untrained': _cfg(),
    **{name: cfg for trunk, tag in TRUNK_TAGS.items() for name, cfg in (
        (f'vt_{trunk}.trunk_{tag}', _trunk_cfg(f'{trunk}.{tag}')), (f'vt_{trunk}.untrained*', _cfg()))}})


def find_first_conv(model: VTNet, names: Union[str, Tuple[str, ...], None]) -> Optional[Tuple[str, ...]]:
    """Find the first convolutions by the names that timm has for them in the model that the trunk is cut from."""
    names = [names] if isinstance(names, str) else names or []
    prefix = f'trunk.{timms_modules(model.trunk)[0]}'
    flat = {name.replace('.', '_'): name for name, _ in model.named_modules()}
    return tuple(flat[f'{prefix}{name}'.replace('.', '_')] for name in names) or None


def _create_vt_net(variant: str, pretrained: bool = False, **kwargs: Any) -> VTNet:
    project_to_features(kwargs)
    if kwargs.get('features_only', False):
        kwargs.setdefault('out_indices', tuple(range(count_levels(kwargs['trunk']) + 1)))
    new = kwargs.get('pretrained_cfg') in (None, '', 'untrained')
    overlay = preprocessing(kwargs['trunk']) if new else {}
    overlay.update(kwargs.pop('pretrained_cfg_overlay', None) or {})
    model = build_model_with_cfg(
        VTNet,
        variant,
        pretrained,
        pretrained_cfg_overlay=overlay,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg=dict(feature_cls='getter'),
        **kwargs,
    )
    cfg = get_pretrained_cfg(kwargs['trunk'], allow_unregistered=True)
    if cfg is not None and not kwargs.get('features_only', False):
        model.pretrained_cfg['first_conv'] = find_first_conv(model, cfg.first_conv)
    model.creation_args = creation_args(kwargs, CREATION_ARGS)  # without drop rates, which belong to training
    return model


@register_model
def vt_net(pretrained: bool = False, **kwargs: Any) -> VTNet:
    """VT modules on a convolutional timm model, `trunk='regnety_016'`; `trunk_pretrained=True` loads its weights."""
    model_args = dict(trunk='resnet50d')
    return _create_vt_net('vt_net', pretrained, **dict(model_args, **kwargs))


@register_model
def vt_resnet50d(pretrained: bool = False, **kwargs: Any) -> VTNet:
    """Two VT modules after the trunk of timm's resnet50d."""
    model_args = dict(trunk='resnet50d')
    return _create_vt_net('vt_resnet50d', pretrained, **dict(model_args, **kwargs))


@register_model
def vt_resnext50_32x4d(pretrained: bool = False, **kwargs: Any) -> VTNet:
    """Two VT modules after the trunk of timm's resnext50_32x4d."""
    model_args = dict(trunk='resnext50_32x4d')
    return _create_vt_net('vt_resnext50_32x4d', pretrained, **dict(model_args, **kwargs))


@register_model
def vt_regnety_016(pretrained: bool = False, **kwargs: Any) -> VTNet:
    """Two VT modules after the trunk of timm's regnety_016."""
    model_args = dict(trunk='regnety_016')
    return _create_vt_net('vt_regnety_016', pretrained, **dict(model_args, **kwargs))


@register_model
def vt_convnext_tiny(pretrained: bool = False, **kwargs: Any) -> VTNet:
    """Two VT modules after the trunk of timm's convnext_tiny."""
    model_args = dict(trunk='convnext_tiny')
    return _create_vt_net('vt_convnext_tiny', pretrained, **dict(model_args, **kwargs))


@register_model
def vt_efficientnet_b0(pretrained: bool = False, **kwargs: Any) -> VTNet:
    """Two VT modules after the trunk of timm's efficientnet_b0."""
    model_args = dict(trunk='efficientnet_b0')
    return _create_vt_net('vt_efficientnet_b0', pretrained, **dict(model_args, **kwargs))


@register_model
def vt_tf_efficientnet_lite0(pretrained: bool = False, **kwargs: Any) -> VTNet:
    """Two VT modules after the trunk of timm's tf_efficientnet_lite0."""
    model_args = dict(trunk='tf_efficientnet_lite0')
    return _create_vt_net('vt_tf_efficientnet_lite0', pretrained, **dict(model_args, **kwargs))


@register_model
def vt_mobilenetv4_conv_small(pretrained: bool = False, **kwargs: Any) -> VTNet:
    """Two VT modules after the trunk of timm's mobilenetv4_conv_small."""
    model_args = dict(trunk='mobilenetv4_conv_small')
    return _create_vt_net('vt_mobilenetv4_conv_small', pretrained, **dict(model_args, **kwargs))
