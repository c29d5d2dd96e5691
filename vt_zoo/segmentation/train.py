"""Training a segmenter."""
import json
import logging
import math
import time
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any, Dict, Iterator, Optional, Tuple, Union

import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import get_pretrained_cfg
from torch.utils.data import DataLoader, Subset
from tqdm import tqdm

from .._moved import old_names
from ..errors import InputError, first_line
from ..files import run_folder
from ..models import segmenter_classes
from ..training.loop import Loop, accelerator_of, read_state
from ..training.run_state import check_run_folder, recorded_path, write_history
from ..training.sampling import read_batches
from ..weights.files import write_segmenter
from ..weights.loading import CLASSIFICATION, check_input_size, find_model, load, load_model
from .datasets import SegmentationDataset, load_dataset
from .label_counts import check_classes, count_labels, describe_absent, describe_counts
from .metrics import SegmentMetrics, evaluate
from .settings import SegmentSettings
from .transforms import eval_transform, train_transform

if TYPE_CHECKING:
    from accelerate import Accelerator

__all__ = ['SegmentResult', 'create_segmenter', 'train_segmenter']

__getattr__ = old_names(__name__)

_logger = logging.getLogger(__name__)

PROGRAM = 'vt-zoo segment train'
IMAGENET = 'imagenet'  # name of pretrained weights in segmentation_models_pytorch


@dataclass
class SegmentResult:
    """Result of a run.

    Attributes:
        best_dir: Folder of the model with the highest mean IoU on the validation images.
        last_dir: Folder of the model after the last iteration.
        best_miou: Mean IoU of the best model, 0 to 1.
        last: Metrics of the last model.
        seconds: Time that this call took.
    """
    best_dir: Path
    last_dir: Path
    best_miou: float
    last: SegmentMetrics
    seconds: float


@contextmanager
def _encoder_errors(name: str) -> Iterator[None]:
    """Turn what goes wrong with an encoder into an InputError; each library and the hub's client raise their own."""
    try:
        yield
    except InputError:
        raise
    except Exception as e:
        raise InputError(f'encoder {name!r} cannot be made: {first_line(e)[:200]}') from e


def create_segmenter(settings: SegmentSettings, num_classes: int) -> nn.Module:
    """Create the model described by the settings.

    Raises:
        InputError: There is no such encoder, or its weights are not available or not its own.
    """
    kwargs: Dict[str, Any] = {'pyramid_channels': settings.pyramid_channels, 'head_channels': settings.head_channels}
    if settings.arch == 'vt_fpn':
        kwargs.update(num_tokens=settings.num_tokens, token_dim=settings.token_dim)
    weights = None
    if settings.encoder_weights is True:
        weights = True if settings.encoder_name.startswith('tu-') else IMAGENET
    with _encoder_errors(settings.encoder_name):
        model = segmenter_classes()[settings.arch](
            encoder_name=settings.encoder_name, encoder_weights=weights, classes=num_classes, **kwargs)
    if isinstance(settings.encoder_weights, str):
        _start_from(find_model(Path(settings.encoder_weights)), model, settings)
    return model


@torch.no_grad()
def _start_from(folder: Path, model: nn.Module, settings: SegmentSettings) -> None:
    """Give an encoder the weights of a classifier, and check that it makes the same maps with them.

    Raises:
        InputError: The classifier is not the encoder's timm model, or one with other arguments.
    """
    name = settings.encoder_name
    trunk = load_model(str(folder), features_only=True).eval()
    held = json.loads((folder / 'config.json').read_text(encoding='utf-8'))['architecture'].split('.')[0]
    refusal = 'encoder_weights {} holds {}, but the encoder is {}: it must be the encoder without tu-'
    if name.split('.')[0] != f'tu-{held}':
        raise InputError(refusal.format(folder, held, name))
    size = 1, 3, *settings.crop_size
    encoder, x = model.encoder.model, torch.linspace(-1, 1, math.prod(size)).view(size)
    try:
        encoder.load_state_dict(trunk.state_dict())
        same = torch.equal(encoder.eval()(x)[-1], trunk(x)[-1])
    except (RuntimeError, ValueError, AssertionError):  # the last for a size that it does not take
        same = False
    encoder.train()
    if not same:
        raise InputError(refusal.format(folder, f'{held} with other arguments', name))


def encoder_statistics(settings: SegmentSettings) -> Tuple[Tuple[float, ...], Tuple[float, ...]]:
    """Mean and std that an encoder was trained with; ImageNet's if they are not known or it starts from random weights.

    Raises:
        InputError: There is no such encoder, or its mean and std are not available.
    """
    name = settings.encoder_name
    if isinstance(settings.encoder_weights, str):
        preprocessing = load(settings.encoder_weights, CLASSIFICATION).preprocessing
        return tuple(preprocessing['mean']), tuple(preprocessing['std'])
    with _encoder_errors(name):
        if name.startswith('tu-'):
            cfg = get_pretrained_cfg(name[3:], allow_unregistered=True)
            return (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD) if cfg is None else (tuple(cfg.mean), tuple(cfg.std))
        if settings.encoder_weights is True:
            from segmentation_models_pytorch.encoders import get_preprocessing_params

            params = get_preprocessing_params(name, IMAGENET)
            return tuple(params['mean']), tuple(params['std'])
    return IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD


def schedule_arguments(settings: SegmentSettings) -> Dict[str, Any]:
    """Arguments of timm's `create_scheduler_v2`, whose epochs are iterations here.

    As in Detectron2, 'multistep' divides the learning rate by ten at each of `steps`; 'poly' and 'cosine' end at 0. In
    the first `warmup` iterations, the rate rises from a thousandth of `lr`.
    """
    schedule = {'sched': settings.schedule, 'warmup_epochs': settings.warmup, 'warmup_lr': settings.lr / 1000}
    if settings.schedule == 'multistep':
        # timm changes the rate one update before a milestone
        schedule.update(decay_milestones=[step + 1 for step in settings.steps], decay_rate=0.1)
    elif settings.schedule == 'poly':
        schedule.update(decay_rate=settings.power)
    return schedule


class _Run:
    """State of a run: what it trains, on which images, and what it writes."""

    def __init__(
            self,
            data_dir: Union[str, Path],
            out: Path,
            settings: SegmentSettings,
            workers: int,
            accelerator: 'Accelerator',
            progress: bool,
    ) -> None:
        self.out, self.settings, self.workers, self.accelerator = out, settings, workers, accelerator
        self.progress = progress
        mean, std = encoder_statistics(settings)
        self.mean, self.std = settings.mean or mean, settings.std or std
        self.train_data = load_dataset(settings.format, data_dir, 'train')
        self.train_data.transform = train_transform(
            settings.crop_size, settings.scale, settings.hflip, self.mean, self.std, self.train_data.flip_pairs)
        self.val_data = load_dataset(settings.format, data_dir, 'val', eval_transform(self.mean, self.std))
        for data in (self.train_data, self.val_data):
            data.map_labels(settings.label_map)
        self.classes = self.train_data.classes
        if self.val_data.classes != self.classes:
            raise InputError(f'data set {data_dir} has other classes in its training part than in its validation part')

        torch.manual_seed(settings.seed)
        model = create_segmenter(settings, len(self.classes))
        self.loop = Loop(
            model, accelerator,
            {'opt': settings.opt, 'lr': settings.lr, 'weight_decay': settings.weight_decay,
             'momentum': settings.momentum},
            schedule_arguments(settings), settings.iterations, settings.batch_size, settings.seed, settings.ema_decay)
        check_input_size(self.loop.model, (3, *settings.crop_size), settings.encoder_name)
        self.fingerprint = {
            **asdict(settings), 'crop_size': list(settings.crop_size), 'scale': list(settings.scale),
            'mean': list(self.mean), 'std': list(self.std), 'classes': self.classes,
            'label_map': settings.label_map and {str(key): label for key, label in settings.label_map.items()},
            'train_images': len(self.train_data)}
        self.encoder_weights = recorded_path(settings.encoder_weights)  # once, as it reads all weights of a folder
        self.validation: Dict[str, Any] = {}  # describes the validation part, once it was checked
        self.metrics: Optional[SegmentMetrics] = None  # of the last evaluation
        if isinstance(settings.eval_size, tuple):
            self.fingerprint['eval_size'] = list(settings.eval_size)

    def check_data(self) -> None:
        """Check all images and masks, and report how often each class occurs.

        Raises:
            InputError: One of them cannot be used, or only one of at most two classes occurs in the masks.
        """
        parts = {'train': self.train_data, 'val': self.val_data}
        counts = {name: count_labels(data, self.progress) for name, data in parts.items()}
        for name, data in parts.items():
            check_classes(data, counts[name], name)
        names = [image.name for image, _ in self.val_data.samples]
        self.validation = {
            'images': len(names), 'names': sha256(json.dumps(names).encode()).hexdigest(),
            'pixels': counts['val'].pixels}
        absent = describe_absent(self.classes, counts['train'])
        if self.progress:
            tqdm.write('\n'.join([*describe_counts(self.classes, counts), *filter(None, [absent])]))
        elif absent and self.accelerator.is_main_process:
            _logger.warning(absent)

    def loss_of(self, logits: torch.Tensor, masks: torch.Tensor) -> torch.Tensor:
        """Cross entropy of a process, scaled so that its mean over processes is the mean over all non-ignored pixels.

        Args:
            logits: Logits (B, classes, H, W).
            masks: Classes (B, H, W), 255 for ignored pixels. If all pixels are ignored, the loss is 0.
        """
        ignored = SegmentationDataset.ignore_index
        total = F.cross_entropy(logits.float(), masks, ignore_index=ignored, reduction='sum')
        count = self.accelerator.reduce((masks != ignored).sum(), 'sum')
        return total * self.accelerator.num_processes / count.clamp(min=1)

    def evaluate(self) -> Dict[str, float]:
        """Evaluate the kept model on the validation images, each process on its share."""
        indices = self.loop.share(len(self.val_data))
        loader = DataLoader(Subset(self.val_data, indices), num_workers=self.workers)
        bar = tqdm(
            read_batches(loader), desc='evaluating', total=len(indices), disable=None if self.progress else True,
            leave=False, position=0)
        self.metrics = evaluate(self.loop.kept_model, bar, len(self.classes), self.settings.eval_size)
        return {'miou': self.metrics.miou, 'pixel_accuracy': self.metrics.pixel_accuracy}

    def keep(self, line: Dict[str, float]) -> None:
        """Write the kept model if it is better than any before."""
        if line['miou'] > max((before['miou'] for before in self.loop.history[:-1]), default=-1.):
            self.write_model(self.out / 'best')

    def write_model(self, path: Path) -> None:
        """Write the kept model, with the metrics of the last evaluation."""
        measures = {
            f'mIoU on {len(self.val_data)} validation images': f'{100 * self.metrics.miou:.2f} %',
            'pixel accuracy': f'{100 * self.metrics.pixel_accuracy:.2f} %', 'iterations': self.loop.iteration}
        write_segmenter(
            path, self.loop.kept_model, self.classes, self.mean, self.std, self.settings.eval_size,
            self.settings.label_map,
            f'{len(self.train_data)} images in the layout {self.settings.format!r}, {len(self.classes)} classes',
            measures, {'program': PROGRAM, 'arguments': self.arguments()})

    def arguments(self) -> Dict[str, Any]:
        """The settings, without paths on this machine."""
        return {**self.fingerprint, 'encoder_weights': self.encoder_weights}

    def load(self, checkpoint: Path) -> None:
        """Resume a run. If the validation part has changed, only a warning is given."""
        tensors, metadata = read_state(checkpoint, PROGRAM)
        self.loop.load(tensors, metadata, self.out, self.fingerprint)
        before = metadata['validation']
        if before != self.validation:
            _logger.warning(
                f'the validation part is not the one of the run so far ({before["images"]} images then, '
                f'{self.validation["images"]} now): metrics up to iteration {self.loop.iteration} and best/ are based '
                'on the old one')

    def train(self, checkpoint: Path) -> None:
        """Train to the end."""
        def describe(line: Dict[str, float]) -> str:
            return (
                f'iteration {line["iteration"]}: training loss {line["train_loss"]:.3f}, mIoU {100 * line["miou"]:.2f} '
                f'%, pixel accuracy {100 * line["pixel_accuracy"]:.2f} %')

        self.loop.run(
            read_batches(self.loop.batches(self.train_data, self.workers)), self.loss_of, self.evaluate, self.keep,
            lambda: self.loop.save(checkpoint, PROGRAM, self.fingerprint, validation=self.validation),
            self.settings.eval_every, self.settings.checkpoint_every, describe, self.progress)
        if self.metrics is None:  # resumed after the last evaluation
            self.evaluate()


def train_segmenter(
        data_dir: Union[str, Path],
        out: Union[str, Path],
        settings: SegmentSettings,
        resume: bool = False,
        overwrite: bool = False,
        workers: int = 0,
        device: Optional[str] = None,
        progress: bool = True,
) -> SegmentResult:
    """Train a segmentation model.

    This process may be the only one, or one of those started by `accelerate launch`. All images and masks are checked
    before the first iteration (`count_labels`). The whole state is written every `checkpoint_every` iterations, and
    before and after each evaluation, so that a run killed at any moment can be resumed from there, with the same result
    on the same machine. In a distributed run on GPUs, batch norms take their statistics over all processes, as in the
    paper.

    Args:
        data_dir: Folder of the data set, in the layout of `settings.format`.
        out: Folder to write: `best/` and `last/` (models) and `history.csv`; also `checkpoint.safetensors` until
            training ends.
        settings: Settings that decide the outcome.
        resume: Resume the run in `out`, if there is one.
        overwrite: Start anew even if `out` holds a run.
        workers: Number of processes that load images for each training process; 0 for none.
        device: 'cpu', 'cuda' or 'mps'; None for the one that accelerate finds.
        progress: Print the result of each evaluation, with a progress bar if standard error is a terminal.

    Raises:
        RunFinishedError: `resume` is given, but the run is finished.
        InputError: Data, settings or `out` cannot be used, or another process is training into `out`.
        OSError: `out` cannot be written.
    """
    with run_folder(Path(out)):
        return _train(data_dir, Path(out), settings, resume, overwrite, workers, device, progress)


def _decisive_settings(settings: SegmentSettings) -> Dict[str, Any]:
    """What a finished run with these settings must have recorded: mean and std may have been the encoder's."""
    recorded = {**asdict(settings), 'encoder_weights': recorded_path(settings.encoder_weights)}
    return {k: v for k, v in recorded.items() if k not in ('mean', 'std') or v is not None}


def _train(
        data_dir: Union[str, Path],
        out: Path,
        settings: SegmentSettings,
        resume: bool,
        overwrite: bool,
        workers: int,
        device: Optional[str],
        progress: bool,
) -> SegmentResult:
    checkpoint, best_dir, last_dir = out / 'checkpoint.safetensors', out / 'best', out / 'last'
    if not overwrite:
        check_run_folder(
            checkpoint, last_dir, [best_dir, out / 'history.csv'], resume, lambda: _decisive_settings(settings))
    start = time.monotonic()
    with accelerator_of(device, settings.precision) as accelerator:
        if settings.precision == 'fp16' and accelerator.device.type == 'cpu':  # accelerate would go on in float32
            raise InputError('precision fp16 is for GPUs, on a CPU no and bf16 are allowed')
        main = accelerator.is_main_process
        run = _Run(data_dir, out, settings, workers, accelerator, progress and main)
        run.check_data()
        if main and overwrite:
            checkpoint.unlink(missing_ok=True)
        accelerator.wait_for_everyone()
        if resume and checkpoint.exists():
            run.load(checkpoint)
            _logger.info(f'resuming after iteration {run.loop.iteration} of {settings.iterations}')
        run.train(checkpoint)
        if main:
            run.write_model(last_dir)
            write_history(out / 'history.csv', run.loop.history)
            checkpoint.unlink()
        run.loop.end()
    return SegmentResult(
        best_dir, last_dir, max(line['miou'] for line in run.loop.history), run.metrics, time.monotonic() - start)
