"""VT-FPN and its baseline, the panoptic FPN

Paper: `Visual Transformers: Where Do Transformers Really Belong in Vision Models?` - https://arxiv.org/abs/2006.03677
Baseline: `Panoptic Feature Pyramid Networks` - https://arxiv.org/abs/1901.02446, as Detectron2's semantic FPN

Both are based on segmentation_models_pytorch's SegmentationModel and take any of its encoders, including timm's models
as 'tu-NAME'.
"""
import copy
import json
from pathlib import Path
from typing import Any, Optional, Type, Union

import torch
import torch.nn as nn
import torch.nn.functional as F
from huggingface_hub import ModelCard, ModelCardData
from segmentation_models_pytorch.base import SegmentationHead, SegmentationModel
from segmentation_models_pytorch.base.hub_mixin import supports_config_loading
from segmentation_models_pytorch.base.initialization import initialize_head
from segmentation_models_pytorch.base.modules import Activation
from segmentation_models_pytorch.encoders import get_encoder

from vt_zoo.inference import fold_neck, fold_norms
from vt_zoo.inference.blocks import reparameterize_blocks
from vt_zoo.layers import VTNeck
from vt_zoo.layers._checks import check_norm, check_positive

from .._asked import AsksModel
from .decoder import FPNNeck, PanopticDecoder

__all__ = ['VTFPN', 'PanopticFPN']


class PyramidModel(AsksModel, SegmentationModel):
    """An encoder, a neck over its maps of stride 4, 8, 16 and 32, and the head of the panoptic FPN.

    Images (B, in_channels, H, W) of any size become logits (B, classes, H, W). `from_pretrained` reads only safetensors
    and never fetches the encoder's pretrained weights, which the model's own would replace.
    """

    asked = 'decoder'
    requires_divisible_input_shape = False
    num_levels = 4

    def __init__(
            self,
            encoder_name: str,
            encoder_depth: int,
            encoder_weights: Optional[Union[str, bool]],
            in_channels: int,
            classes: int,
            activation: Optional[Union[str, Type[nn.Module]]],
            pyramid_channels: int,
            head_channels: int,
            neck: Type[nn.Module],
            neck_args: dict,
            encoder_args: dict,
    ) -> None:
        """
        Args:
            neck: Class of the neck.
            neck_args: Arguments of the neck, apart from the encoder's channels and `pyramid_channels`.
            encoder_args: Arguments of the encoder.
            The other arguments are those of `VTFPN`.
        """
        super().__init__()
        check_positive('in_channels', in_channels)
        check_positive('classes', classes)
        check_positive('pyramid_channels', pyramid_channels)
        check_positive('head_channels', head_channels, multiple_of=32)  # groups of the group norm
        if encoder_depth != 5:
            raise ValueError(
                f'encoder_depth must be 5, which gives maps of stride 4, 8, 16 and 32, got {encoder_depth!r}')
        self.encoder = get_encoder(
            encoder_name, in_channels=in_channels, depth=encoder_depth, weights=encoder_weights, **encoder_args)
        in_chs = self.encoder.out_channels[-self.num_levels:]
        self.decoder = PanopticDecoder(
            neck(in_chs, pyramid_channels, **neck_args), self.num_levels, pyramid_channels, head_channels)
        self.segmentation_head = SegmentationHead(head_channels, classes, kernel_size=1)
        self.activation = Activation(activation)
        self.classification_head = None
        self.name = f'{type(self).__name__.lower()}-{encoder_name}'
        initialize_head(self.segmentation_head)

    def reparameterize(self) -> None:
        """Turn the model, in place, into its inference form; timm's `reparameterize_model` does this to a copy.

        It is exact in eval mode, and a second call has no effect. Norms are folded into the maps before them, in the
        encoder too if torch.fx can trace it. If an error is raised, the model is left as it was.
        """
        encoder, neck = copy.deepcopy(self.encoder), self.decoder.neck
        reparameterize_blocks(encoder)
        fold_norms(encoder)
        neck = fold_neck(neck) if isinstance(neck, VTNeck) else neck
        self.encoder, self.decoder.neck = encoder, neck

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Segment images.

        Args:
            x: Images (B, in_channels, H, W), normalised as the encoder expects.

        Returns:
            Logits (B, classes, H, W), after `activation` if there is one.
        """
        logits = self.segmentation_head(self.decoder(self.encoder(x)))
        return self.activation(F.interpolate(logits, size=x.shape[-2:], mode='bilinear', align_corners=False))

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Union[str, Path], *, strict: bool = True, **kwargs: Any):
        """Load a model written by `save_pretrained` or `push_to_hub`.

        Args:
            pretrained_model_name_or_path: Folder, or repository on the hub.
            strict: Raise an error unless the names of the weights match the model's exactly.
            **kwargs: Arguments of huggingface_hub's `from_pretrained`, and model arguments that replace the saved ones.

        Returns:
            The model in eval mode.
        """
        kwargs.setdefault('encoder_weights', None)
        model = super().from_pretrained(pretrained_model_name_or_path, strict=strict, **kwargs)
        return model.eval()  # not every version of huggingface_hub does this

    def generate_model_card(self, dataset: Optional[str] = None, metrics: Optional[dict] = None, **kwargs) -> ModelCard:
        """Create the README.md that `save_pretrained` writes if there is none.

        Args:
            dataset: Data that the model was trained on.
            metrics: Names and values of the metrics measured on it.
        """
        data = ModelCardData(
            library_name='vt_zoo', license='apache-2.0', pipeline_tag='image-segmentation',
            tags=['semantic-segmentation', 'segmentation-models-pytorch', 'vt_zoo'])
        name = type(self).__name__
        arguments = {k: v for k, v in self.config.items() if not k.startswith('_')}
        measures = '\n'.join(f'- {k}: {v}' for k, v in (metrics or {}).items())
        return ModelCard(
            f'---\n{data.to_yaml()}\n---\n\n# {self.name}\n\n'
            f'{name} of [arXiv 2006.03677](https://arxiv.org/abs/2006.03677), made with vt_zoo.\n\n'
            f'```python\nfrom vt_zoo.models.vt_fpn import {name}\n\n'
            f"model = {name}.from_pretrained('<this repository or folder>')\n```\n\n"
            f'Data: {dataset or "not stated"}. Measures:\n\n{measures or "not stated"}\n\n'
            f'Arguments:\n\n```json\n{json.dumps(arguments, indent=2)}\n```\n')

    @classmethod
    def _load_as_pickle(cls, model, model_file, map_location, strict):
        raise ValueError(f'weights must be safetensors, the repository holds {Path(model_file).name}')


class VTFPN(PyramidModel):
    """VT-FPN (section 4 of the paper, Figure 4): one transformer relates the tokens of all levels of a pyramid.

    Arguments with the names of segmentation_models_pytorch mean the same as there. Its `upsampling` has no counterpart,
    since the logits always have the size of the image.
    """

    @supports_config_loading
    def __init__(
            self,
            encoder_name: str = 'tu-resnet50',
            encoder_depth: int = 5,
            encoder_weights: Optional[Union[str, bool]] = None,
            in_channels: int = 3,
            classes: int = 1,
            activation: Optional[Union[str, Type[nn.Module]]] = None,
            num_tokens: int = 8,
            token_dim: int = 1024,
            pyramid_channels: int = 256,
            head_channels: int = 128,
            norm_layer: str = 'batchnorm2d',
            **kwargs: Any,
    ) -> None:
        """
        Args:
            encoder_name: An encoder of segmentation_models_pytorch; 'tu-NAME' for the timm model NAME. The paper uses
                ResNet-50 and ResNet-101.
            encoder_depth: Number of stages of the encoder. Must be 5, which gives the four levels.
            encoder_weights: None for random weights. As in segmentation_models_pytorch, True (or any string) fetches
                the pretrained weights of a 'tu-' encoder; unlike there, the default is to fetch none.
            in_channels: Channels of the image.
            classes: Channels of the output. In the paper's counts, 54 for COCO-stuff and 20 for LIP.
            activation: Activation of the output, by its name in segmentation_models_pytorch; None for logits.
            num_tokens: Number of tokens of each level. The paper uses 8.
            token_dim: Channels of a token. The paper uses 1024.
            pyramid_channels: Channels of each level. 256 reproduces the paper's costs.
            head_channels: Channels of the head, a multiple of 32. 128 reproduces the paper's costs.
            norm_layer: timm's name of the norm in the neck. (The head has a group norm, like Detectron2's.)
            **kwargs: Arguments of the encoder.

        Raises:
            ValueError: An argument is not allowed.
        """
        check_positive('num_tokens', num_tokens)
        check_positive('token_dim', token_dim)
        if not isinstance(norm_layer, str):  # a class would not be saved
            raise ValueError(f"norm_layer must be timm's name of a norm, got {norm_layer!r}")
        check_norm(norm_layer)
        super().__init__(
            encoder_name, encoder_depth, encoder_weights, in_channels, classes, activation, pyramid_channels,
            head_channels, VTNeck, {'num_tokens': num_tokens, 'token_dim': token_dim, 'norm_layer': norm_layer}, kwargs)


class PanopticFPN(PyramidModel):
    """The paper's baseline: the panoptic FPN for semantic segmentation, with Detectron2's 3x3 output convolutions."""

    @supports_config_loading
    def __init__(
            self,
            encoder_name: str = 'tu-resnet50',
            encoder_depth: int = 5,
            encoder_weights: Optional[Union[str, bool]] = None,
            in_channels: int = 3,
            classes: int = 1,
            activation: Optional[Union[str, Type[nn.Module]]] = None,
            pyramid_channels: int = 256,
            head_channels: int = 128,
            **kwargs: Any,
    ) -> None:
        """See `VTFPN` for the arguments. There are no tokens, and there is no norm in the neck."""
        super().__init__(
            encoder_name, encoder_depth, encoder_weights, in_channels, classes, activation, pyramid_channels,
            head_channels, FPNNeck, {}, kwargs)
