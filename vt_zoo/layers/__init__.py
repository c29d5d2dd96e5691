"""The equations of the paper as modules, one concept a file."""
import importlib
import warnings
from typing import Any

from .projector import Projector
from .token_mixer import GraphMixer, LinearMixer
from .tokenizer import ClusteringTokenizer, FilterTokenizer, PoolingTokenizer, RecurrentTokenizer
from .transformer import TokenTransformer
from .vt_module import DynamicVTModule, TokenModule, VTModule
from .vt_neck import VTNeck
from .vt_stage import VTStage

__all__ = [
    'ClusteringTokenizer', 'DynamicVTModule', 'FilterTokenizer', 'GraphMixer', 'LinearMixer', 'PoolingTokenizer',
    'Projector', 'RecurrentTokenizer', 'TokenModule', 'TokenTransformer', 'VTModule', 'VTNeck', 'VTStage']

_MOVED = {  # names of 0.1, and their modules
    'KMeans': 'kmeans', 'PixelLinear': 'linear', 'PositionCode': 'position_code', 'TokenLinear': 'linear',
    'TokenNorm': 'linear', 'create_logit_norm': 'linear', 'merge_heads': 'attention', 'pixel_groups': 'linear',
    'split_heads': 'attention', 'token_grid': 'tokenizer'}


def __getattr__(name: str) -> Any:
    if name not in _MOVED:
        raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
    module = f'{__name__}.{_MOVED[name]}'
    warnings.warn(f'{name} is in {module} since vt_zoo 0.2', DeprecationWarning, stacklevel=2)
    return getattr(importlib.import_module(module), name)
