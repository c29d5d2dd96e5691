"""Training a classifier on a folder of images, built from timm's own parts.

For ImageNet, or to use all of timm's options, use timm's train.py.
"""
import json
import logging
import math
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Dict, Iterable, Iterator, List, Optional, Sequence, Tuple, Union

import timm
import torch
import torch.nn as nn
import torch.nn.functional as F
from huggingface_hub import get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
from timm.data import create_transform, resolve_data_config
from timm.data.auto_augment import auto_augment_policy
from timm.models import create_model, get_arch_pretrained_cfgs, list_pretrained
from timm.utils import random_seed
from torch.utils.data import DataLoader, Dataset, Subset
from tqdm import tqdm

from .._version import __version__
from ..data.images import ImageFolder, Split, describe_split, find_split, image_mode
from ..devices import find_device
from ..errors import MAX_PIXELS, InputError
from ..files import run_folder
from ..training.loop import Loop, accelerator_of, read_state, to_channels_last
from ..training.run_state import check_run_folder, read_settings, recorded_path, write_history
from ..training.sampling import read_batches
from ..weights.files import write_model
from ..weights.hub import WEIGHTS, find_hub_id, find_trunk_hub_id, hub_reason
from ..weights.loading import check_logits, check_name, find_model, load_model
from .settings import FinetuneSettings

if TYPE_CHECKING:
    from accelerate import Accelerator

__all__ = ['FinetuneResult', 'finetune']

PROGRAM = 'vt-zoo finetune'

_logger = logging.getLogger(__name__)


DECIDED = {  # arguments of a model that are not allowed in `model_kwargs`
    'num_classes', 'drop_rate', 'drop_path_rate', 'pretrained', 'checkpoint_path', 'features_only', 'pretrained_cfg',
    'pretrained_cfg_overlay', 'device', 'dtype'}


@dataclass
class FinetuneResult:
    """Result of a run; accuracies are counts over the held-out images."""
    model_dir: Path
    correct: int
    total: int
    reloaded_correct: int
    same_predictions: bool
    seconds: float
    val_samples: List[Tuple[str, int]] = field(repr=False)


@torch.inference_mode()
def evaluate(
        model: nn.Module,
        batches: Iterable[Tuple[torch.Tensor, torch.Tensor]],
        device: torch.device,
) -> Tuple[Dict[str, float], torch.Tensor]:
    """Run a model over batches of images and classes, in float32.

    Returns:
        The mean `loss` and the accuracy `top1` in percent, both 0 if there are no images; and the predicted class of
        each image (N,).
    """
    model.eval()
    losses, right, predictions = [], [], []
    for x, target in batches:
        output, target = model(x.to(device)), target.to(device)
        losses.append(F.cross_entropy(output, target, reduction='none'))
        predictions.append(output.argmax(-1))
        right.append(predictions[-1] == target)
    if not predictions:
        return {'loss': 0., 'top1': 0.}, torch.empty(0, dtype=torch.long)
    loss, top1 = (torch.cat(values).double().mean().item() for values in (losses, right))
    return {'loss': loss, 'top1': 100 * top1}, torch.cat(predictions).cpu()


def _has_weights(name_or_dir: str) -> bool:
    return Path(name_or_dir).is_dir() or ':' in name_or_dir or name_or_dir in list_pretrained()


def _starting_point(name: str) -> str:
    """Name of the model to start from: a bare name gets the tag of its trunk, or its `untrained` tag if it has none.

    The folder of a run gives that of its model.

    Raises:
        InputError: The trunk is not available from the hub.
    """
    if Path(name).is_dir():
        return str(find_model(Path(name)))
    tagged = {} if '.' in name else get_arch_pretrained_cfgs(name)
    untrained = f'{name}.untrained'
    for trunk, config in tagged.items():
        if not trunk.startswith(f'{name}.trunk_'):
            continue
        file = config.hf_hub_id, WEIGHTS
        try:
            if not isinstance(try_to_load_from_cache(*file), str):
                get_hf_file_metadata(hf_hub_url(*file))  # a single request, whereas a download would be retried
        except Exception as e:  # the hub's client raises its own errors, the system's and those of its HTTP library
            raise InputError(
                f'model {name} starts from the trunk {config.hf_hub_id}, which the hub does not give '
                f'({hub_reason(e)}): model {untrained} starts from random weights') from e
        _logger.info(f'starting from {trunk}; --model {untrained} starts from random weights')
        return trunk
    return untrained if untrained in tagged else name


def _create_model(name: str, settings: FinetuneSettings, num_classes: int, pretrained: bool) -> nn.Module:
    decided = sorted(DECIDED & settings.model_kwargs.keys())
    if decided:
        raise InputError(f'model_kwargs must not hold {decided[0]}, which data and other settings decide')
    rates = {'drop_rate': settings.drop, 'drop_path_rate': settings.drop_path}
    model_kwargs = {k: v for k, v in settings.model_kwargs.items() if pretrained or k != 'trunk_pretrained'}
    while True:
        try:
            return _create_with(name, pretrained, num_classes=num_classes, **rates, **model_kwargs)
        except InputError as e:
            unknown = [rate for rate in rates if f"unexpected keyword argument '{rate}'" in str(e)]
            if not unknown or rates.pop(unknown[0]):  # a model without it does not take 0 either
                raise


def _create_with(name: str, pretrained: bool, **kwargs: Any) -> nn.Module:
    if _has_weights(name) and (pretrained or name not in list_pretrained()):
        return load_model(name, **kwargs)
    check_name(name)
    try:
        return create_model(name, **kwargs)
    except Exception as e:  # from the model, or from the hub's client if model_kwargs ask for weights
        raise InputError(f'model {name!r} cannot be trained here: {hub_reason(e)}') from e


def _check_policy(name: Optional[str]) -> None:
    """Raise ValueError if timm knows no such policy, which timm itself checks only by `assert`."""
    if name and not name.startswith(('rand', 'augmix')) and auto_augment_policy(name.split('-')[0]) is None:
        raise ValueError(name)


def _create_datasets(split: Split, settings: FinetuneSettings, data_config: Dict[str, Any]) -> Tuple[Dataset, Dataset]:
    mode = image_mode(data_config['input_size'][0])
    common = {name: data_config[name] for name in ('input_size', 'mean', 'std', 'interpolation')}
    try:
        _check_policy(settings.aa)
        augment = create_transform(
            **common, is_training=True, scale=settings.scale, ratio=settings.ratio, hflip=settings.hflip,
            color_jitter=settings.color_jitter, auto_augment=settings.aa)
    except (AssertionError, ValueError) as e:
        raise InputError(f'aa must be an AutoAugment policy of timm, as rand-m9-mstd0.5, got {settings.aa!r}') from e
    return (
        ImageFolder(split.train, augment, mode),
        ImageFolder(split.val, create_transform(**data_config), mode))


def _precision(name: str, device: torch.device) -> str:
    """accelerate's name for a precision."""
    if name == 'float16' and device.type == 'cpu':  # accelerate would go on in float32
        raise InputError('precision float16 is for GPUs, on a CPU float32 and bfloat16 are allowed')
    if name == 'auto':
        if device.type != 'cuda':
            return 'no'
        return 'bf16' if torch.cuda.is_bf16_supported() else 'fp16'
    return {'float32': 'no', 'bfloat16': 'bf16', 'float16': 'fp16'}[name]


class _Run:
    """State of a run: what it trains, and on which images."""

    def __init__(
            self,
            settings: FinetuneSettings,
            start: str,
            pretrained: bool,
            split: Split,
            workers: int,
            accelerator: 'Accelerator',
    ) -> None:
        random_seed(settings.seed)
        self.settings, self.start, self.workers, self.accelerator = settings, start, workers, accelerator
        model = _create_model(start, settings, len(split.classes), pretrained)
        size = {'img_size': settings.img_size, 'in_chans': model.pretrained_cfg['input_size'][0]}
        self.data_config = resolve_data_config(size if settings.img_size else {}, model=model)
        check_logits(model, self.data_config['input_size'], settings.model)
        pixels = math.prod(self.data_config['input_size'][1:])
        batch_size = min(settings.batch_size, len(split.train))
        if batch_size * pixels > MAX_PIXELS:
            raise InputError(
                f'batch_size must be at most {MAX_PIXELS // pixels} for images of this size, got {settings.batch_size}')
        self.train_data, self.val_data = _create_datasets(split, settings, self.data_config)
        steps = len(split.train) // batch_size
        self.loop = Loop(
            model, accelerator,
            {'opt': settings.opt, 'lr': settings.lr, 'weight_decay': settings.weight_decay, 'momentum': 0.9},
            {'sched': 'cosine', 'warmup_epochs': settings.warmup_epochs, 'warmup_lr': settings.lr / 100},
            settings.epochs * steps, batch_size, settings.seed, settings.model_ema_decay, 'epoch', steps)
        self.fingerprint = {
            **json.loads(json.dumps(asdict(settings))), 'classes': split.classes, 'train_images': len(split.train),
            'val_images': len(split.val)}

    def loss_of(self, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Cross entropy of a process, scaled so that its mean over processes is the mean over the whole batch."""
        total = F.cross_entropy(logits, targets, label_smoothing=self.settings.smoothing, reduction='sum')
        return total * self.accelerator.num_processes / self.loop.batch_size

    def val_batches(self, indices: Sequence[int]) -> Iterator[Tuple[torch.Tensor, torch.Tensor]]:
        """Batches of the held-out images with these indices."""
        return read_batches(DataLoader(Subset(self.val_data, indices), self.loop.batch_size, num_workers=self.workers))

    def evaluate(self) -> Dict[str, float]:
        """Evaluate the kept model on the held-out images, each process on its share."""
        indices = self.loop.share(len(self.val_data))
        metrics, _ = evaluate(self.loop.kept_model, self.val_batches(indices), self.loop.device)
        sums = torch.tensor([metrics['loss'], metrics['top1']], dtype=torch.float64) * len(indices)
        loss, top1 = (self.accelerator.reduce(sums.to(self.loop.device), 'sum') / len(self.val_data)).tolist()
        return {'val_loss': loss, 'val_top1': top1}

    def train(self, checkpoint: Path, progress: bool) -> None:
        """Train to the end."""
        def describe(line: Dict[str, float]) -> str:
            return (
                f'epoch {line["epoch"]:3d}: training loss {line["train_loss"]:.3f}, held-out accuracy '
                f'{line["val_top1"]:.2f} %')

        batches = read_batches(self.loop.batches(self.train_data, self.workers))
        self.loop.run(
            batches, self.loss_of, self.evaluate, lambda line: None,
            lambda: self.loop.save(checkpoint, PROGRAM, self.fingerprint, start=self.start),
            self.loop.unit_iterations, self.loop.unit_iterations, describe, progress)


def _recorded_model(name: str, model_dir: Path) -> Optional[str]:
    """What a finished run records as its model if it started from this one: a bare name got a tag."""
    theirs = read_settings(model_dir).get('model')
    return theirs if '.' not in name and str(theirs).split('.')[0] == name else recorded_path(name)


def _describe_start(settings: FinetuneSettings, name: str, model: nn.Module) -> Dict[str, Any]:
    """Describe the settings and the starting weights for `config.json`, without paths on this machine."""
    recorded, pretrained = recorded_path(name), _has_weights(name)
    base_model = find_hub_id(name) if pretrained and recorded == name else None
    if not pretrained and settings.model_kwargs.get('trunk_pretrained'):
        pretrained, base_model = True, find_trunk_hub_id(model)
    return {
        'program': PROGRAM,
        'versions': {'vt_zoo': __version__, 'timm': timm.__version__, 'torch': torch.__version__},
        'arguments': {**asdict(settings), 'model': recorded},
        'pretrained': pretrained, 'base_model': base_model,
    }


def finetune(
        data_dir: Union[str, Path],
        out: Union[str, Path],
        settings: FinetuneSettings,
        resume: bool = False,
        overwrite: bool = False,
        workers: int = 0,
        device: Optional[str] = None,
        progress: bool = True,
) -> FinetuneResult:
    """Train a model on a folder of images, and check that the saved model makes the same predictions.

    The weights that are validated and kept are the moving average after the last epoch: picking the best epoch by the
    held-out images would make their accuracy look better than it is. The whole state is written after each epoch, so
    that a run killed at any moment can be resumed from its last complete epoch, with the same result on the same
    machine, for any number of workers.

    This process may be the only one, or one of those started by `accelerate launch`. With several processes, batch
    norms take their statistics over all of them on GPUs; on CPUs each process has its own, and those of the first are
    kept.

    The bare name of a model that has a trunk (`vt_resnet18`) starts from that trunk; a name with a tag
    (`vt_resnet18.untrained`) starts from the weights of that tag. Resuming a run does not need the hub.

    Args:
        data_dir: Folder of images (see `vt_zoo.data.images.find_split`).
        out: Folder to write: `model/` (timm's hub layout, with settings and result in its `config.json`) and
            `history.csv`; also `checkpoint.safetensors` until training ends.
        settings: Settings that decide the outcome.
        resume: Resume the run in `out`, if there is one.
        overwrite: Start anew even if `out` holds a run.
        workers: Number of processes that load images; 0 for none.
        device: 'cpu', 'cuda' or 'mps'; None for a GPU if CUDA has one, otherwise the CPU.
        progress: Print the result of each epoch, with a progress bar if standard error is a terminal.

    Returns:
        The result. `correct` of `total` held-out images are classified correctly; `reloaded_correct` is the same for
        the saved model. Of several processes, only the first counts them; the others return 0.

    Raises:
        RunFinishedError: `resume` is given, but the run is finished.
        InputError: Data, settings or `out` cannot be used, the trunk is not available from the hub, or another process
            is training into `out`.
        OSError: `out` cannot be written.
    """
    with run_folder(Path(out)):
        return _finetune(data_dir, Path(out), settings, resume, overwrite, workers, device, progress)


def _finetune(
        data_dir: Union[str, Path],
        out: Path,
        settings: FinetuneSettings,
        resume: bool,
        overwrite: bool,
        workers: int,
        device: Optional[str],
        progress: bool,
) -> FinetuneResult:
    checkpoint, model_dir = out / 'checkpoint.safetensors', out / 'model'
    if not overwrite:
        check_run_folder(
            checkpoint, model_dir, [out / 'history.csv'], resume,
            lambda: {**asdict(settings), 'model': _recorded_model(settings.model, model_dir)})
    start = time.monotonic()
    goes_on = resume and not overwrite and checkpoint.exists()
    tensors, metadata = read_state(checkpoint, PROGRAM) if goes_on else ({}, {})
    found = find_device(device)
    with accelerator_of(device or found.type, _precision(settings.precision, found)) as accelerator:
        main, device = accelerator.is_main_process, accelerator.device
        progress = progress and main
        classes = metadata['fingerprint']['classes'] if goes_on else ()
        split = find_split(data_dir, settings.val_fraction, settings.seed, progress, classes)
        if goes_on:
            run = _Run(settings, metadata['start'], False, split, workers, accelerator)
            run.loop.load(tensors, metadata, out, run.fingerprint)
            _logger.info(f'resuming after epoch {len(run.loop.history)} of {settings.epochs}')
        else:
            run = _Run(settings, _starting_point(settings.model), True, split, workers, accelerator)
        training = _describe_start(settings, run.start, run.loop.model)
        accelerator.wait_for_everyone()
        if main and overwrite:
            checkpoint.unlink(missing_ok=True)
        if progress:
            tqdm.write('\n'.join(describe_split(split)))
        run.train(checkpoint, progress)
        correct, reloaded_correct, same_predictions = 0, 0, True
        if main:
            targets = torch.tensor([target for _, target in split.val])
            _, predictions = evaluate(run.loop.kept_model, run.val_batches(range(len(split.val))), device)
            correct = int((predictions == targets).sum())
            training.update(
                epochs=settings.epochs, weights='moving average' if settings.model_ema_decay else 'as trained',
                train_images=len(split.train), val_images=len(targets), val_correct=correct)
            write_model(model_dir, run.loop.kept_model, split.classes, run.data_config, training)
            reloaded = to_channels_last(load_model(str(model_dir)).to(device))
            _, reloaded_predictions = evaluate(reloaded, run.val_batches(range(len(split.val))), device)
            reloaded_correct = int((reloaded_predictions == targets).sum())
            same_predictions = bool(torch.equal(predictions, reloaded_predictions))
            write_history(out / 'history.csv', run.loop.history)
            checkpoint.unlink()
        run.loop.end()
    return FinetuneResult(
        model_dir, correct, len(split.val), reloaded_correct, same_predictions, time.monotonic() - start, split.val)
