"""Training a segmentation model: plain torch, with accelerate for devices, mixed precision and several processes."""
import gc
import json
import logging
import os
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, Dict, Iterator, List, Optional, Tuple, Union

import torch
import torch.nn as nn
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import broadcast
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import convert_sync_batchnorm
from timm.models import get_pretrained_cfg
from timm.optim import create_optimizer_v2
from timm.utils import ModelEmaV3
from torch.utils.data import DataLoader, Subset
from tqdm import tqdm

from .._moved import old_names
from ..data.seeding import seed_of
from ..devices import find_device
from ..errors import InputError, first_line
from ..files import run_folder
from ..models import segmenter_classes
from ..training.run_state import check_run_folder, check_same_run, load_state, state_tensors, write_history
from ..weights.files import read_tensors, write_segmenter, write_tensors
from ..weights.loading import check_input_size
from .datasets import SegmentationDataset, load_dataset
from .label_counts import check_classes, count_labels, describe_absent, describe_counts
from .metrics import SegmentMetrics, evaluate, read_batches
from .sampling import IterationBatches, SeededDataset
from .schedule import learning_rate
from .settings import SegmentSettings
from .transforms import eval_transform, train_transform

__all__ = ['SegmentResult', 'create_segmenter', 'train_segmenter']

__getattr__ = old_names(__name__)

_logger = logging.getLogger(__name__)


@dataclass
class SegmentResult:
    """Outcome of a run.

    Attributes:
        best_dir: Folder of the model with the highest mean IoU on the validation images.
        last_dir: Folder of the model after the last iteration.
        best_miou: Mean IoU of the first, 0 to 1.
        last: Measures of the second.
        seconds: Time of this call.
    """
    best_dir: Path
    last_dir: Path
    best_miou: float
    last: SegmentMetrics
    seconds: float


def create_segmenter(settings: SegmentSettings, num_classes: int) -> nn.Module:
    """Create the model that settings name.

    Raises:
        InputError: There is no such encoder, or its weights cannot be had.
    """
    kwargs: Dict[str, Any] = {'pyramid_channels': settings.pyramid_channels, 'head_channels': settings.head_channels}
    if settings.arch == 'vt_fpn':
        kwargs.update(num_tokens=settings.num_tokens, token_dim=settings.token_dim)
    weights = None
    if settings.encoder_weights:
        weights = True if settings.encoder_name.startswith('tu-') else 'imagenet'
    try:
        return segmenter_classes()[settings.arch](
            encoder_name=settings.encoder_name, encoder_weights=weights, classes=num_classes, **kwargs)
    except InputError:
        raise
    except Exception as e:  # timm, segmentation_models_pytorch and the hub's client each raise their own
        raise InputError(f'encoder {settings.encoder_name!r} cannot be made: {first_line(e)[:200]}') from e


def encoder_statistics(encoder_name: str) -> Tuple[Tuple[float, ...], Tuple[float, ...]]:
    """Mean and std that an encoder was trained with; ImageNet's where that is not known."""
    cfg = get_pretrained_cfg(encoder_name[3:], allow_unregistered=True) if encoder_name.startswith('tu-') else None
    if cfg is None:
        return IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
    return tuple(cfg.mean), tuple(cfg.std)


def _segmentation_loss(logits: torch.Tensor, masks: torch.Tensor, accelerator: Accelerator) -> torch.Tensor:
    """Cross entropy of a process, whose mean over the processes is that over all their pixels that are not ignored.

    Args:
        logits: (B, classes, H, W).
        masks: Classes (B, H, W), 255 where a pixel is ignored. Where all are, the loss is 0.
        accelerator: Of the processes.
    """
    ignored = SegmentationDataset.ignore_index
    total = F.cross_entropy(logits.float(), masks, ignore_index=ignored, reduction='sum')
    count = accelerator.reduce((masks != ignored).sum(), 'sum')
    return total * accelerator.num_processes / count.clamp(min=1)


class _Run:
    """The state of a run: what a checkpoint holds."""

    def __init__(
            self,
            data_dir: Union[str, Path],
            settings: SegmentSettings,
            workers: int,
            accelerator: Accelerator,
    ) -> None:
        self.settings, self.workers, self.accelerator = settings, workers, accelerator
        mean, std = encoder_statistics(settings.encoder_name)
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
        if accelerator.num_processes > 1 and accelerator.device.type == 'cuda':
            model = convert_sync_batchnorm(model)
        try:
            optimizer = create_optimizer_v2(
                model, opt=settings.opt, lr=settings.lr, weight_decay=settings.weight_decay, momentum=settings.momentum)
        except (TypeError, ValueError, AssertionError) as e:
            raise InputError(f'opt must be an optimizer of timm, got {settings.opt!r}: {first_line(e)}') from e
        self.ema = None
        if settings.ema_decay:
            self.ema = ModelEmaV3(model.to(accelerator.device), settings.ema_decay, use_warmup=True)
        self.trained, self.optimizer = accelerator.prepare(model, optimizer)
        check_input_size(self.model, (3, *settings.crop_size), settings.encoder_name)
        self.iteration = 0
        self.history: List[Dict[str, float]] = []
        self.losses: List[float] = []  # since the last evaluation
        self.fingerprint = {
            **asdict(settings), 'crop_size': list(settings.crop_size), 'scale': list(settings.scale),
            'mean': list(self.mean), 'std': list(self.std), 'classes': self.classes,
            'label_map': settings.label_map and {str(key): label for key, label in settings.label_map.items()},
            'train_images': len(self.train_data)}
        self.validation: Dict[str, Any] = {}  # what the validation part is, once it was looked at
        if isinstance(settings.eval_size, tuple):
            self.fingerprint['eval_size'] = list(settings.eval_size)

    def check_data(self, progress: bool) -> None:
        """Look at all images and masks, and say how often each class occurs.

        Args:
            progress: Print it, with a progress bar before; else warn of classes that do not occur.

        Raises:
            InputError: One cannot be used, or all masks of a set of two classes are of one.
        """
        parts = {'train': self.train_data, 'val': self.val_data}
        counts = {name: count_labels(data, progress) for name, data in parts.items()}
        for name, data in parts.items():
            check_classes(data, counts[name], name)
        names = [image.name for image, _ in self.val_data.samples]
        self.validation = {
            'images': len(names), 'names': sha256(json.dumps(names).encode()).hexdigest(),
            'pixels': counts['val'].pixels}
        absent = describe_absent(self.classes, counts['train'])
        if progress:
            tqdm.write('\n'.join([*describe_counts(self.classes, counts), *filter(None, [absent])]))
        elif absent and self.accelerator.is_main_process:
            _logger.warning(absent)

    @property
    def model(self) -> nn.Module:
        """The model that is trained, without what distributes it."""
        return self.accelerator.unwrap_model(self.trained)

    @property
    def kept_model(self) -> nn.Module:
        """The model that is evaluated and kept: the moving average, where there is one."""
        return self.model if self.ema is None else self.ema.module

    def train_batches(self) -> Iterator[Tuple[torch.Tensor, torch.Tensor]]:
        """Batches of this process, from the iteration at which the run is."""
        sampler = IterationBatches(
            len(self.train_data), self.settings.batch_size, self.iteration, self.settings.iterations,
            self.settings.seed, self.accelerator.process_index, self.accelerator.num_processes)
        return read_batches(DataLoader(
            SeededDataset(self.train_data), batch_sampler=sampler, num_workers=self.workers,
            pin_memory=self.accelerator.device.type == 'cuda'))

    def step(self, images: torch.Tensor, masks: torch.Tensor) -> float:
        """One iteration; gives the loss."""
        rate = learning_rate(self.settings, self.iteration)
        for group in self.optimizer.param_groups:
            group['lr'] = rate
        # of dropout in an encoder: another in each process, and the same in a run that goes on
        torch.manual_seed(seed_of(
            self.settings.seed, self.iteration * self.settings.batch_size + self.accelerator.process_index))
        self.trained.train()
        try:
            logits = self.trained(images.to(self.accelerator.device))
        except ValueError as e:  # batch norm of a single value a channel
            size = '{}x{}'.format(*self.settings.crop_size)
            raise InputError(f'a batch of {len(images)} crops of {size} cannot be trained: {first_line(e)}') from e
        loss = _segmentation_loss(logits, masks.to(self.accelerator.device), self.accelerator)
        self.optimizer.zero_grad()
        self.accelerator.backward(loss)
        self.optimizer.step()
        self.iteration += 1
        if self.ema is not None:
            self.ema.update(self.model, step=self.iteration)
        value = self.accelerator.reduce(loss.detach(), 'mean').item()
        if not value < float('inf'):
            raise InputError(
                f'the loss became {value} in iteration {self.iteration}: try a lower lr than {self.settings.lr}')
        self.losses.append(value)
        return value

    def evaluation_is_due(self) -> bool:
        """Whether the run is at an iteration at which it is evaluated, and was not yet."""
        measured = self.history[-1]['iteration'] if self.history else 0
        at_end = self.iteration == self.settings.iterations
        return self.iteration > measured and (at_end or self.iteration % self.settings.eval_every == 0)

    def evaluate(self, progress: bool) -> SegmentMetrics:
        """Measure the kept model on the validation images, each process on its share."""
        broadcast(list(self.kept_model.buffers()))  # batch statistics, which are the processes' own on CPU
        indices = range(self.accelerator.process_index, len(self.val_data), self.accelerator.num_processes)
        loader = DataLoader(Subset(self.val_data, indices), num_workers=self.workers)
        bar = tqdm(
            read_batches(loader), desc='evaluating', total=len(indices), disable=None if progress else True,
            leave=False, position=0)
        return evaluate(self.kept_model, bar, len(self.classes), self.settings.eval_size)

    def record(self, metrics: SegmentMetrics) -> Dict[str, float]:
        """Add a line to the history."""
        self.history.append({
            'iteration': self.iteration, 'train_loss': sum(self.losses) / max(len(self.losses), 1),
            'miou': metrics.miou, 'pixel_accuracy': metrics.pixel_accuracy})
        self.losses = []
        return self.history[-1]

    def write_model(self, path: Path, metrics: SegmentMetrics) -> None:
        """Write the kept model."""
        measures = {
            f'mIoU on {len(self.val_data)} validation images': f'{100 * metrics.miou:.2f} %',
            'pixel accuracy': f'{100 * metrics.pixel_accuracy:.2f} %', 'iterations': self.iteration}
        write_segmenter(
            path, self.kept_model, self.classes, self.mean, self.std, self.settings.eval_size, self.settings.label_map,
            f'{len(self.train_data)} images in the layout {self.settings.format!r}, {len(self.classes)} classes',
            measures, {'program': 'vt-zoo segment train', 'arguments': self.fingerprint})

    def _modules(self) -> Dict[str, nn.Module]:
        return {'model': self.model, **({} if self.ema is None else {'ema': self.ema.module})}

    def save(self, path: Path) -> None:
        """Write the state after an iteration."""
        tensors, scalars = state_tensors(self._modules(), self.optimizer)
        scaler = self.accelerator.scaler
        write_tensors(path, tensors, {
            'segmentation': self.fingerprint, 'validation': self.validation, 'iteration': self.iteration,
            'history': self.history,
            'losses': self.losses, 'optimizer': scalars, 'scaler': scaler and scaler.state_dict()})

    def load(self, path: Path) -> None:
        """Read a state that `save` wrote. Another validation part is no hindrance, a warning says so.

        Raises:
            InputError: It belongs to a run with other settings or training data.
        """
        tensors, metadata = read_tensors(path)
        if 'segmentation' not in metadata:
            raise InputError(f'checkpoint {path} is not one of `vt-zoo segment train`')
        theirs = {'label_map': None, **metadata['segmentation']}
        validation = metadata.get('validation') or {'images': theirs.pop('val_images', None)}
        check_same_run(path.parent, theirs, self.fingerprint)
        load_state(tensors, metadata['optimizer'], self._modules(), self.optimizer)
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(metadata['scaler'])
        self.iteration, self.history, self.losses = metadata['iteration'], metadata['history'], metadata['losses']
        if any(self.validation[name] != value for name, value in validation.items()):
            _logger.warning(
                f'the validation part is another than in the run so far ({validation["images"]} images then, '
                f'{self.validation["images"]} now): measures up to iteration {self.iteration} and best/ are of the old '
                'one')

    def end(self) -> None:
        """Free what distributes the model, then part from the other processes.

        The other way round it is the model that frees gloo, and waits for its threads while they wait for Python.
        """
        del self.trained, self.optimizer
        self.accelerator.free_memory()
        gc.collect()
        self.accelerator.end_training()


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

    One process of `accelerate launch`, or the only one. All images and masks are looked at before the first iteration
    (`count_labels`). The whole state is written every `checkpoint_every` iterations and before and after each
    evaluation, so that a run that was killed at any moment goes on from there, to the same result on the same machine.
    Batch norms of a distributed run on GPUs take their statistics over all processes, as in the paper.

    Args:
        data_dir: Folder of the data set, in the layout of `settings.format`.
        out: Folder to write: `best/` and `last/` (models), `history.csv`; `checkpoint.safetensors` while training goes
            on.
        settings: What decides the outcome.
        resume: Go on with the run that `out` holds, if it holds one.
        overwrite: Begin anew where `out` holds a run.
        workers: Processes that load images, for each that trains; 0 for none.
        device: 'cpu', 'cuda' or 'mps'; what accelerate finds where None.
        progress: Say what each evaluation gave, with a progress bar where standard error is a terminal.

    Raises:
        RunFinishedError: `resume`, and the run is finished.
        InputError: Data, settings or `out` cannot be used, or another process trains into `out`.
        OSError: `out` cannot be written.
    """
    is_main = os.environ.get('RANK', '0') == '0'
    with run_folder(Path(out)) if is_main else nullcontext():
        return _train(data_dir, Path(out), settings, resume, overwrite, workers, device, progress)


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
        check_run_folder(checkpoint, last_dir, resume, asdict(settings))
    if device is not None:
        device = find_device(device).type
    start = time.monotonic()
    try:
        accelerator = Accelerator(cpu=device == 'cpu', mixed_precision=settings.precision)
    except ValueError as e:
        raise InputError(f'precision {settings.precision} cannot be had here: {first_line(e)}') from e
    if device not in (None, accelerator.device.type):
        raise InputError(f'device {device} cannot be had here, accelerate gives {accelerator.device.type}')
    if settings.precision == 'fp16' and accelerator.device.type == 'cpu':  # accelerate would go on in float32
        raise InputError('precision fp16 is for GPUs, on a CPU allowed are no and bf16')
    main = accelerator.is_main_process
    progress = progress and main

    run = _Run(data_dir, settings, workers, accelerator)
    if settings.batch_size < accelerator.num_processes:
        raise InputError(
            f'batch_size must be at least the number of processes, {accelerator.num_processes}, '
            f'got {settings.batch_size}')
    run.check_data(progress)
    if main and overwrite:
        checkpoint.unlink(missing_ok=True)
    accelerator.wait_for_everyone()
    if resume and checkpoint.exists():
        run.load(checkpoint)
        _logger.info(f'resuming after iteration {run.iteration} of {settings.iterations}')

    bar = tqdm(
        total=settings.iterations, initial=run.iteration, desc='training', unit='iteration',
        disable=None if progress else True, leave=False)
    metrics = None

    def evaluate_and_record() -> SegmentMetrics:
        bar.clear()  # whose line the evaluation's takes
        metrics = run.evaluate(progress)
        before = max((line['miou'] for line in run.history), default=-1.)
        line = run.record(metrics)
        if main and metrics.miou > before:
            run.write_model(best_dir, metrics)
        if main:
            run.save(checkpoint)
        if progress:
            tqdm.write(
                f'iteration {run.iteration}: training loss {line["train_loss"]:.3f}, '
                f'mIoU {100 * metrics.miou:.2f} %, pixel accuracy {100 * metrics.pixel_accuracy:.2f} %')
        return metrics

    with bar:
        if run.evaluation_is_due():  # which did not end well before
            metrics = evaluate_and_record()
        for images, masks in run.train_batches():
            loss = run.step(images, masks)
            bar.set_postfix_str(f'loss {loss:.3f}', refresh=False)
            bar.update()
            due = run.evaluation_is_due()
            if main and (due or run.iteration % settings.checkpoint_every == 0):
                run.save(checkpoint)
            if due:
                metrics = evaluate_and_record()

    if metrics is None:  # resumed after the last iteration
        metrics = run.evaluate(progress)
    if main:
        run.write_model(last_dir, metrics)
        write_history(out / 'history.csv', run.history)
        checkpoint.unlink()
    run.end()
    return SegmentResult(
        best_dir, last_dir, max(line['miou'] for line in run.history), metrics, time.monotonic() - start)
