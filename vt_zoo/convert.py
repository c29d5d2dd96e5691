"""Checkpoints of timm's train.py as folders in timm's hub layout."""
import argparse
import pickle
import re
import warnings
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Dict, Optional, Union

import torch
import torch.nn as nn
from safetensors import SafetensorError
from safetensors.torch import load_file
from timm.data import resolve_data_config
from timm.models import clean_state_dict, create_model, get_pretrained_cfg

from .checkpoint import check_name, write_model
from .errors import InputError, first_line
from .files import check_regular
from .hub import find_hub_id

__all__ = ['Converted', 'convert', 'read_checkpoint']

# What decides the outcome of train.py; its other arguments are of the machine, or paths on it that concern nobody else.
_ARGUMENTS = (
    'pretrained', 'dataset', 'train_split', 'val_split', 'num_classes', 'img_size', 'input_size', 'model_kwargs',
    'epochs', 'batch_size', 'world_size', 'grad_accum_steps', 'opt', 'momentum', 'weight_decay', 'clip_grad',
    'clip_mode', 'sched', 'lr', 'min_lr', 'warmup_lr', 'warmup_epochs', 'cooldown_epochs', 'decay_epochs',
    'decay_rate', 'scale', 'ratio', 'hflip', 'vflip', 'color_jitter', 'aa', 'aug_repeats', 'reprob', 'mixup',
    'cutmix', 'smoothing', 'bce_loss', 'drop', 'drop_path', 'model_ema', 'model_ema_decay', 'model_ema_warmup',
    'amp', 'amp_dtype', 'seed', 'kd_model_name', 'task_loss_weight', 'distill_loss_weight')


@dataclass
class Converted:
    """What `convert` wrote.

    Attributes:
        name: Name of the model.
        weights: Which of the file's.
        epoch: Number of epochs behind them, where the file says it.
    """
    name: str
    weights: str
    epoch: Optional[int]


def read_checkpoint(path: Union[str, Path]) -> Dict[str, Any]:
    """Read a checkpoint without running anything that it holds.

    A pickle is read by torch with `weights_only=True`; beside tensors and plain values that takes `argparse.Namespace`,
    a bare record in which train.py keeps its arguments.

    Args:
        path: A safetensors file by its ending, else a file of `torch.save`.

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
                damaged = archive.testzip()  # torch does not look at the checksums
            if damaged is not None:
                raise InputError(f'checkpoint {path} is damaged: the checksum of its part {damaged} is wrong')
        with warnings.catch_warnings(), torch.serialization.safe_globals([argparse.Namespace]):
            warnings.simplefilter('ignore')
            return torch.load(path, map_location='cpu', weights_only=True)
    except InputError:
        raise
    except pickle.UnpicklingError as e:
        found = re.search(r'GLOBAL ([\w.]+)', str(e))
        what = f'it holds {found[1]}' if found else 'it is not a file of torch.save'
        raise InputError(f'checkpoint {path} is not read: {what}, only tensors and plain values are read') from e
    except Exception as e:  # a damaged pickle makes torch raise nearly anything
        raise InputError(f'checkpoint {path} is damaged or no checkpoint: {first_line(e)[:150]}') from e


def _select_weights(checkpoint: Any, ema: Optional[bool], path: Path) -> tuple:
    """The state dict that is asked for, and whether it is the moving average."""
    if not isinstance(checkpoint, dict):
        raise InputError(f'checkpoint {path} holds no weights')
    has_ema = isinstance(checkpoint.get('state_dict_ema'), dict)
    if ema and not has_ema:
        raise InputError(f'checkpoint {path} holds no moving average: leave --ema out')
    use_ema = has_ema if ema is None else ema
    state_dict = checkpoint.get('state_dict_ema' if use_ema else 'state_dict', checkpoint)
    if not isinstance(state_dict, dict) or not all(isinstance(v, torch.Tensor) for v in state_dict.values()):
        raise InputError(f'checkpoint {path} holds no weights')
    return clean_state_dict(state_dict), use_ema


def _create_model(name: str, args: Dict[str, Any], state_dict: Dict[str, torch.Tensor], path: Path) -> nn.Module:
    """The model as train.py makes it, with the weights."""
    check_name(name)
    num_classes = args.get('num_classes')
    classifier = state_dict.get(f'{get_pretrained_cfg(name).classifier}.weight')
    if num_classes is None and classifier is not None:
        num_classes = len(classifier)
    try:
        in_chans = args.get('in_chans') or (args.get('input_size') or [3])[0]
        model = create_model(
            name, num_classes=num_classes, in_chans=in_chans, global_pool=args.get('gp'), bn_eps=args.get('bn_eps'),
            **args.get('model_kwargs') or {})
    except Exception as e:  # arguments are the checkpoint's own and may be anything
        raise InputError(f'checkpoint {path} asks for a {name} that cannot be made: {first_line(e)}') from e
    own = model.state_dict()
    differing = sorted(own.keys() ^ state_dict.keys()) or [k for k in own if own[k].shape != state_dict[k].shape]
    if differing:
        raise InputError(
            f'checkpoint {path} is not of {name} with {model.num_classes} classes: {len(differing)} of its weights '
            f'differ, the first is {differing[0]}')
    integral = [k for k in own if own[k].is_floating_point() and not state_dict[k].is_floating_point()]
    if integral:
        raise InputError(
            f'checkpoint {path} has weights {integral[0]} of type {state_dict[integral[0]].dtype}, which is not '
            f'floating point')
    model.load_state_dict(state_dict)
    return model.eval()


def _describe_training(name: str, checkpoint: Dict[str, Any], args: Dict[str, Any], use_ema: bool) -> Dict[str, Any]:
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
    if isinstance(checkpoint.get('epoch'), int) and 'metric' in checkpoint:  # a recovery-*.pth.tar is amid an epoch
        training['epochs'] = checkpoint['epoch'] + 1
    # train.py measures the moving average where it has one
    measured_ema = 'state_dict_ema' in checkpoint and not args.get('model_ema_force_cpu')
    if use_ema == measured_ema and args.get('eval_metric') == 'top1' and isinstance(checkpoint.get('metric'), float):
        training['top1'] = checkpoint['metric']
    return training


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
        checkpoint: File of train.py (`last.pth.tar`, `model_best.pth.tar`, ...), or one with a state dict alone.
        out: Folder to write, which must not be there.
        name: Name of the model; the checkpoint's own where None.
        ema: Take the moving average, or the weights themselves; the moving average if there is one where None.
        dtype: `torch.float16` or `torch.bfloat16` for half the size; as it is where None.
        max_shard_size: As in `write_model`.

    Raises:
        InputError: The checkpoint cannot be read or is not of this model, or `out` is there.
        OSError: `out` cannot be written.
    """
    path, out = Path(checkpoint), Path(out)
    if out.exists():
        raise InputError(f'{out} is there already: choose another --out')
    content = read_checkpoint(path)
    state_dict, use_ema = _select_weights(content, ema, path)
    args = vars(content['args']) if isinstance(content.get('args'), argparse.Namespace) else {}
    name = name or (content.get('arch') if args else None)
    if not isinstance(name, str):
        raise InputError(f'checkpoint {path} does not say of which model it is: add --model NAME')
    model = _create_model(name, args, state_dict, path)
    if dtype is not None:
        model.to(dtype)
        for key, value in model.state_dict().items():
            if not value.isfinite().all():
                raise InputError(f'weights {key} do not fit into {dtype}: use bfloat16, which has the range of float32')
    training = _describe_training(name, content, args, use_ema) if args else None
    try:
        data_config = resolve_data_config(args, model=model)
        write_model(out, model, None, data_config, training, max_shard_size, replace=False)
    except InputError:
        raise
    except (AssertionError, TypeError, ValueError) as e:
        raise InputError(f'checkpoint {path} cannot be written as a model: {first_line(e)}') from e
    weights = 'moving average' if use_ema else 'weights as trained'
    return Converted(name, weights, (training or {}).get('epochs'))
