"""The parts of a Visual Transformer module, one concept a file."""
from .linear import PixelLinear, TokenLinear, TokenNorm, create_logit_norm, pixel_groups
from .projector import Projector
from .tokenizer import FilterTokenizer, RecurrentTokenizer
from .transformer import TokenTransformer
from .vt_module import VTModule
