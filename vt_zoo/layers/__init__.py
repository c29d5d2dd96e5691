"""The parts of a Visual Transformer module, one concept a file."""
from .fold import Reparameterizer, fold_norms
from .kmeans import KMeans
from .linear import (
    GroupedTokenLinear,
    PixelLinear,
    TokenLinear,
    TokenNorm,
    create_logit_norm,
    merge_heads,
    pixel_groups,
    split_heads,
)
from .position_code import PositionCode
from .projector import Projector
from .token_map import GroupedTokenMap, TokenAffine
from .token_mixer import GraphMixer, LinearMixer
from .tokenizer import ClusteringTokenizer, FilterTokenizer, PoolingTokenizer, RecurrentTokenizer, token_grid
from .transformer import TokenTransformer
from .vt_module import DynamicVTModule, TokenModule, VTModule
from .vt_neck import VTNeck
