"""VT-ResNet: a ResNet whose last stage is made of Visual Transformer modules

Paper: `Visual Transformers: Where Do Transformers Really Belong in Vision Models?` - https://arxiv.org/abs/2006.03677
    by Bichen Wu, Chenfeng Xu, Xiaoliang Dai, Alvin Wan, Peizhao Zhang, Zhicheng Yan, Masayoshi Tomizuka,
    Joseph Gonzalez, Kurt Keutzer, Peter Vajda

The authors published no code. This is an independent implementation based on timm's ResNet: the stem and stages 1 to 3
are timm's own modules under timm's own parameter names, and `vt_stage` replaces `layer4`.
"""
import logging
from pathlib import Path
from typing import Any, Dict, List, Optional, Tuple, Type, Union

import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.data import (
    IMAGENET_DEFAULT_MEAN,
    IMAGENET_DEFAULT_STD,
    IMAGENET_INCEPTION_MEAN,
    IMAGENET_INCEPTION_STD,
)
from timm.layers import LayerType, create_classifier
from timm.models import build_model_with_cfg, checkpoint_seq, generate_default_cfgs, register_model
from timm.models._features import feature_take_indices
from timm.models.resnet import BasicBlock, Bottleneck, ResNet

from vt_zoo.inference import InferenceStage, fold_norms
from vt_zoo.inference.fold import runs_alone
from vt_zoo.layers import VTStage
from vt_zoo.layers._checks import check_choice, check_positive

from ._classifier import HUB_FILE, PixelTokens, TokenClassifier, check_images, creation_args, project_to_features

__all__ = ['VTResNet']

_logger = logging.getLogger(__name__)

CREATION_ARGS = (  # arguments of timm's ResNet that a model must be created with for its weights to fit
    'layers', 'channels', 'cardinality', 'base_width', 'stem_width', 'stem_type', 'replace_stem_pool',
    'block_reduce_first', 'down_kernel_size', 'avg_down', 'block_args')

torch.fx.wrap('check_images')


class VTResNet(TokenClassifier, ResNet):
    """VT-ResNet (section 4 of the paper).

    As in a ResNet, there are five feature maps (`features_only=True` and `forward_intermediates()`): the stem, stages 1
    to 3 and the map refined by the VT stage, with reductions 2, 4, 8, 16, 32. The VT stage works at the stride of
    stage 3, so its map is max-pooled before it is returned (the paper mentions a "stage-5 max pooling"). This gives the
    pyramid that detection and segmentation libraries expect (segmentation_models_pytorch refuses 2, 4, 8, 16, 16).
    `output_stride=16` returns the refined map without pooling, so that reductions are 2, 4, 8, 16, 16, as in timm's
    ResNets with that option. Tokens and logits are the same either way.

    In classification nothing reads the map after the last VT module, so that module has no projector; with
    `features_only=True`, every module has one.
    """

    asked = 'vt_stage'

    def __init__(
            self,
            block: Union[Type[BasicBlock], Type[Bottleneck]],
            layers: Tuple[int, ...],
            num_classes: int = 1000,
            in_chans: int = 3,
            output_stride: int = 32,
            global_pool: str = 'avg',
            cardinality: int = 1,
            base_width: int = 64,
            stem_width: int = 64,
            stem_type: str = '',
            replace_stem_pool: bool = False,
            block_reduce_first: int = 1,
            down_kernel_size: int = 1,
            avg_down: bool = False,
            channels: Tuple[int, ...] = (64, 128, 256),
            feature_dim: int = 512,
            token_dim: int = 1024,
            projector: bool = True,
            last_projector: bool = False,
            act_layer: LayerType = nn.ReLU,
            norm_layer: LayerType = nn.BatchNorm2d,
            aa_layer: Optional[Type[nn.Module]] = None,
            drop_rate: float = 0.,
            drop_path_rate: float = 0.,
            drop_block_rate: float = 0.,
            zero_init_last: bool = True,
            block_args: Optional[Dict[str, Any]] = None,
            device=None,
            dtype=None,
            **stage_args,
    ) -> None:
        """
        Arguments not listed here are those of timm's ResNet and apply to the trunk.

        Args:
            block: Residual block of the trunk, timm's BasicBlock or Bottleneck.
            layers: Number of blocks in each of the trunk's three stages, then the number of VT modules.
            num_classes: Number of classes; 0 for no classifier, so that the output is the pooled tokens (B, CT).
            in_chans: Channels of the image.
            output_stride: Stride of the last feature map, 32, 16 or 8. Only 8 (dilated stage 3) changes the tokens.
            global_pool: Pooling over the tokens: 'avg' (the paper's), 'max', 'avgmax', 'catavgmax' or '' for none.
            channels: Widths of the three stages of the trunk, before the expansion of the block.
            feature_dim: Channels C_out of the feature map that the VT modules refine.
            token_dim: Channels CT of a token. The paper uses 1024 (section 4).
            projector: Write the tokens back to the map. If False, modules after the first work on tokens only
                (Table 7).
            last_projector: Give the last module a projector too; `features_only=True` sets this.
            act_layer: Activation of the trunk and the token transformers.
            norm_layer: Norm of the trunk and the VT modules.
            drop_rate: Dropout rate before the classifier.
            drop_path_rate: Stochastic depth rate, rising linearly from 0 over the trunk's blocks and the VT modules.
            zero_init_last: Start the residual branches of the trunk and the VT modules, and the filters made from
                tokens, at zero.
            **stage_args: Other arguments of `vt_zoo.layers.VTStage`: `num_tokens`, `tokenizer`, `recurrent`,
                `token_mixer`, and those of the paper's first version.

        Raises:
            ValueError: An argument is not allowed.
        """
        dd = {'device': device, 'dtype': dtype}
        check_choice('output_stride', output_stride, [8, 16, 32])
        check_choice('global_pool', global_pool, ['avg', 'max', 'avgmax', 'catavgmax', ''])
        check_positive('in_chans', in_chans)
        if len(layers) != 4 or len(channels) != 3:
            raise ValueError(
                f'layers must hold 4 numbers (three stages, VT modules), channels 3; got {layers!r} and {channels!r}')
        if last_projector and not projector:
            raise ValueError('last_projector=True needs projector=True, got projector=False')
        num_blocks, num_modules = sum(layers[:3]), layers[3]
        check_positive('layers[3]', num_modules)
        last_rate = drop_path_rate / max(num_blocks + num_modules - 1, 1)  # the rate of block i is i * last_rate
        super().__init__(
            block,
            layers[:3],
            num_classes=0,
            in_chans=in_chans,
            output_stride=output_stride,
            cardinality=cardinality,
            base_width=base_width,
            stem_width=stem_width,
            stem_type=stem_type,
            replace_stem_pool=replace_stem_pool,
            block_reduce_first=block_reduce_first,
            down_kernel_size=down_kernel_size,
            avg_down=avg_down,
            channels=channels,
            act_layer=act_layer,
            norm_layer=norm_layer,
            aa_layer=aa_layer,
            drop_rate=drop_rate,
            drop_path_rate=last_rate * (num_blocks - 1),
            drop_block_rate=drop_block_rate,
            zero_init_last=zero_init_last,
            block_args=block_args,
            **dd,
        )
        del self.global_pool, self.fc  # created again below, so that the classifier comes last

        self.in_chans = in_chans  # timm's ResNet has had it since 1.0.25
        self.output_stride = output_stride
        self.vt_stage = VTStage(
            self.num_features,
            feature_dim,
            num_modules,
            token_dim=token_dim,
            projector=projector,
            last_projector=last_projector,
            act_layer=act_layer,
            norm_layer=norm_layer,
            drop_path=[last_rate * (num_blocks + i) for i in range(num_modules)],
            zero_init_last=zero_init_last,
            **stage_args,
            **dd,
        )
        self.feature_info.append(dict(num_chs=self.vt_stage.out_chs, reduction=output_stride, module='vt_stage'))
        self.num_classes = num_classes
        self.num_features = token_dim
        self.global_pool, self.fc = create_classifier(token_dim, num_classes, pool_type=global_pool, **dd)
        self.head_hidden_size = token_dim * self.global_pool.feat_mult()

    @torch.jit.ignore
    def reparameterize(self) -> None:
        """Turn the model, in place, into its inference form; timm's `reparameterize_model` does this to a copy.

        It is exact in eval mode, and a second call has no effect. Norms are folded into the maps before them, in the
        trunk too; a norm that cannot be folded stays (see `vt_zoo.inference.stage`). If an error is raised, the model
        is left as it was.
        """
        stage = self.vt_stage
        if type(stage) is VTStage and runs_alone(stage):
            self.vt_stage = InferenceStage(stage)
        try:
            fold_norms(self)
        except BaseException:
            self.vt_stage = stage
            raise

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the activations of blocks and VT modules in the backward pass, or keep them."""
        super().set_grad_checkpointing(enable)
        self.vt_stage.grad_checkpointing = enable

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> Dict[str, str]:
        """Regular expressions that group the parameters by depth: by stage if `coarse`, otherwise by block."""
        return dict(
            stem=r'^conv1|bn1|maxpool',
            blocks=r'^layer(\d+)' if coarse else r'^layer(\d+)\.(\d+)',
            vt_stage=r'^vt_stage' if coarse else r'^vt_stage\.(\d+)',
        )

    def forward_intermediates(
            self,
            x: torch.Tensor,
            indices: Optional[Union[int, List[int]]] = None,
            norm: bool = False,
            stop_early: bool = False,
            output_fmt: str = 'NCHW',
            intermediates_only: bool = False,
    ) -> Union[List[torch.Tensor], Tuple[torch.Tensor, List[torch.Tensor]]]:
        """Forward pass that also returns feature maps.

        Args:
            x: Images (B, in_chans, H, W).
            indices: Which of the five maps to return: the last n if an int, all if None, those listed if a sequence.
            norm: Has no effect, as no norm follows the last map.
            stop_early: Stop after the last requested map.
            output_fmt: Must be 'NCHW'.
            intermediates_only: Return only the maps.

        Returns:
            The tokens (B, L, CT) and the list of maps, or only the list. If `stop_early` skips the VT stage, the pixels
            of the last stage that ran are returned in place of the tokens.
        """
        if output_fmt != 'NCHW':
            raise ValueError(f"output_fmt must be 'NCHW', got {output_fmt!r}")
        take_indices, max_index = feature_take_indices(5, indices)
        last_index = max_index if stop_early else 4

        x = self.act1(self.bn1(self.conv1(check_images(x, self.in_chans))))
        maps = [x]
        if last_index > 0:
            x = self.maxpool(x)
        for layer in (self.layer1, self.layer2, self.layer3)[:last_index]:
            x = checkpoint_seq(layer, x) if self.grad_checkpointing else layer(x)
            maps.append(x)
        tokens = x.flatten(2).transpose(1, 2)
        if last_index == 4:
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
        """Remove the layers that the given feature maps do not need.

        Args:
            indices: Maps to keep: the last n if an int, those listed if a sequence.
            prune_norm: Has no effect, as no norm follows the last map.
            prune_head: Remove the classifier.

        Returns:
            The indices of the maps that were kept.
        """
        take_indices, max_index = feature_take_indices(5, indices)
        for name in ('layer1', 'layer2', 'layer3')[max_index:]:
            setattr(self, name, nn.Sequential())
        if max_index == 0:
            self.maxpool = nn.Identity()
        if max_index < 4:
            self.vt_stage = PixelTokens()
            self.output_stride = 0  # nothing left to pool
            self.num_features = self.head_hidden_size = self.feature_info[max_index]['num_chs']
        if prune_head or max_index < 4:
            self.reset_classifier(0, '')
        return take_indices

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        """Map images (B, in_chans, H, W) to tokens (B, L, CT).

        Raises:
            ValueError: H or W is less than 32, or the number of channels is not `in_chans`.
        """
        return self.vt_stage(self._forward_trunk(x))[1]

    def _forward_trunk(self, x: torch.Tensor) -> torch.Tensor:
        """Map images (B, in_chans, H, W) to the feature map of stage 3 (B, C, H, W)."""
        x = check_images(x, self.in_chans)
        x = self.conv1(x)
        x = self.bn1(x)
        x = self.act1(x)
        x = self.maxpool(x)
        if self.grad_checkpointing and not torch.jit.is_scripting():
            x = checkpoint_seq([self.layer1, self.layer2, self.layer3], x, flatten=True)
        else:
            x = self.layer1(x)
            x = self.layer2(x)
            x = self.layer3(x)
        return x


def _keep_trunk(state_dict: Dict[str, torch.Tensor], model: nn.Module) -> Dict[str, torch.Tensor]:
    """Take the stem and stages 1 to 3 of a timm ResNet; the VT stage and the classifier keep the model's new weights.

    Raises:
        RuntimeError: The model's trunk is that of another ResNet.
    """
    own = model.state_dict()
    new = {k: v for k, v in own.items() if k.startswith(('vt_stage.', 'fc.'))}
    trunk = {k: v for k, v in state_dict.items() if not k.startswith(('layer4.', 'fc.'))}
    differing = sorted((own.keys() - new.keys()) ^ trunk.keys())
    if differing:
        raise RuntimeError(
            f'the ResNet of these weights has another trunk than this model: {len(differing)} names differ, the first '
            f'is {differing[0]}')
    _logger.warning('Only the trunk is pretrained: the VT stage and the classifier are new, train them.')
    return {**trunk, **new}


def checkpoint_filter_fn(state_dict: Dict[str, torch.Tensor], model: nn.Module) -> Dict[str, torch.Tensor]:
    """Return weights that fit the model, from its own or from those of a related model.

    From a timm ResNet the trunk is taken. A classifier and a feature extractor differ by the projector of the last
    module: if the weights have one that the model lacks, it is dropped; if the model has a new one, that starts at
    zero, so that the map passes through unchanged.
    """
    if any(k.startswith('layer4.') for k in state_dict):
        return _keep_trunk(state_dict, model)
    last = f'vt_stage.{len(model.vt_stage) - 1}.projector.'
    own = {k: v for k, v in model.state_dict().items() if k.startswith(last)}
    given = {k: v for k, v in state_dict.items() if k in own or not k.startswith(last)}
    return {**own, **given}


def _cfg(url: str = '', **kwargs) -> Dict[str, Any]:
    return {
        'url': url,
        'num_classes': 1000, 'input_size': (3, 224, 224), 'pool_size': None,
        'crop_pct': 0.875, 'interpolation': 'bilinear',
        'mean': IMAGENET_DEFAULT_MEAN, 'std': IMAGENET_DEFAULT_STD,
        'first_conv': 'conv1', 'classifier': 'fc',
        'license': 'apache-2.0', 'paper_ids': 'arXiv:2006.03677',
        'paper_name': 'Visual Transformers: Where Do Transformers Really Belong in Vision Models?',
        **kwargs
    }


def _trunk_cfg(resnet: str, **kwargs) -> Dict[str, Any]:
    """Config for the weights of a timm ResNet, of which only the trunk is used; the classifier still needs training."""
    return _cfg(
        hf_hub_id=f'timm/{resnet}', hf_hub_filename=HUB_FILE, interpolation='bicubic', crop_pct=0.95,
        **kwargs)


def _shipped(name: str) -> str:
    """File of the weights of that name in the package."""
    return str(Path(__file__).parents[1] / 'weights' / f'{name}.safetensors')


# The `untrained*` entries after the others keep timm from taking a trunk as the weights of a bare name. A trunk is
# named after its ResNet, one of the best of its depth in timm's results of August 2026 under a licence like ours.
default_cfgs = generate_default_cfgs({
    'vt_resnet18.trunk_a1_in1k': _trunk_cfg('resnet18.a1_in1k'),
    'vt_resnet18.untrained*': _cfg(),
    'vt_resnet34.trunk_ra4_e3600_r224_in1k': _trunk_cfg(
        'resnet34.ra4_e3600_r224_in1k', mean=IMAGENET_INCEPTION_MEAN, std=IMAGENET_INCEPTION_STD),
    'vt_resnet34.untrained*': _cfg(),
    'vt_resnet50.trunk_a1_in1k': _trunk_cfg('resnet50.a1_in1k'),
    'vt_resnet50.untrained*': _cfg(),
    'vt_resnet101.trunk_a1h_in1k': _trunk_cfg('resnet101.a1h_in1k'),
    'vt_resnet101.untrained*': _cfg(),
    'test_vt_resnet.digits': _cfg(
        file=_shipped('test_vt_resnet.digits'),
        input_size=(3, 64, 64), crop_pct=1.0, num_classes=10, label_names=tuple('0123456789'), license='cc-by-4.0',
        description="scikit-learn's digits: the test part of the UCI set Optical Recognition of Handwritten Digits, "
        'E. Alpaydin and C. Kaynak, 1998, CC BY 4.0'),
    'test_vt_resnet.cifar10': _cfg(
        file=_shipped('test_vt_resnet.cifar10'),
        input_size=(3, 128, 128), crop_pct=1.0, num_classes=10, license='other', label_names=(
            'airplane', 'automobile', 'bird', 'cat', 'deer', 'dog', 'frog', 'horse', 'ship', 'truck'),
        description='CIFAR-10 as JPEG files: A. Krizhevsky, Learning Multiple Layers of Features from Tiny Images, '
        '2009, research use'),
    'test_vt_resnet.untrained': _cfg(input_size=(3, 64, 64), crop_pct=1.0),
})


def _create_vt_resnet(variant: str, pretrained: bool = False, **kwargs) -> VTResNet:
    project_to_features(kwargs)
    model = build_model_with_cfg(
        VTResNet,
        variant,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg=dict(feature_cls='getter'),
        **kwargs,
    )
    model.creation_args = creation_args(kwargs, CREATION_ARGS)  # without drop rates, which belong to training
    return model


@register_model
def vt_resnet18(pretrained: bool = False, **kwargs) -> VTResNet:
    """VT-ResNet-18: 2 VT modules after the trunk of ResNet-18.

    `vt_resnet18.trunk_a1_in1k` is not a classifier yet: only its trunk is pretrained, everything after it is new.
    """
    model_args = dict(block=BasicBlock, layers=(2, 2, 2, 2), feature_dim=512)
    return _create_vt_resnet('vt_resnet18', pretrained, **dict(model_args, **kwargs))


@register_model
def vt_resnet34(pretrained: bool = False, **kwargs) -> VTResNet:
    """VT-ResNet-34: 3 VT modules after the trunk of ResNet-34.

    `vt_resnet34.trunk_ra4_e3600_r224_in1k` is not a classifier yet: only its trunk is pretrained, everything after it
    is new.
    """
    model_args = dict(block=BasicBlock, layers=(3, 4, 6, 3), feature_dim=512)
    return _create_vt_resnet('vt_resnet34', pretrained, **dict(model_args, **kwargs))


@register_model
def vt_resnet50(pretrained: bool = False, **kwargs) -> VTResNet:
    """VT-ResNet-50: 3 VT modules after the trunk of ResNet-50.

    `vt_resnet50.trunk_a1_in1k` is not a classifier yet: only its trunk is pretrained, everything after it is new.
    """
    model_args = dict(block=Bottleneck, layers=(3, 4, 6, 3), feature_dim=1024)
    return _create_vt_resnet('vt_resnet50', pretrained, **dict(model_args, **kwargs))


@register_model
def vt_resnet101(pretrained: bool = False, **kwargs) -> VTResNet:
    """VT-ResNet-101: 3 VT modules after the trunk of ResNet-101.

    `vt_resnet101.trunk_a1h_in1k` is not a classifier yet: only its trunk is pretrained, everything after it is new.
    """
    model_args = dict(block=Bottleneck, layers=(3, 4, 23, 3), feature_dim=1024)
    return _create_vt_resnet('vt_resnet101', pretrained, **dict(model_args, **kwargs))


@register_model
def test_vt_resnet(pretrained: bool = False, **kwargs) -> VTResNet:
    """A VT-ResNet with the same parts but fewer than 0.6 M parameters, for tests and demonstrations.

    Its weights, which recognise handwritten digits, come with the package.
    """
    model_args = dict(
        block=BasicBlock, layers=(1, 1, 1, 2), channels=(32, 48, 96), feature_dim=128, token_dim=128)
    return _create_vt_resnet('test_vt_resnet', pretrained, **dict(model_args, **kwargs))
