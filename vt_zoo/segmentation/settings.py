"""Settings of a training run, and their YAML files (recipes)."""
import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Dict, List, Optional, Tuple, Union, get_args, get_origin, get_type_hints

import yaml

from ..data.label_map import read_label_map
from ..errors import MAX_INT, MAX_PIXELS, MAX_SIDE, InputError, first_line, short
from ..files import check_regular

__all__ = ['SegmentSettings', 'list_segmentation_recipes', 'read_settings']

ARCHITECTURES = ('vt_fpn', 'panoptic_fpn')
SCHEDULES = ('multistep', 'poly', 'cosine')
PRECISIONS = ('no', 'bf16', 'fp16')
MAX_WIDTH = 4096  # of what a layer computes
MAX_SCALE = 16
MAX_LR = 1e6
MAX_POWER = 100
MIN_STD, MAX_STD = 0.001, 10  # of images with values from 0 to 1
# of reading YAML: numbers of too many digits and dates that are none, lists in lists in lists, and its own
YAML_ERRORS = (ValueError, RecursionError, yaml.YAMLError)
RECIPES = Path(__file__).parents[1] / 'recipes' / 'segmentation'


@dataclass
class SegmentSettings:
    """What decides the outcome of a run.

    The optimizer is the paper's (section 5.3: SGD; its momentum 0.9 is Detectron2's); the defaults of rate, batch and
    length are for small sets. Counts are iterations, not epochs, as in Detectron2.
    """
    format: str = 'folder'
    label_map: Optional[Dict[Union[int, str], int]] = None  # class of each grey value or colour 'R,G,B' of the masks
    arch: str = 'vt_fpn'
    encoder_name: str = 'tu-resnet50'
    encoder_weights: bool = False  # fetch the encoder's pretrained weights
    num_tokens: int = 8
    token_dim: int = 1024
    pyramid_channels: int = 256
    head_channels: int = 128
    iterations: int = 2000
    batch_size: int = 16  # of all processes together
    opt: str = 'momentum'
    lr: float = 0.01
    momentum: float = 0.9
    weight_decay: float = 1e-4
    schedule: str = 'poly'
    steps: List[int] = field(default_factory=list)  # of 'multistep': iterations at which the rate falls to a tenth
    power: float = 0.9  # of 'poly'
    warmup: int = 0  # iterations of rising rate
    crop_size: Tuple[int, int] = (512, 512)  # height, width
    scale: Tuple[float, float] = (0.5, 2.0)
    hflip: float = 0.5
    mean: Optional[Tuple[float, float, float]] = None  # the encoder's own
    std: Optional[Tuple[float, float, float]] = None
    eval_size: Optional[Union[int, Tuple[int, int]]] = None  # short side, or height and width; images as they are
    eval_every: int = 1000
    checkpoint_every: int = 500
    ema_decay: float = 0.  # 0 for no moving average
    precision: str = 'no'
    seed: int = 0

    def __post_init__(self) -> None:
        self.label_map = read_label_map(self.label_map)
        _check_choice('arch', self.arch, ARCHITECTURES)
        _check_choice('schedule', self.schedule, SCHEDULES)
        _check_choice('precision', self.precision, PRECISIONS)
        for name in ('iterations', 'batch_size', 'eval_every', 'checkpoint_every'):
            _check(name, getattr(self, name), 1 <= getattr(self, name) <= MAX_INT, f'at least 1 and at most {MAX_INT}')
        for name in ('num_tokens', 'token_dim', 'pyramid_channels'):
            _check(name, getattr(self, name), 1 <= getattr(self, name) <= MAX_WIDTH,
                   f'at least 1 and at most {MAX_WIDTH}')
        _check('head_channels', self.head_channels,
               32 <= self.head_channels <= MAX_WIDTH and self.head_channels % 32 == 0,
               f'a multiple of 32 and at most {MAX_WIDTH}')
        _check('warmup', self.warmup, 0 <= self.warmup <= MAX_INT, f'at least 0 and at most {MAX_INT}')
        _check('seed', self.seed, 0 <= self.seed < 2 ** 63, 'from 0 to under 2 ** 63')
        _check('lr', self.lr, 0 < self.lr <= MAX_LR, f'above 0 and at most {MAX_LR}')
        _check('steps', self.steps, all(1 <= step <= MAX_INT for step in self.steps),
               f'iterations of at least 1 and at most {MAX_INT}')
        _check('power', self.power, 0 <= self.power <= MAX_POWER, f'at least 0 and at most {MAX_POWER}')
        for name in ('momentum', 'weight_decay', 'ema_decay'):
            _check(name, getattr(self, name), 0 <= getattr(self, name) < 1, 'from 0 to under 1')
        _check('hflip', self.hflip, 0 <= self.hflip <= 1, 'from 0 to 1')
        _check('scale', self.scale, 0 < self.scale[0] <= self.scale[1] <= MAX_SCALE,
               f'two factors, 0 < smallest <= largest <= {MAX_SCALE}')
        _check('crop_size', self.crop_size, min(self.crop_size) >= 1 and max(self.crop_size) <= MAX_SIDE,
               f'a height and a width of at least 1 and at most {MAX_SIDE}')
        _check('batch_size', self.batch_size, self.batch_size * math.prod(self.crop_size) <= MAX_PIXELS,
               f'at most {MAX_PIXELS // math.prod(self.crop_size)} for crops of this size')
        _check('mean', self.mean, self.mean is None or all(0 <= value <= 1 for value in self.mean), 'from 0 to 1')
        _check('std', self.std, self.std is None or all(MIN_STD <= value <= MAX_STD for value in self.std),
               f'above 0: from {MIN_STD} to {MAX_STD}')
        size = self.eval_size if isinstance(self.eval_size, tuple) else (self.eval_size,)
        _check('eval_size', self.eval_size, size == (None,) or (min(size) >= 1 and max(size) <= MAX_SIDE),
               f'a short side, or a height and a width, of at least 1 and at most {MAX_SIDE}')


def _check_choice(name: str, value: Any, choices: Tuple[str, ...]) -> None:
    _check(name, value, value in choices, f'one of {", ".join(choices)}')


def _check(name: str, value: Any, good: bool, allowed: str) -> None:
    if not good:
        raise InputError(f'{name} must be {allowed}, got {short(value)}')


class _Loader(yaml.SafeLoader):
    """Reads plain words as YAML 1.2 does: `no` stays a word, and 1e-3 is a number."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, regexp) for tag, regexp in resolvers if not tag.endswith((':bool', ':float'))]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()}
_Loader.add_implicit_resolver('tag:yaml.org,2002:bool', re.compile('(true|True|false|False)$'), list('tTfF'))
_Loader.add_implicit_resolver(
    'tag:yaml.org,2002:float',
    re.compile(r'[-+]?(\.\d+|\d+\.\d*|\d+(?=[eE]))([eE][-+]?\d+)?$|[-+]?\.(inf|Inf|INF)$|\.(nan|NaN|NAN)$'),
    list('-+.0123456789'))


def read_yaml(text: str) -> Any:
    """The value of a YAML text."""
    return yaml.load(text, _Loader)


def list_segmentation_recipes() -> List[str]:
    """Names of the recipes that come with the package."""
    return sorted(path.stem for path in RECIPES.glob('*.yaml'))


def read_settings(config: Optional[str], overrides: Optional[Dict[str, Any]] = None) -> SegmentSettings:
    """Read a recipe.

    Args:
        config: A YAML file with fields of `SegmentSettings`, the name of a recipe that comes with the package, or None.
        overrides: Fields that replace the recipe's.

    Raises:
        InputError: There is no such recipe, it is not YAML, or it has an unknown field or a value that is not allowed.
    """
    values = {}
    if config is not None:
        path = RECIPES / f'{config}.yaml' if config in list_segmentation_recipes() else Path(config)
        check_regular(path, 'config')
        try:
            values = read_yaml(path.read_text(encoding='utf-8')) or {}
        except FileNotFoundError:
            names = ', '.join(list_segmentation_recipes())
            raise InputError(f'config {config} is neither a file nor one of {names}') from None
        except (OSError, *YAML_ERRORS) as e:
            raise InputError(f'config {path} cannot be read: {first_line(e)}') from e
        if not isinstance(values, dict):
            raise InputError(f'config {path} must hold fields and values, as `lr: 0.01`')
    values.update(overrides or {})
    types = get_type_hints(SegmentSettings)
    for name, value in values.items():
        if name not in types:
            raise InputError(
                f'config {config} has the unknown field {name!r}; the options of `vt-zoo segment train` are the fields')
        values[name] = _convert(name, value, types[name])
    return SegmentSettings(**values)


def _convert(name: str, value: Any, kind: Any) -> Any:
    """A value of YAML as the type of its field: whole numbers may stand for floats, lists for tuples."""
    arguments = get_args(kind)
    if get_origin(kind) is Union:
        if value is None and type(None) in arguments:
            return None
        kinds = [a for a in arguments if a is not type(None)]
        kind = next((k for k in kinds if (get_origin(k) is tuple) == isinstance(value, (list, tuple))), kinds[0])
        return _convert(name, value, kind)
    if get_origin(kind) in (tuple, list) and isinstance(value, (list, tuple)):
        length = len(arguments) if get_origin(kind) is tuple else len(value)
        if len(value) == length:
            return get_origin(kind)(_convert(name, v, arguments[i % len(arguments)]) for i, v in enumerate(value))
    if get_origin(kind) is dict:
        return read_label_map(value)
    if kind is float and isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2 ** 1000:
        return float(value)
    if get_origin(kind) is None and type(value) is kind:
        return value
    allowed = {int: 'a whole number', float: 'a number', bool: 'true or false', str: 'a word'}.get(
        kind, f'a list of {len(arguments)} numbers' if get_origin(kind) is tuple else 'a list of whole numbers')
    raise InputError(f'{name} must be {allowed}, got {short(value)}')
