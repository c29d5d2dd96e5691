"""The folder of a training run, and the state in it from which a run is resumed; shared by both training commands."""
import csv
import json
from hashlib import sha256
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional, Sequence, Tuple, Union

import torch
import torch.nn as nn

from ..errors import InputError
from ..files import check_regular, whole
from ..weights.loading import find_model, why_weights_do_not_fit

__all__ = ['RunFinishedError']


class RunFinishedError(InputError):
    """The run to resume has already finished with the same settings, so there is nothing to do."""


def check_run_folder(
        checkpoint: Path,
        model_dir: Path,
        others: Sequence[Path],
        resume: bool,
        settings: Callable[[], Dict[str, Any]],
) -> None:
    """Raise InputError if a folder holds a run that must not be lost.

    Args:
        checkpoint: Checkpoint of an unfinished run.
        model_dir: Model folder of a finished run, whose config.json has the settings in `arguments` of `training` (or
            of `_training`, in a folder of segmentation_models_pytorch).
        others: What else the run writes.
        resume: Whether to resume an unfinished run.
        settings: Gives the settings of the run to resume, as its model would record them; called only to compare them
            with those of a finished run, as weights in folders are read for it.

    Raises:
        RunFinishedError: The run to resume has these settings and is finished.
    """
    out = checkpoint.parent
    if checkpoint.exists():
        if resume:
            return
        raise InputError(f'{out} holds an unfinished run: add --resume to resume it, or --overwrite to start anew')
    if not model_dir.exists():
        for other in others:
            if other.exists():
                raise InputError(f'{other} is there already: add --overwrite to replace it, or choose another --out')
        return
    differs = ''
    if resume:
        theirs = read_settings(model_dir)
        ours = json.loads(json.dumps(settings()))
        differing = [name for name, value in ours.items() if theirs.get(name) != value]
        if not differing:
            raise RunFinishedError(f'{out} holds a finished run with these settings: its model is in {model_dir}')
        name = differing[0]
        if name in theirs:
            differs = f' with {name} = {theirs[name]!r} instead of {ours[name]!r}'
    raise InputError(f'{out} holds a finished run{differs}: add --overwrite to replace it, or choose another --out')


def read_settings(model_dir: Path) -> Dict[str, Any]:
    """Settings that a model was trained with; empty if there is none or its config.json does not have them."""
    check_regular(model_dir / 'config.json', 'file')
    try:
        config = json.loads((model_dir / 'config.json').read_text(encoding='utf-8'))
        return dict((config.get('training') or config['_training'])['arguments'])
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return {}


def recorded_path(value: Optional[Union[bool, str]]) -> Optional[Union[bool, str]]:
    """What a model records of a setting that may be a path on this machine: of a folder, which weights it holds."""
    folder = Path(value.removeprefix('local-dir:')) if isinstance(value, str) else None
    if folder is None or not folder.is_dir():
        return value
    digest = sha256()
    for file in sorted(find_model(folder).glob('*.safetensors')):
        if file.is_file():
            digest.update(file.read_bytes())
    return f'a local folder, SHA-256 of its weights {digest.hexdigest()[:8]}...'


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
        value], also those of its groups (some optimizers count their steps there) as ['group.NUMBER', name, value].

    Raises:
        InputError: The optimizer keeps what cannot be written.
    """
    tensors = {f'{key}.{name}': value for key, module in modules.items() for name, value in module.state_dict().items()}
    state = optimizer.state_dict()
    scalars = [
        [f'group.{number}', name, value.item() if isinstance(value, torch.Tensor) else value]
        for number, group in enumerate(state['param_groups']) for name, value in group.items() if name != 'params']
    for index, entries in state['state'].items():
        for name, value in entries.items():
            if isinstance(value, torch.Tensor):
                tensors[f'optimizer.{index}.{name}'] = value
            else:
                scalars.append([index, name, value])
    try:
        json.dumps(scalars)
    except TypeError as e:
        name = type(optimizer).__name__
        raise InputError(f'the state of optimizer {name} cannot be written ({e}): choose another --opt') from e
    return tensors, scalars


def load_state(
        tensors: Dict[str, torch.Tensor],
        scalars: List[Any],
        modules: Dict[str, nn.Module],
        optimizer: torch.optim.Optimizer,
) -> None:
    """Load a state from `state_tensors` into modules and an optimizer.

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
    groups = optimizer.state_dict()['param_groups']
    for index, name, value in scalars:
        if isinstance(index, str):
            group = groups[int(index.removeprefix('group.'))]
            group[name] = tuple(value) if isinstance(group.get(name), tuple) else value
        else:
            state.setdefault(index, {})[name] = value
    optimizer.load_state_dict({'state': state, 'param_groups': groups})
    for parameter, entries in optimizer.state.items():
        for name, value in entries.items():
            if isinstance(value, torch.Tensor) and value.shape == parameter.shape:  # sums round as the layout has it
                entries[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)


def write_history(path: Union[str, Path], history: List[Dict[str, float]]) -> None:
    """Write the metrics of a run as CSV, one line per entry."""
    with whole(path) as new, new.open('w', newline='') as f:
        writer = csv.DictWriter(f, list(history[0]))
        writer.writeheader()
        writer.writerows(history)
