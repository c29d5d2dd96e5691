"""Settings of a training run: dataclasses whose fields are documented once, for recipes (YAML), CLI and docstrings."""
import copy
import inspect
import operator
import re
from dataclasses import MISSING, Field, dataclass, field, fields
from pathlib import Path
from typing import (
    Any,
    Callable,
    ClassVar,
    Dict,
    List,
    NamedTuple,
    Optional,
    Type,
    TypeVar,
    Union,
    get_args,
    get_origin,
    get_type_hints,
)

import yaml

from ..errors import MAX_INT, InputError, first_line, short
from ..files import check_regular
from ..recipes import list_recipes, recipe_path

MAX_LR = 1e6
# raised in reading YAML: for numbers with too many digits and invalid dates, for deeply nested lists, and YAML's own
YAML_ERRORS = (ValueError, RecursionError, yaml.YAMLError)

Kind = TypeVar('Kind', bound='Settings')


class Allowed(NamedTuple):
    """Values that a setting may have: a test, and the words that follow "must be" in a message."""
    accept: Callable[[Any], bool]
    words: str


def at_least(least: int, most: int = MAX_INT) -> Allowed:
    """Allow the numbers of a range."""
    return Allowed(lambda v: least <= v <= most, f'at least {least} and at most {most}')


def one_of(*names: str) -> Allowed:
    """Allow one of several words."""
    return Allowed(lambda v: v in names, f'one of {", ".join(names)}')


def ordered(words: str, least: float, most: float, inclusive: bool = False) -> Allowed:
    """Allow two numbers, the smaller one first, above `least`, or from it on if `inclusive`."""
    above, sign = (operator.le, '<=') if inclusive else (operator.lt, '<')
    return Allowed(
        lambda v: above(least, v[0]) and v[0] <= v[1] <= most,
        f'two {words}, {least} {sign} smallest <= largest <= {most}')


LEARNING_RATE = Allowed(lambda v: 0 < v <= MAX_LR, f'above 0 and at most {MAX_LR}')
SHARE = Allowed(lambda v: 0 <= v <= 1, 'from 0 to 1')
UNDER_ONE = Allowed(lambda v: 0 <= v < 1, 'from 0 to under 1')


def setting(
        default: Any,
        metavar: str,
        text: str,
        allowed: Optional[Allowed] = None,
        none: str = 'none',
        read: Optional[Callable[[Any], Any]] = None,
) -> Any:
    """Create a field of settings.

    Args:
        default: Default value.
        metavar: Placeholder for the value in `--help`.
        text: Description, for `--help` and the docstring.
        allowed: Allowed values; None for all values of its type. A field whose type includes None may always be None.
        none: What None means, in words.
        read: Converts a value from YAML, in place of the usual conversion to the field's type.
    """
    metadata = {'metavar': metavar, 'text': text, 'allowed': allowed, 'none': none, 'read': read}
    if isinstance(default, (dict, list)):
        return field(default_factory=lambda: copy.copy(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def shown_default(f: Field) -> str:
    """The default of a field, written as on the command line."""
    value = f.default_factory() if f.default is MISSING else f.default
    if value is None or value in ([], {}):
        return f.metadata['none']
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (list, tuple)):
        return ' '.join(f'{v:.3g}' for v in value)
    return str(value)


def documented(kind: Type[Kind]) -> Type[Kind]:
    """Add the fields of settings to their docstring, as its attributes."""
    lines = ['', 'Attributes:']
    for f in fields(kind):
        text = f.metadata['text']
        lines.append(f'    {f.name}: {text[0].upper()}{text[1:]} (default: {shown_default(f)}).')
    kind.__doc__ = '\n'.join([inspect.cleandoc(kind.__doc__ or ''), *lines])
    return kind


@dataclass
class Settings:
    """Settings that decide the outcome of a run; they are checked on creation.

    Raises:
        InputError: A value is not of its field's type, or not allowed.
    """
    COMMAND: ClassVar[str]  # the command whose options are the fields
    FOLDER: ClassVar[str]  # the folder of recipes that come with the package

    def __post_init__(self) -> None:
        types = get_type_hints(type(self))
        for f in fields(self):
            read, allowed = f.metadata['read'], f.metadata['allowed']
            given = getattr(self, f.name)
            value = read(given) if read else convert(f.name, given, types[f.name])
            if allowed and value is not None and not allowed.accept(value):
                raise InputError(f'{f.name} must be {allowed.words}, got {short(value)}')
            setattr(self, f.name, value)

    @classmethod
    def recipes(cls) -> List[str]:
        """Names of the recipes that come with the package."""
        return list_recipes(cls.FOLDER)

    @classmethod
    def read(cls: Type[Kind], config: Optional[str] = None, overrides: Optional[Dict[str, Any]] = None) -> Kind:
        """Read a recipe.

        Args:
            config: A YAML file of fields and values, the name of a recipe that comes with the package, or None.
            overrides: Values that replace the recipe's.

        Raises:
            InputError: There is no such recipe, it is not YAML, or it has an unknown field or a value that is not
                allowed.
        """
        values = {**(_read_recipe(cls, config) if config is not None else {}), **(overrides or {})}
        names = {f.name for f in fields(cls)}
        for name in values:
            if name not in names:
                raise InputError(
                    f'config {config} has the unknown field {name!r}; the options of `{cls.COMMAND}` are the fields')
        return cls(**values)


def _read_recipe(kind: Type[Settings], config: str) -> Dict[str, Any]:
    names = kind.recipes()
    path = recipe_path(config, kind.FOLDER) if config in names else Path(config)
    check_regular(path, 'config')
    try:
        values = read_yaml(path.read_text(encoding='utf-8')) or {}
    except FileNotFoundError:
        raise InputError(f'config {config} is neither a file nor one of {", ".join(names)}') from None
    except (OSError, *YAML_ERRORS) as e:
        raise InputError(f'config {path} cannot be read: {first_line(e)}') from e
    if not isinstance(values, dict):
        raise InputError(f'config {path} must hold fields and values, such as `lr: 0.01`')
    return values


class _Loader(yaml.SafeLoader):
    """YAML loader that reads plain words as YAML 1.2 does: `no` stays a word, and 1e-3 is a number."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, regexp) for tag, regexp in resolvers if not tag.endswith((':bool', ':float'))]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()}
_Loader.add_implicit_resolver('tag:yaml.org,2002:bool', re.compile('(true|True|false|False)$'), list('tTfF'))
_Loader.add_implicit_resolver(
    'tag:yaml.org,2002:float',
    re.compile(r'[-+]?(\.\d+|\d+\.\d*|\d+(?=[eE]))([eE][-+]?\d+)?$|[-+]?\.(inf|Inf|INF)$|\.(nan|NaN|NAN)$'),
    list('-+.0123456789'))


def read_yaml(text: str) -> Any:
    """Parse a YAML text."""
    return yaml.load(text, _Loader)


def convert(name: str, value: Any, kind: Any) -> Any:
    """Convert a YAML value to the type of its field: whole numbers are accepted as floats, and lists as tuples.

    Raises:
        InputError: The value is not of that type.
    """
    arguments = get_args(kind)
    if get_origin(kind) is Union:
        if value is None and type(None) in arguments:
            return None
        kinds = [a for a in arguments if a is not type(None)]
        kind = next((k for k in kinds if (get_origin(k) is tuple) == isinstance(value, (list, tuple))), kinds[0])
        return convert(name, value, kind)
    if get_origin(kind) in (tuple, list) and isinstance(value, (list, tuple)):
        length = len(arguments) if get_origin(kind) is tuple else len(value)
        if len(value) == length:
            return get_origin(kind)(convert(name, v, arguments[i % len(arguments)]) for i, v in enumerate(value))
    if kind is float and isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2 ** 1000:
        return float(value)
    if get_origin(kind) is None and type(value) is kind:
        return value
    allowed = {int: 'a whole number', float: 'a number', bool: 'true or false', str: 'a word'}.get(
        kind, f'a list of {len(arguments)} numbers' if get_origin(kind) is tuple else 'a list of whole numbers')
    raise InputError(f'{name} must be {allowed}, got {short(value)}')
