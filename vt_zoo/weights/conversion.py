"""Conversion of checkpoints of timm's train.py and other programs to folders in timm's hub layout."""
import argparse
import logging
import pickle
import re
import warnings
import zipfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Collection, Dict, Optional, Sequence, Tuple, Union

import torch
import torch.nn as nn
from safetensors import SafetensorError
from safetensors.torch import load_file
from timm.data import resolve_data_config
from timm.models import create_model, get_pretrained_cfg

from ..errors import InputError, check_utf8, first_line
from ..files import check_regular
from ..layers.linear import OF_0_1
from .files import write_model
from .hub import find_hub_id, find_trunk_hub_id
from .loading import check_name

__all__ = ['Converted', 'convert']

# Arguments that decide the outcome of train.py; the others describe the machine, or are private paths on it.
_ARGUMENTS = (
    'pretrained', 'dataset', 'train_split', 'val_split', 'num_classes', 'img_size', 'input_size', 'model_kwargs',
    'epochs', 'batch_size', 'world_size', 'grad_accum_steps', 'opt', 'momentum', 'weight_decay', 'clip_grad',
    'clip_mode', 'sched', 'lr', 'min_lr', 'warmup_lr', 'warmup_epochs', 'cooldown_epochs', 'decay_epochs',
    'decay_rate', 'scale', 'ratio', 'hflip', 'vflip', 'color_jitter', 'aa', 'aug_repeats', 'reprob', 'mixup',
    'cutmix', 'smoothing', 'bce_loss', 'drop', 'drop_path', 'model_ema', 'model_ema_decay', 'model_ema_warmup',
    'amp', 'amp_dtype', 'seed', 'kd_model_name', 'task_loss_weight', 'distill_loss_weight')

# Names under which programs save weights, and their moving averages
WEIGHTS = ('state_dict', 'model', 'model_state_dict', 'model_state', 'net', 'network', 'weights', 'params', 'module')
AVERAGES = ('state_dict_ema', 'model_ema', 'ema', 'ema_state_dict', 'model_ema_state_dict', 'ema_model', 'params_ema')
AVERAGE = re.compile(r'(^|[._])(ema|swa|avg|average|averaged)([._]|$)')  # in a prefix
WRAPPERS = re.compile(r'(?<![^.])(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.')  # at any depth

_logger = logging.getLogger(__name__)


@dataclass
class Converted:
    """Summary of what `convert` wrote.

    Attributes:
        name: Name of the model.
        weights: Which of the file's weights were taken.
        epoch: Number of epochs that they were trained for; None if the file does not say.
    """
    name: str
    weights: str
    epoch: Optional[int]


def read_checkpoint(path: Union[str, Path]) -> Dict[str, Any]:
    """Read a checkpoint without running any code that it contains.

    A pickle is read by torch with `weights_only=True`. Besides tensors and plain values, this accepts
    `argparse.Namespace`, a plain record in which train.py keeps its arguments.

    Args:
        path: A file whose name ends in `.safetensors`, or else one written by `torch.save`.

    Raises:
        InputError: The file is missing, damaged, or holds other objects.
    """
    path = Path(path)
    check_regular(path, 'checkpoint')
    if not path.is_file():
        raise InputError(
            f'checkpoint {path} {"is a folder, name a file in it" if path.exists() else "does not exist"}')
    if path.suffix == '.safetensors':
        try:
            return load_file(path)
        except SafetensorError as e:
            raise InputError(f'checkpoint {path} cannot be read: {first_line(e)}') from e
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                damaged = archive.testzip()  # torch does not verify the checksums
            if damaged is not None:
                raise InputError(f'checkpoint {path} is damaged: the checksum of its part {damaged} is wrong')
        with warnings.catch_warnings(), torch.serialization.safe_globals([argparse.Namespace]):
            warnings.simplefilter('ignore')
            return torch.load(path, map_location='cpu', weights_only=True)
    except InputError:
        raise
    except pickle.UnpicklingError as e:
        found = re.search(r'GLOBAL ([\w.]+)', str(e))
        what = f'it holds {found[1]}' if found else 'it was not written by torch.save'
        raise InputError(f'checkpoint {path} is not read: {what}, only tensors and plain values are read') from e
    except Exception as e:  # a damaged pickle makes torch raise nearly anything
        raise InputError(f'checkpoint {path} is damaged or no checkpoint: {first_line(e)[:150]}') from e


def _read_arguments(checkpoint: Dict[str, Any]) -> Tuple[Dict[str, Any], Dict[str, int]]:
    """Return the arguments of train.py if it wrote the checkpoint; otherwise the image size, if the file has one."""
    args = vars(checkpoint['args']) if isinstance(checkpoint.get('args'), argparse.Namespace) else {}
    if 'arch' in checkpoint:
        return args, {}
    size = args.get('input_size')  # in DeiT and its descendants
    return {}, {'img_size': size} if isinstance(size, int) else {}


def _find_weights(content: Dict[str, Any], names: Sequence[str]) -> Optional[Dict[str, torch.Tensor]]:
    """Find the state dict under the first of these names that has one, directly or below a name of `WEIGHTS`."""
    for name in names:
        value = content.get(name)
        if isinstance(value, dict) and value and all(isinstance(v, torch.Tensor) for v in value.values()):
            return value
        inner = _find_weights(value, WEIGHTS) if isinstance(value, dict) else None
        if inner is not None:
            return inner
    return None


def _select_weights(checkpoint: Any, ema: Optional[bool], path: Path) -> Tuple[Dict[str, torch.Tensor], bool]:
    """Return the requested state dict, and whether it is the moving average."""
    average = _find_weights(checkpoint, AVERAGES) if isinstance(checkpoint, dict) and ema is not False else None
    weights = _find_weights({'': checkpoint}, ['']) if average is None else average
    if weights is None:
        raise InputError(f'checkpoint {path} holds no weights, neither as it is nor under {", ".join(WEIGHTS)}')
    return {WRAPPERS.sub('', key): value for key, value in weights.items()}, average is not None


def _count_by_prefix(state_dict: Dict[str, torch.Tensor], own: Collection[str]) -> Counter:
    """Count how many of a model's weights a state dict has below each prefix, including ''."""
    counts: Counter = Counter({'': 0})
    for key in state_dict:
        words = key.split('.')
        for i in range(len(words)):
            name = '.'.join(words[i:])
            if name in own:
                counts[key[:len(key) - len(name)]] += 1
    return counts


def _select_prefix(counts: Counter, num_weights: int, ema: Optional[bool], path: Path) -> str:
    """Return the prefix below which the whole model is; if there is none, the one with most of its weights."""
    complete = [prefix for prefix, count in counts.items() if count == num_weights]
    if len(complete) < 2:
        return max(counts, key=lambda prefix: (counts[prefix], -len(prefix)))
    averages = [prefix for prefix in complete if AVERAGE.search(prefix)]
    wanted = averages if averages and ema is not False else [p for p in complete if p not in averages]
    if len(wanted) != 1:
        raise InputError(
            f'checkpoint {path} holds the model {len(complete)} times, below {", ".join(map(repr, sorted(complete)))}: '
            'save the state dict of one of them')
    return wanted[0]


def _unwrap(
        state_dict: Dict[str, torch.Tensor],
        model: nn.Module,
        name: str,
        ema: Optional[bool],
        path: Path,
) -> Tuple[Dict[str, torch.Tensor], str]:
    """Take the model's weights out of a state dict that may have them below a prefix, as Lightning's does.

    Returns:
        The weights, and the prefix.
    """
    own = model.state_dict()
    prefix = _select_prefix(_count_by_prefix(state_dict, own), len(own), ema, path)
    weights = {key[len(prefix):]: value for key, value in state_dict.items() if key.startswith(prefix)}
    missing, unexpected = [k for k in own if k not in weights], [k for k in weights if k not in own]
    differing = [k for k in own if k in weights and own[k].shape != weights[k].shape]
    if unexpected:
        try:
            model.load_state_dict(weights, strict=False)
        except RuntimeError as e:
            if OF_0_1 in str(e):
                raise InputError(f'checkpoint {path} cannot be used: {OF_0_1}') from e
    if missing or unexpected:
        firsts = [f'the first {kind} is {keys[0]}' for kind, keys in (('missing', missing), ('unexpected', unexpected))
                  if keys]
        reason = f'{", ".join(firsts)}, {f"below the prefix {prefix!r}" if prefix else "without a prefix"}'
        differing = missing + unexpected
    elif differing:
        key = differing[0]
        reason = f'the first is {key} of shape {list(weights[key].shape)} instead of {list(own[key].shape)}'
    if differing:
        raise InputError(
            f'checkpoint {path} is not of {name} with {model.num_classes} classes: {len(differing)} of its weights '
            f'differ, {reason}')
    others = [key for key in state_dict if not key.startswith(prefix)]
    if others:
        more = f' and {len(others) - 1} more' if len(others) > 1 else ''
        _logger.info(f'the model is below {prefix!r}; left out: {others[0]}{more}')
    return weights, prefix


def _create_model(
        name: str,
        args: Dict[str, Any],
        state_dict: Dict[str, torch.Tensor],
        ema: Optional[bool],
        path: Path,
) -> Tuple[nn.Module, str]:
    """Create the model as train.py does and load its weights.

    Returns:
        The model in eval mode, and the prefix of its weights in the checkpoint.
    """
    check_name(name)
    num_classes = args.get('num_classes')
    classifier = get_pretrained_cfg(name).classifier
    if isinstance(classifier, (tuple, list)):  # a distilled model has two
        classifier = classifier[0]
    found = sorted((key for key in state_dict if f'.{key}'.endswith(f'.{classifier}.weight')), key=len)
    if num_classes is None and found:
        num_classes = len(state_dict[found[0]])
    try:
        in_chans = args.get('in_chans') or (args.get('input_size') or [3])[0]
        model = create_model(
            name, num_classes=num_classes, in_chans=in_chans, global_pool=args.get('gp'), bn_eps=args.get('bn_eps'),
            **{k: v for k, v in (args.get('model_kwargs') or {}).items() if k != 'trunk_pretrained'})
    except Exception as e:  # the arguments come from the checkpoint and may be anything
        raise InputError(f'checkpoint {path} asks for a {name} that cannot be made: {first_line(e)}') from e
    state_dict, prefix = _unwrap(state_dict, model, name, ema, path)
    own = model.state_dict()
    integral = [k for k in own if own[k].is_floating_point() and not state_dict[k].is_floating_point()]
    if integral:
        raise InputError(
            f'checkpoint {path} has weights {integral[0]} of type {state_dict[integral[0]].dtype}, which is not '
            f'floating point')
    model.load_state_dict(state_dict)
    return model.eval(), prefix


def _describe_training(
        name: str,
        checkpoint: Dict[str, Any],
        args: Dict[str, Any],
        use_ema: bool,
        model: nn.Module,
) -> Dict[str, Any]:
    arguments = {k: args[k] for k in _ARGUMENTS if args.get(k) not in (None, '', {}, [])}
    if str(arguments.get('kd_model_name')).startswith('local-dir:'):
        arguments['kd_model_name'] = 'a local folder'
    training = {
        'program': "timm's train.py", 'arguments': {'model': name, **arguments},
        'weights': 'moving average' if use_ema else 'as trained',
        'pretrained': bool(args.get('pretrained') or args.get('initial_checkpoint')),
    }
    if args.get('pretrained') and not args.get('pretrained_path') and not args.get('initial_checkpoint'):
        training['base_model'] = find_hub_id(name)
    elif not training['pretrained'] and (args.get('model_kwargs') or {}).get('trunk_pretrained'):
        training.update(pretrained=True, base_model=find_trunk_hub_id(model))
    if isinstance(checkpoint.get('epoch'), int) and 'metric' in checkpoint:  # recovery-*.pth.tar has none, mid-epoch
        training['epochs'] = checkpoint['epoch'] + 1
    # train.py measures the moving average if it has one
    measured_ema = 'state_dict_ema' in checkpoint and not args.get('model_ema_force_cpu')
    if use_ema == measured_ema and args.get('eval_metric') == 'top1' and isinstance(checkpoint.get('metric'), float):
        training['top1'] = checkpoint['metric']
    return training


def _data_config(model: nn.Module, args: Dict[str, Any]) -> Dict[str, Any]:
    """timm's data config; mean and std for another number of channels than the model's are averaged, as in train.py."""
    config = resolve_data_config(args, model=model)
    for name in ('mean', 'std'):
        values = config[name]
        if len(values) not in (1, config['input_size'][0]):
            config[name] = (sum(values) / len(values),)
    return config


def convert(
        checkpoint: Union[str, Path],
        out: Union[str, Path],
        name: Optional[str] = None,
        ema: Optional[bool] = None,
        dtype: Optional[torch.dtype] = None,
        max_shard_size: Optional[str] = None,
) -> Converted:
    """Write a checkpoint as a folder in timm's hub layout, with the arguments of its training.

    Args:
        checkpoint: File of train.py (`last.pth.tar`, `model_best.pth.tar`, ...), or one with a state dict, either by
            itself or under a usual name (`model`, `model_state_dict`, ...). The model may be part of another module,
            such as Lightning's: a prefix common to all of its weights is removed.
        out: Folder to write, which must not exist yet.
        name: Name of the model; None for the name in the checkpoint.
        ema: True for the moving average, False for the weights themselves, None for the moving average if there is one.
        dtype: `torch.float16` or `torch.bfloat16` for half the size; None to keep the type.
        max_shard_size: As in `write_model`.

    Raises:
        InputError: The checkpoint cannot be read or is not one of this model, `out` exists, or its name is not UTF-8.
        OSError: `out` cannot be written.
    """
    path, out = Path(checkpoint), Path(out)
    check_utf8(out)
    if out.exists():
        raise InputError(f'{out} is there already: choose another --out')
    content = read_checkpoint(path)
    state_dict, use_ema = _select_weights(content, ema, path)
    args, img_size = _read_arguments(content)
    name = name or (content.get('arch') if args else None)
    if not isinstance(name, str):
        raise InputError(f'checkpoint {path} does not say which model it is for: add --model NAME')
    model, prefix = _create_model(name, args, state_dict, ema, path)
    use_ema = use_ema or bool(AVERAGE.search(prefix))
    if ema is not None and ema != use_ema:
        raise InputError(
            f'checkpoint {path} holds no moving average: leave --ema out' if ema else
            f'checkpoint {path} holds only a moving average: leave --no-ema out')
    if dtype is not None:
        model.to(dtype)
        for key, value in model.state_dict().items():
            if not value.isfinite().all():
                raise InputError(f'weights {key} do not fit into {dtype}: use bfloat16, which has the range of float32')
    training = _describe_training(name, content, args, use_ema, model) if args else None
    try:
        data_config = _data_config(model, {**args, **img_size})
        write_model(out, model, None, data_config, training, max_shard_size, replace=False)
    except InputError:
        raise
    except (AssertionError, TypeError, ValueError) as e:
        raise InputError(f'checkpoint {path} cannot be written as a model: {first_line(e)}') from e
    weights = 'moving average' if use_ema else 'weights as trained'
    return Converted(name, weights, (training or {}).get('epochs'))
