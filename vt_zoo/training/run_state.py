"""The folder of a training run, and the state in it from which a run is resumed; shared by both training commands."""
import csv
import json
from pathlib import Path
from typing import Any, Dict, List, Tuple, Union

import torch
import torch.nn as nn

from ..errors import InputError
from ..files import check_regular, whole
from ..weights.loading import why_weights_do_not_fit

__all__ = ['RunFinishedError']


class RunFinishedError(InputError):
    """The run to resume has already finished with the same settings, so there is nothing to do."""


def check_run_folder(checkpoint: Path, model_dir: Path, resume: bool, settings: Dict[str, Any]) -> None:
    """Raise InputError if a folder holds a run that must not be lost.

    Args:
        checkpoint: Checkpoint of an unfinished run.
        model_dir: Model folder of a finished run, whose config.json has the settings in `arguments` of `training` (or
            of `_training`, in a folder of segmentation_models_pytorch).
        resume: Whether to resume an unfinished run.
        settings: Settings of the run to start or resume; None for a value that depends on the data or the model.

    Raises:
        RunFinishedError: The run to resume has these settings and is finished.
    """
    out = checkpoint.parent
    if checkpoint.exists() and not resume:
        raise InputError(f'{out} holds an unfinished run: add --resume to resume it, or --overwrite to start anew')
    if not model_dir.exists() or checkpoint.exists():
        return
    other = ''
    if resume:
        theirs = _read_settings(model_dir)
        ours = json.loads(json.dumps(settings))
        differing = [name for name, value in ours.items() if value is not None and theirs.get(name) != value]
        if not differing:
            raise RunFinishedError(f'{out} holds this run, and it is finished: its model is in {model_dir}')
        name = differing[0]
        if name in theirs:
            other = f' with {name} = {theirs[name]!r} instead of {ours[name]!r}'
    raise InputError(f'{out} holds a finished run{other}: add --overwrite to replace it, or choose another --out')


def _read_settings(model_dir: Path) -> Dict[str, Any]:
    """Settings that a model was trained with; empty if its config.json does not have them."""
    check_regular(model_dir / 'config.json', 'file')
    try:
        config = json.loads((model_dir / 'config.json').read_text(encoding='utf-8'))
        return dict((config.get('training') or config['_training'])['arguments'])
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return {}


def check_same_run(out: Path, theirs: Dict[str, Any], ours: Dict[str, Any]) -> None:
    """Raise InputError, naming the first difference, if the run in `out` has settings or data other than ours."""
    for name, value in theirs.items():
        if ours.get(name) != value:
            raise InputError(
                f'{out} holds a run with {name} = {value!r}, which cannot go on with {ours.get(name)!r}')


def state_tensors(
        modules: Dict[str, nn.Module],
        optimizer: torch.optim.Optimizer,
) -> Tuple[Dict[str, torch.Tensor], List[Any]]:
    """Collect the state of modules and an optimizer.

    Returns:
        Tensors by `MODULE.NAME` and `optimizer.PARAMETER.NAME`, and the optimizer's other values as [parameter, name,
        value].
    """
    tensors = {f'{key}.{name}': value for key, module in modules.items() for name, value in module.state_dict().items()}
    scalars = []
    for index, entries in optimizer.state_dict()['state'].items():
        for name, value in entries.items():
            if isinstance(value, torch.Tensor):
                tensors[f'optimizer.{index}.{name}'] = value
            else:
                scalars.append([index, name, value])
    return tensors, scalars


def load_state(
        tensors: Dict[str, torch.Tensor],
        scalars: List[Any],
        modules: Dict[str, nn.Module],
        optimizer: torch.optim.Optimizer,
) -> None:
    """Load a state from `state_tensors` into modules and an optimizer, which keeps its own settings.

    Raises:
        InputError: The weights do not fit the modules.
    """
    parts: Dict[str, Dict[str, torch.Tensor]] = {'optimizer': {}, **{key: {} for key in modules}}
    for key, value in tensors.items():
        part, _, name = key.partition('.')
        parts[part][name] = value
    for key, module in modules.items():
        try:
            module.load_state_dict(parts[key])
        except RuntimeError as e:
            raise InputError(f'the run cannot go on: {why_weights_do_not_fit(e)}') from e
    state: Dict[int, Dict[str, Any]] = {}
    for key, value in parts['optimizer'].items():
        index, _, name = key.partition('.')
        state.setdefault(int(index), {})[name] = value
    for index, name, value in scalars:
        state.setdefault(index, {})[name] = value
    optimizer.load_state_dict({'state': state, 'param_groups': optimizer.state_dict()['param_groups']})


def write_history(path: Union[str, Path], history: List[Dict[str, float]]) -> None:
    """Write the metrics of a run as CSV, one line per entry."""
    with whole(path) as new, new.open('w', newline='') as f:
        writer = csv.DictWriter(f, list(history[0]))
        writer.writeheader()
        writer.writerows(history)
