"""Files of weights: only safetensors, and each is written completely or not at all."""
import json
from pathlib import Path
from typing import Any, Dict, List, Optional, Tuple, Union

import torch
import torch.nn as nn
from huggingface_hub import save_torch_state_dict
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from timm.models._hub import save_config_for_hf

from ..errors import InputError
from ..files import check_regular, whole
from .hub import WEIGHTS

__all__ = ['write_model', 'write_segmenter']


def _unshared(tensors: Dict[str, torch.Tensor]) -> Dict[str, torch.Tensor]:
    """Tensors as safetensors takes them: contiguous, each with memory of its own."""
    return {name: tensor.detach().contiguous().clone() for name, tensor in tensors.items()}


def write_tensors(path: Union[str, Path], tensors: Dict[str, torch.Tensor], metadata: Dict[str, Any]) -> None:
    """Write tensors and JSON-serializable metadata to a safetensors file."""
    with whole(path) as new:
        save_file(_unshared(tensors), new, {'json': json.dumps(metadata)})


def read_tensors(path: Union[str, Path]) -> Tuple[Dict[str, torch.Tensor], Dict[str, Any]]:
    """Read a file written by `write_tensors`.

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
    """Remove `num_classes` from the `model_args` of a `config.json`, where timm may write it a second time.

    timm uses only the one at the top level; transformers' timm wrapper passes both and fails.
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
        model: Model created by `timm.create_model`.
        classes: Names of the classes, in the order of the logits; None if they are not known.
        data_config: Input size, mean, std, interpolation and crop that go with the weights.
        training: How the weights were trained, as JSON-serializable values for `config.json` (see
            `vt_zoo.weights.model_card`).
        max_shard_size: Split the weights into files of at most this size, e.g. '500MB'. timm does not read shards;
            `load_model`, `huggingface_hub.load_torch_model` and transformers do.
        replace: As in `whole`.
    """
    with whole(path, replace) as new:
        model_config = {'label_names': classes, **({'training': training} if training else {})}
        new.mkdir()
        save_file(_unshared(model.state_dict()), new / WEIGHTS)
        save_config_for_hf(model, new / 'config.json', model_config, getattr(model, 'creation_args', None))
        if max_shard_size is not None:
            save_torch_state_dict(model.state_dict(), new, max_shard_size=max_shard_size)
        config = json.loads((new / 'config.json').read_text(encoding='utf-8'))
        drop_second_num_classes(config)
        theirs = config['pretrained_cfg']
        for key in (  # of the weights that training started from
                'tag', 'license', 'description', 'test_input_size', 'test_crop_pct', 'test_pool_size'):
            theirs.pop(key, None)
        if list(theirs['input_size']) != list(data_config.get('input_size', theirs['input_size'])):
            theirs['pool_size'] = None
        if theirs.get('num_classes') != model.num_classes:
            theirs.pop('label_names', None)
        theirs.update(data_config, num_classes=model.num_classes)
        (new / 'config.json').write_text(json.dumps(config, indent=2))


def write_segmenter(
        path: Union[str, Path],
        model: nn.Module,
        classes: List[str],
        mean: Tuple[float, ...],
        std: Tuple[float, ...],
        eval_size: Optional[Union[int, Tuple[int, int]]] = None,
        label_map: Optional[Dict[Union[int, str], int]] = None,
        dataset: Optional[str] = None,
        metrics: Optional[Dict[str, Any]] = None,
        training: Optional[Dict[str, Any]] = None,
) -> None:
    """Write a segmenter as `save_pretrained` does, completely or not at all, with everything needed to use it.

    Args:
        path: Folder to write; an existing one is replaced.
        model: A model of `vt_zoo.models.vt_fpn`.
        classes: Names of the classes, in the order of the logits.
        mean: Mean of each channel, used to normalise the images.
        std: Standard deviation of each channel, used to normalise the images.
        eval_size: Short side, or height and width, to which images are resized before the model; None for no resizing.
        label_map: Label map of the masks that the model was trained on.
        dataset: Data that the model was trained on, for the model card.
        metrics: Names and values of metrics, for the model card.
        training: How the weights were trained, as JSON-serializable values for config.json.
    """
    config = {
        **model.config, '_model_class': type(model).__name__, 'encoder_weights': None, '_classes': classes,
        '_mean': mean, '_std': std, '_eval_size': eval_size, **({'_label_map': label_map} if label_map else {}),
        **({'_training': training} if training else {})}
    with whole(path) as new:
        model.save_pretrained(new, config=config, dataset=dataset, metrics=metrics)
