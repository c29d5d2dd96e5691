"""Loading classifiers and segmenters, with everything needed to use them, from names, folders and the hub."""
import contextlib
import io
import json
import warnings
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional, Sequence, Tuple, Union

import torch
import torch.nn as nn
from huggingface_hub import hf_hub_download
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from timm.data import resolve_data_config
from timm.models import create_model, get_pretrained_cfg, is_model

from .._requirements import timm_is_at_least
from ..data.images import image_transform, prepare_image, to_eval_size
from ..data.label_map import read_label_map
from ..errors import InputError, first_line
from ..files import check_regular
from ..layers.linear import OF_0_1
from ..models import segmenter_classes
from .hub import WEIGHTS, download_weights, find_hub_id, hub_reason

__all__ = ['Loaded', 'load', 'load_model']

CLASSIFICATION, SEGMENTATION = 'classification', 'segmentation'
KINDS = {CLASSIFICATION: 'a classifier', SEGMENTATION: 'a segmenter'}
SHARD_INDEX = f'{WEIGHTS}.index.json'


@dataclass
class Loaded:
    """A model with its weights, and everything needed to use it.

    Attributes:
        model: The model, in eval mode. A classifier returns one logit per class (B, classes), a segmenter one per class
            and pixel (B, classes, H, W).
        task: 'classification' or 'segmentation'.
        classes: Names of the classes, in the order of the logits.
        preprocessing: What `prepare` does, in timm's terms: `input_size` (C, H, W), where H and W are None if images
            keep their size or are resized to a `short_side`; `interpolation`, `crop_pct`, `crop_mode`, `mean`, `std`.
        label_map: Label map of the masks that a segmenter was trained on; None if they hold class indices.
    """
    model: nn.Module
    task: str
    classes: List[str]
    preprocessing: Dict[str, Any]
    label_map: Optional[Dict[Union[int, str], int]] = None

    @property
    def input_size(self) -> Tuple[int, Optional[int], Optional[int]]:
        """Channels, height and width of the model's input; height and width are None if any will do."""
        return tuple(self.preprocessing['input_size'])

    @property
    def eval_size(self) -> Optional[Union[int, Tuple[int, int]]]:
        """Short side, or height and width, to which a segmenter's images are resized; None for no resizing."""
        return _eval_size(self.preprocessing)

    @cached_property
    def prepare(self) -> Callable[[Image.Image], torch.Tensor]:
        """Function that turns a PIL image into a normalised tensor (C, H, W); see `create_prepare`."""
        return create_prepare(self.preprocessing)

    def shown(self, x: torch.Tensor) -> Image.Image:
        """Convert a prepared tensor (C, H, W) back to an image, which shows what the model sees."""
        mean, std = (torch.tensor(self.preprocessing[key])[:, None, None] for key in ('mean', 'std'))
        pixels = ((x * std + mean).clamp(0, 1) * 255).round().to(torch.uint8)
        return Image.fromarray(pixels.expand(3, -1, -1).permute(1, 2, 0).numpy())


def _eval_size(preprocessing: Dict[str, Any]) -> Optional[Union[int, Tuple[int, int]]]:
    size = tuple(preprocessing['input_size'][1:])
    return preprocessing['short_side'] if None in size else size


def create_prepare(preprocessing: Dict[str, Any]) -> Callable[[Image.Image], torch.Tensor]:
    """Create `Loaded.prepare` from `Loaded.preprocessing`.

    Raises:
        InputError: The number of channels is neither 1 nor 3.
    """
    if 'short_side' not in preprocessing:
        return image_transform(preprocessing)
    eval_size = _eval_size(preprocessing)

    def prepare(image: Image.Image) -> torch.Tensor:
        return to_eval_size(prepare_image(image, preprocessing['mean'], preprocessing['std'])[None], eval_size)[0]
    return prepare


def load(name_or_dir: Union[str, Path], task: Optional[str] = None) -> Loaded:
    """Load a classifier or a segmenter with its weights.

    Args:
        name_or_dir: Name of a timm model that has weights, e.g. 'test_vt_resnet.digits'; `hf-hub:ORG/NAME`; or a folder
            in timm's hub layout, or one written by `vt-zoo finetune`, `vt-zoo segment train` (whose last model is
            taken), `vt-zoo publish` or `vt-zoo convert`.
        task: 'classification' or 'segmentation' to accept only such a model; None for either.

    Raises:
        InputError: There is no such model, it is for another task, its weights are missing, damaged or those of another
            model, the numbers of classes and class names differ, or what segmentation needs is not installed.
    """
    name = str(name_or_dir)
    folder = find_model(Path(name.removeprefix('local-dir:')))
    if not folder.is_dir() and name.startswith('hf-hub:'):
        folder = _segmenter_of_hub(name) or folder
    found = task_of(folder) if folder.is_dir() or task == SEGMENTATION else CLASSIFICATION
    if task and found not in (task, None):
        raise InputError(f'model {name} is {KINDS[found]}, but {KINDS[task]} is needed')
    if (found or task) == SEGMENTATION:
        return _load_segmenter(folder)
    return as_classifier(load_model(str(folder) if folder.is_dir() else name), name)


def as_classifier(model: nn.Module, name: str) -> Loaded:
    """Wrap a timm classifier as `Loaded`, with class names and preprocessing from its config.

    Args:
        model: The model, in eval mode.
        name: Name of the model in error messages.

    Raises:
        InputError: The numbers of classes and class names differ.
    """
    classes = [str(n) for n in _label_names(model) or range(model.num_classes)]
    _check_names(f'model {name}', model.num_classes, classes)
    return Loaded(model, CLASSIFICATION, classes, resolve_data_config({}, model=model))


def _check_names(whose: str, num_classes: int, names: Sequence[str]) -> None:
    """Raise InputError unless each class has a name."""
    if len(names) != num_classes:
        raise InputError(f'{whose} has {num_classes} classes, its config.json names {len(names)}')


def _label_names(model: nn.Module) -> Optional[Sequence[str]]:
    """Class names in a model's config, unless they belong to registered weights that have other classes.

    timm before 1.0.31 leaves such names in the config of a model that was created from those weights.
    """
    names = model.pretrained_cfg.get('label_names')
    registered = get_pretrained_cfg(model.pretrained_cfg.get('architecture', ''))
    if names and len(names) != model.num_classes and registered and tuple(names) == registered.label_names:
        return None
    return names


def find_model(folder: Path) -> Path:
    """Return the folder of a run's model, `model` or `last`, if this is the folder of a run; else the folder itself."""
    runs_models = [folder / name for name in ('model', 'last') if (folder / name / 'config.json').is_file()]
    return runs_models[0] if runs_models and not (folder / 'config.json').exists() else folder


def task_of(folder: Path) -> Optional[str]:
    """The task of the model in a folder; None if its config.json does not say."""
    check_regular(folder / 'config.json', 'file')
    try:
        config = json.loads((folder / 'config.json').read_text(encoding='utf-8'))
        return SEGMENTATION if '_model_class' in config else CLASSIFICATION if 'architecture' in config else None
    except (OSError, ValueError, TypeError):
        return None


def _segmenter_of_hub(name: str) -> Optional[Path]:
    """Folder in the client's cache with a segmenter of the hub; None if there is none or it is not available."""
    hub_id = find_hub_id(name)
    repo_id, _, revision = hub_id.partition('@')
    try:
        folder = Path(hf_hub_download(repo_id, 'config.json', revision=revision or None)).parent
    except Exception:  # the client raises its own errors, the system's and those of its HTTP library
        return None  # loading it as a classifier gives a better error
    if task_of(folder) != SEGMENTATION:
        return None
    try:
        return download_weights(hub_id).parent
    except Exception as e:
        raise InputError(f'model {name} cannot be loaded: {hub_reason(e)}') from e


def _load_segmenter(path: Path) -> Loaded:
    """Load a segmenter from a folder written by `write_segmenter`."""
    for name in ('config.json', WEIGHTS):
        if not (path / name).is_file():
            raise InputError(f'model folder {path} holds no {name}' if path.is_dir() else
                             f'model folder {path} does not exist')
    kinds = {kind.__name__: kind for kind in segmenter_classes().values()}
    try:
        config = json.loads((path / 'config.json').read_text(encoding='utf-8'))
        kind = config['_model_class']
        if kind not in kinds:
            raise InputError(f'model folder {path} holds a {kind}, allowed are {", ".join(kinds)}')
        # huggingface_hub prints that it loads; segmentation_models_pytorch warns about each tensor before it raises
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter('ignore')
            model = kinds[kind].from_pretrained(path)
        classes, size = list(config['_classes']), config['_eval_size']
        mean, std = (tuple(map(float, config[name])) for name in ('_mean', '_std'))
        label_map = read_label_map(config.get('_label_map'))
    except InputError:
        raise
    except KeyError as e:
        raise InputError(f'config.json of model folder {path} has no {e}: it is not by `vt-zoo segment train`') from e
    except Exception as e:  # a damaged file makes the libraries raise nearly anything
        reason = why_weights_do_not_fit(e) if 'loading state_dict' in str(e) else first_line(e)
        raise InputError(f'model folder {path} cannot be loaded: {reason}') from e
    _check_names(f'model folder {path}', model.config['classes'], classes)
    preprocessing = {
        'input_size': (len(mean), *(size if isinstance(size, list) else (None, None))),
        'short_side': None if isinstance(size, list) else size, 'interpolation': 'bilinear', 'crop_pct': 1.0,
        'crop_mode': 'squash', 'mean': mean, 'std': std}
    return Loaded(model, SEGMENTATION, classes, preprocessing, label_map)


def _read_shard_index(folder: Path) -> Dict[str, str]:
    shards = json.loads((folder / SHARD_INDEX).read_text(encoding='utf-8'))['weight_map']
    if not all(Path(shard).name == shard for shard in shards.values()):
        raise InputError(f'{SHARD_INDEX} names files outside of the folder')
    return shards


def _check_dtypes(files: List[Path], model: nn.Module) -> None:
    """Raise InputError if a file has integers for floating-point weights, which torch would convert silently."""
    own = model.state_dict()
    for file in files:
        with safe_open(file, framework='pt') as f:
            for name in f.keys():  # noqa: SIM118
                dtype = f.get_slice(name).get_dtype()
                if name in own and own[name].is_floating_point() and not dtype.startswith(('F', 'BF')):
                    raise InputError(f'its weights {name} are of type {dtype}, which is not floating point')


def _folder_weights(folder: Path) -> List[Path]:
    """Files with a folder's weights: a single one, or its shards."""
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    if (folder / SHARD_INDEX).is_file():
        return [folder / shard for shard in sorted(set(_read_shard_index(folder).values()))]
    raise InputError(f'it holds no {WEIGHTS}')


def load_model(name_or_dir: str, **kwargs) -> nn.Module:
    """Create a timm model with its weights.

    Args:
        name_or_dir: Folder in timm's hub layout, whose weights may be in shards; `hf-hub:org/name`, whose weights are
            checked against the SHA-256 that the hub gives for them; or a registered name with weights.
        **kwargs: Arguments of `timm.create_model`.

    Returns:
        The model in eval mode.

    Raises:
        InputError: There is no such model or folder, or its weights are missing, damaged or do not fit the model.
    """
    folder = Path(name_or_dir.removeprefix('local-dir:'))
    source = f'local-dir:{folder}' if folder.is_dir() else name_or_dir
    if ':' not in source:
        check_name(source)
    try:
        if folder.is_dir():
            files = _folder_weights(folder)
            for file in (folder / 'config.json', *files):
                check_regular(file, 'file')
        else:
            hub_id = find_hub_id(source)
            files = [download_weights(hub_id, kwargs.get('cache_dir'))] if hub_id else []
        if files:  # do not leave this to timm, which before 1.0.31 unpickles what it finds in a folder
            tensors = {name: tensor for file in files for name, tensor in load_file(file).items()}
            kwargs['pretrained_cfg_overlay'] = {'source': '', 'state_dict': tensors}
        # timm before 1.0.31 assumes that weights are for 3 channels, and starts anew any that it then cannot adapt
        as_they_are = bool(files) and not timm_is_at_least('1.0.31') and kwargs.get('in_chans') is None
        if as_they_are:
            kwargs['pretrained_cfg_overlay']['first_conv'] = None
        model = create_model(source, pretrained=True, **kwargs).eval()
        if as_they_are:
            model.pretrained_cfg['first_conv'] = get_pretrained_cfg(model.pretrained_cfg['architecture']).first_conv
        model.pretrained_cfg.pop('state_dict', None)
        _check_dtypes(files, model)
        return model
    except InputError as e:
        raise InputError(f'model {name_or_dir} cannot be loaded: {e}') from e
    except Exception as e:  # a damaged config.json makes timm raise nearly anything
        reason = hub_reason(e)
        if 'loading state_dict' in reason:
            reason = why_weights_do_not_fit(e)
        raise InputError(f'model {name_or_dir} cannot be loaded: {reason}') from e


def why_weights_do_not_fit(error: Exception) -> str:
    """Say why weights do not fit a model, given the error that load_state_dict raised."""
    return OF_0_1 if OF_0_1 in str(error) else 'its weights are those of another model'


def check_input_size(model: nn.Module, input_size: Sequence[int], name: str) -> Any:
    """Return the model's output for one image of size (C, H, W), or raise InputError if it does not take that size."""
    parameter = next(model.parameters())
    try:
        with torch.no_grad():
            return model.eval()(torch.zeros(1, *input_size, device=parameter.device, dtype=parameter.dtype))
    except (RuntimeError, ValueError, AssertionError) as e:
        size = 'x'.join(str(n) for n in input_size)
        raise InputError(f'model {name} does not take images of {size}: {first_line(e)}') from e


def check_logits(model: nn.Module, input_size: Sequence[int], name: str) -> None:
    """Raise InputError if a model does not take images of size (C, H, W), or gives something else than class logits."""
    logits = check_input_size(model, input_size, name)
    if not isinstance(logits, torch.Tensor) or logits.shape != (1, model.num_classes) or not model.num_classes:
        raise InputError(f'model {name} is no classifier: it does not give one logit per class')


def check_name(name: str) -> None:
    """Raise InputError if timm knows no model of this name, or none with its tag."""
    if not is_model(name):
        raise InputError(f'model {name!r} is neither a name that timm knows nor a folder; `vt-zoo models` lists ours')
    try:
        get_pretrained_cfg(name)
    except RuntimeError as e:
        raise InputError(f'model {name!r} has a tag that timm does not know: {first_line(e)}') from e
