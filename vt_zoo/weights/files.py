"""Files of weights: safetensors only, and each appears whole or not at all."""
import errno
import json
import os
import shutil
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Dict, Iterator, List, Optional, Sequence, Tuple, Union

import torch
import torch.nn as nn
from huggingface_hub import save_torch_state_dict
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from timm.models import create_model, get_pretrained_cfg, is_model, save_for_hf

from .._requirements import timm_is_at_least
from ..errors import InputError, first_line
from ..files import check_regular, hold
from ..layers.linear import OF_0_1
from .hub import WEIGHTS, download_weights, find_hub_id, hub_reason

__all__ = [
    'check_input_size', 'check_name', 'drop_second_num_classes', 'load_model', 'read_tensors', 'whole',
    'why_weights_do_not_fit', 'write_model', 'write_tensors']

SHARD_INDEX = f'{WEIGHTS}.index.json'


@contextmanager
def whole(path: Union[str, Path], replace: bool = True) -> Iterator[Path]:
    """A temporary path beside `path` to write a file or folder to; it takes the name `path` when the block ends well.

    Args:
        path: Final name. What stood there is replaced, but not before the new is complete.
        replace: Refuse a `path` that is there, also one that another process wrote since the caller looked.

    Raises:
        InputError: Another process writes `path`, or it is there and not to be replaced.
        OSError: The disk is full or the place cannot be written. Nothing is left behind and `path` is as it was.
    """
    path = Path(path)
    folder = path.parent / f'.{path.name}.tmp'
    folder.mkdir(parents=True, exist_ok=True)
    with hold(folder / '.lock', path):
        try:
            if not replace and path.exists():
                raise InputError(f'{path} is there already: choose another --out')
            with _named(path, folder):
                yield from _write_whole(path, folder)
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def _write_whole(path: Path, folder: Path) -> Iterator[Path]:
    for left in set(folder.iterdir()) - {folder / '.lock'}:  # of a process that was killed
        shutil.rmtree(left) if left.is_dir() else left.unlink()
    new = folder / path.name
    new.touch()
    mode = new.stat().st_mode  # what the umask leaves; safetensors writes files that their owner alone can read
    new.unlink()
    yield new
    for file in (new, *new.rglob('*')):
        if file.is_file():
            file.chmod(mode)
    if not path.is_dir():
        os.replace(new, path)
        return
    old = path.rename(folder / '.old')
    try:
        os.replace(new, path)
    except BaseException:
        old.rename(path)
        raise


@contextmanager
def _named(path: Path, folder: Path) -> Iterator[None]:
    """Errors of writing in the folder that `whole` makes name the file as it would be called."""
    try:
        yield
    except SafetensorError as e:
        raise OSError(errno.EIO, first_line(e), str(path)) from e
    except OSError as e:
        name = Path(str(e.filename2 or e.filename or folder))
        if name.is_relative_to(folder):
            e.filename, e.filename2 = str(path.joinpath(*name.relative_to(folder).parts[1:])), None
        raise


def write_tensors(path: Union[str, Path], tensors: Dict[str, torch.Tensor], metadata: Dict[str, Any]) -> None:
    """Write tensors and JSON-able metadata to a safetensors file."""
    with whole(path) as new:
        save_file(
            {k: v.detach().contiguous().clone() for k, v in tensors.items()}, new, {'json': json.dumps(metadata)})


def read_tensors(path: Union[str, Path]) -> Tuple[Dict[str, torch.Tensor], Dict[str, Any]]:
    """Read a file of `write_tensors`.

    Raises:
        InputError: The file is damaged.
    """
    check_regular(path, 'checkpoint')
    try:
        with safe_open(path, framework='pt') as f:
            return {k: f.get_tensor(k) for k in f.keys()}, json.loads(f.metadata()['json'])  # noqa: SIM118
    except (SafetensorError, KeyError, TypeError, ValueError) as e:
        raise InputError(f'checkpoint {path} cannot be read: {e}') from e


def drop_second_num_classes(config: Dict[str, Any]) -> None:
    """Take `num_classes` out of the `model_args` of a `config.json`, where timm may write it a second time.

    timm passes the one at the top. transformers' timm wrapper passes both, and fails.
    """
    (config.get('model_args') or {}).pop('num_classes', None)


def write_model(
        path: Union[str, Path],
        model: nn.Module,
        classes: Optional[List[str]],
        data_config: Dict[str, Any],
        training: Optional[Dict[str, Any]] = None,
        max_shard_size: Optional[str] = None,
        replace: bool = True,
) -> None:
    """Write a model in timm's hub layout: `timm.create_model('local-dir:PATH', pretrained=True)` loads it.

    Args:
        path: Folder to write, with `model.safetensors` and `config.json`.
        model: Model that was made by `timm.create_model`.
        classes: Names of the classes, in the order of the logits; None where they are not known.
        data_config: Input size, mean, std, interpolation and crop that go with the weights.
        training: How the weights came about, JSON-able, for `config.json` (see `vt_zoo.weights.publish`).
        max_shard_size: Largest file of weights, as '500MB', where they are to be split. timm does not read shards;
            `load_model`, `huggingface_hub.load_torch_model` and transformers do.
        replace: As in `whole`.
    """
    with whole(path, replace) as new:
        model_config = {'label_names': classes, **({'training': training} if training else {})}
        save_for_hf(
            model, str(new), model_config=model_config, model_args=getattr(model, 'creation_args', None),
            safe_serialization=True)
        if max_shard_size is not None:
            save_torch_state_dict(model.state_dict(), new, max_shard_size=max_shard_size)
        config = json.loads((new / 'config.json').read_text(encoding='utf-8'))
        drop_second_num_classes(config)
        theirs = config['pretrained_cfg']
        for key in (  # of the weights that it began with
                'tag', 'license', 'description', 'test_input_size', 'test_crop_pct', 'test_pool_size'):
            theirs.pop(key, None)
        if list(theirs['input_size']) != list(data_config.get('input_size', theirs['input_size'])):
            theirs['pool_size'] = None
        if theirs.get('num_classes') != model.num_classes:
            theirs.pop('label_names', None)
        theirs.update(data_config, num_classes=model.num_classes)
        (new / 'config.json').write_text(json.dumps(config, indent=2))


def _read_shard_index(folder: Path) -> Dict[str, str]:
    shards = json.loads((folder / SHARD_INDEX).read_text(encoding='utf-8'))['weight_map']
    if not all(Path(shard).name == shard for shard in shards.values()):
        raise InputError(f'{SHARD_INDEX} names files outside of the folder')
    return shards


def _check_dtypes(files: List[Path], model: nn.Module) -> None:
    """Raise InputError where a file has another kind of number than the model: torch would convert without a word."""
    own = model.state_dict()
    for file in files:
        with safe_open(file, framework='pt') as f:
            for name in f.keys():  # noqa: SIM118
                dtype = f.get_slice(name).get_dtype()
                if name in own and own[name].is_floating_point() and not dtype.startswith(('F', 'BF')):
                    raise InputError(f'its weights {name} are of type {dtype}, which is not floating point')


def _folder_weights(folder: Path) -> List[Path]:
    """Files of a folder's weights: one, or its shards."""
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    if (folder / SHARD_INDEX).is_file():
        return [folder / shard for shard in sorted(set(_read_shard_index(folder).values()))]
    raise InputError(f'it holds no {WEIGHTS}')


def load_model(name_or_dir: str, **kwargs) -> nn.Module:
    """Create a timm model with its weights.

    Args:
        name_or_dir: Folder in timm's hub layout, whose weights may be in shards; `hf-hub:org/name`, whose weights are
            checked against the SHA-256 that the hub gives for them; or a registered name that has weights.
        **kwargs: Arguments of `timm.create_model`.

    Returns:
        The model in eval mode.

    Raises:
        InputError: No such model or folder, no weights, damaged ones, or weights that do not fit the model.
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
        if files:  # not left to timm, which before 1.0.31 unpickles what it finds in a folder
            tensors = {name: tensor for file in files for name, tensor in load_file(file).items()}
            kwargs['pretrained_cfg_overlay'] = {'source': '', 'state_dict': tensors}
        # timm before 1.0.31 takes weights for those of 3 channels, and makes new ones of what it then cannot adapt
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
    """Reason why weights are not those of a model, of the error that load_state_dict raised."""
    return OF_0_1 if OF_0_1 in str(error) else 'its weights are those of another model'


def check_input_size(model: nn.Module, input_size: Sequence[int], name: str) -> Any:
    """Raise InputError where the model does not take images of this size (C, H, W), else return its output of one."""
    parameter = next(model.parameters())
    try:
        with torch.no_grad():
            return model.eval()(torch.zeros(1, *input_size, device=parameter.device, dtype=parameter.dtype))
    except (RuntimeError, ValueError, AssertionError) as e:
        size = 'x'.join(str(n) for n in input_size)
        raise InputError(f'model {name} does not take images of {size}: {first_line(e)}') from e


def check_name(name: str) -> None:
    """Raise InputError where timm knows no model of this name."""
    if not is_model(name):
        raise InputError(f'model {name!r} is neither a name that timm knows nor a folder; `vt-zoo models` lists ours')
