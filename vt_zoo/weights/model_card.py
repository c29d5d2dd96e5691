"""The model card (README.md) of a model's folder on the Hugging Face Hub.

The content of a card comes from the folder's `config.json`, where `vt-zoo finetune` and `vt-zoo convert` record under
`training` how the weights were trained. The card says "unknown" for anything that was not recorded.
"""
import json
from typing import Any, Dict, Optional

import torch.nn as nn
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from ..errors import printable
from ..models import list_classifiers

UNKNOWN = 'unknown'

_TEXT = '''
# {name}

`{architecture}`, {origin}. {parameters:,} parameters, stored as {dtype}; {num_classes} classes.

## Use

```python
import timm
import vt_zoo  # registers its architectures with timm

model = timm.create_model('hf-hub:{repo_id}', pretrained=True).eval()
```

On the command line: `vt-zoo predict IMAGE --model hf-hub:{repo_id}`. In transformers:

```python
import vt_zoo  # before the model is created
from transformers import AutoImageProcessor, AutoModelForImageClassification

processor = AutoImageProcessor.from_pretrained('{repo_id}')
model = AutoModelForImageClassification.from_pretrained('{repo_id}')
```

## Data

Data: {dataset}. Training images: {train_images}; held-out images: {val_images}. Classes: {classes}.

{preprocessing}

## Training

Program: {program}. Epochs: {epochs}. Weights: {weights}. Started from: {start}.

{arguments}

## Result

{result}

## Limits

Every image is assigned one of the classes above, whatever it shows. Apart from the result above, nothing was measured:
neither accuracy on other data, nor robustness, nor fairness.

## Licence

{license}
'''

_OUR_ORIGIN = '''a Visual Transformer ([arXiv 2006.03677](https://arxiv.org/abs/2006.03677)) in the implementation of
vt_zoo, which is not by the authors of the paper'''

_CITATION = '''
## Citation

```bibtex
@article{wu2020visual,
  title={Visual Transformers: Where Do Transformers Really Belong in Vision Models?},
  author={Wu, Bichen and Xu, Chenfeng and Dai, Xiaoliang and Wan, Alvin and Zhang, Peizhao and Yan, Zhicheng and
    Tomizuka, Masayoshi and Gonzalez, Joseph and Keutzer, Kurt and Vajda, Peter},
  journal={arXiv preprint arXiv:2006.03677},
  year={2020}
}
```
'''

_PREPROCESSING = ('input_size', 'mean', 'std', 'interpolation', 'crop_pct', 'crop_mode')


def _table(name: str, values: Dict[str, Any]) -> str:
    if not values:
        return f'{name.capitalize()}: {UNKNOWN}.'
    texts = {k: v if isinstance(v, str) else json.dumps(v) for k, v in values.items()}
    return '\n'.join([f'| {name} | |', '|---|---|', *(f'| `{k}` | {text} |' for k, text in texts.items())])


def _start(training: Dict[str, Any]) -> str:
    base = training.get('base_model')
    if base:
        repo_id = base.partition('@')[0]
        return f'weights of [{base}](https://huggingface.co/{repo_id}) (`{training["arguments"]["model"]}`)'
    return {True: 'weights that are not on the hub', False: 'new weights'}.get(training.get('pretrained'), UNKNOWN)


def _accuracy(training: Dict[str, Any]) -> Optional[float]:
    """Accuracy on the held-out images, 0 to 1; None if it was not measured with these weights."""
    if 'val_correct' in training:
        return training['val_correct'] / training['val_images']
    return training['top1'] / 100 if 'top1' in training else None


def _result(training: Dict[str, Any]) -> str:
    accuracy = _accuracy(training)
    if accuracy is None:
        return f'Accuracy: {UNKNOWN}.'
    if 'val_correct' in training:
        return (
            f'Accuracy on the held-out images: {100 * accuracy:.2f} % ({training["val_correct"]} of '
            f'{training["val_images"]}), after the last epoch; these images were not used to pick an epoch.')
    return (
        f'Accuracy on the held-out images, as train.py reported it: {100 * accuracy:.2f} %.\nIf this epoch was picked '
        'as the best of several, it was picked by these images, so the model may do worse on others.')


def _metadata(
        repo_id: str, training: Dict[str, Any], license_id: Optional[str], dataset: Optional[str]) -> ModelCardData:
    accuracy = _accuracy(training)
    results = None if accuracy is None else [EvalResult(
        task_type='image-classification', dataset_type='imagefolder', dataset_name=dataset or UNKNOWN,
        dataset_split='held-out', metric_type='accuracy', metric_value=round(accuracy, 6))]
    return ModelCardData(
        model_name=repo_id.split('/')[1],
        base_model=(training.get('base_model') or '').partition('@')[0] or None,
        license=license_id or UNKNOWN,
        library_name='timm',
        pipeline_tag='image-classification',
        tags=['image-classification', 'timm', 'transformers', 'vt_zoo'],
        metrics=['accuracy'] if results else None,
        eval_results=results)


def create_card(
        repo_id: str,
        model: nn.Module,
        config: Dict[str, Any],
        dtype: str,
        license_id: Optional[str] = None,
        dataset: Optional[str] = None,
) -> ModelCard:
    """Create a model card with the hub's metadata header.

    Args:
        repo_id: `org/name` on the hub.
        model: The model with its weights.
        config: Content of its folder's `config.json`.
        dtype: Type of the stored weights, e.g. 'float32'.
        license_id: The hub's name for the weights' licence, e.g. 'apache-2.0'; None if unknown.
        dataset: Name of the data; None if unknown.

    Returns:
        The card. If the accuracy on held-out images was measured, its header has it as a `model-index`.
    """
    training = config.get('training', {})
    is_ours = config['architecture'].split('.')[0] in list_classifiers()
    cfg = config['pretrained_cfg']
    text = _TEXT.format(
        name=repo_id.split('/')[1], repo_id=repo_id, architecture=config['architecture'],
        origin=_OUR_ORIGIN if is_ours else 'a model of timm',
        parameters=sum(p.numel() for p in model.parameters()), dtype=dtype, num_classes=model.num_classes,
        dataset=dataset or UNKNOWN, classes=', '.join(map(str, config.get('label_names') or [UNKNOWN])),
        train_images=training.get('train_images', UNKNOWN), val_images=training.get('val_images', UNKNOWN),
        preprocessing=_table('preprocessing', {k: cfg[k] for k in _PREPROCESSING if k in cfg}),
        program=training.get('program', UNKNOWN), epochs=training.get('epochs', UNKNOWN),
        weights=training.get('weights', UNKNOWN), start=_start(training),
        arguments=_table('arguments', {**training.get('arguments', {}), **training.get('versions', {})}),
        result=_result(training), license=license_id or UNKNOWN)
    header = _metadata(repo_id, training, license_id, dataset).to_yaml()
    return ModelCard(printable(f'---\n{header}\n---\n{text}{_CITATION if is_ours else ""}'))
