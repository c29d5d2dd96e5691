"""Files of weights: safetensors only, and each appears whole or not at all."""
import json
from pathlib import Path
from typing import Any, Dict, List, Optional, Tuple, Union

import torch
import torch.nn as nn
from huggingface_hub import save_torch_state_dict
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from timm.models import save_for_hf

from ..errors import InputError
from ..files import check_regular, whole

__all__ = ['write_model', 'write_segmenter']


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
    """Write a segmenter: `save_pretrained`'s files, whole or not at all, with what its use needs in config.json.

    Args:
        path: Folder to write; one that stands there is replaced.
        model: A model of `vt_zoo.models.vt_fpn`.
        classes: Names of the classes, in the order of the logits.
        mean: Of the images that it takes, a value a channel.
        std: As mean.
        eval_size: Short side, or height and width, to which images are resized before it; None for as they are.
        label_map: Of the masks that it was trained on.
        dataset: For the model card: what it was trained on.
        metrics: For the model card: names and values of measures.
        training: How the weights came about, JSON-able, for config.json.
    """
    config = {
        **model.config, '_model_class': type(model).__name__, 'encoder_weights': None, '_classes': classes,
        '_mean': mean, '_std': std, '_eval_size': eval_size, **({'_label_map': label_map} if label_map else {}),
        **({'_training': training} if training else {})}
    with whole(path) as new:
        model.save_pretrained(new, config=config, dataset=dataset, metrics=metrics)
