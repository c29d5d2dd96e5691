"""The paper's equations as modules, one concept per file."""
from .._moved import old_names
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

__getattr__ = old_names(__name__)
