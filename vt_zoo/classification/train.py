"""Training on a folder of images on one machine, from timm's own parts.

For ImageNet, several GPUs and all of timm's options there is timm's train.py.
"""
import json
import logging
import math
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Dict, List, Optional, Tuple, Union

import timm
import torch
import torch.nn as nn
import torch.nn.functional as F
from huggingface_hub import get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
from timm.data import create_loader, resolve_data_config
from timm.data.auto_augment import auto_augment_policy
from timm.models import create_model, get_arch_pretrained_cfgs, list_pretrained
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import ModelEmaV3, random_seed
from tqdm import tqdm

from .._version import __version__
from ..data.images import ImageFolder, Split, describe_split, find_split, image_mode
from ..devices import find_device
from ..errors import MAX_PIXELS, InputError
from ..files import run_folder
from ..training.run_state import check_run_folder, check_same_run, load_state, state_tensors, write_history
from ..weights.files import read_tensors, write_model, write_tensors
from ..weights.hub import WEIGHTS, find_hub_id, hub_reason
from ..weights.loading import check_input_size, check_name, load_model

__all__ = ['FinetuneResult', 'FinetuneSettings', 'finetune']

_logger = logging.getLogger(__name__)


DECIDED = {  # arguments of a model that are not for `model_kwargs`
    'num_classes', 'drop_rate', 'drop_path_rate', 'pretrained', 'checkpoint_path', 'features_only', 'pretrained_cfg',
    'pretrained_cfg_overlay'}


@dataclass
class FinetuneSettings:
    """What decides the outcome of a run. Names are those of timm's train.py; `vt-zoo finetune --help` explains them.

    The defaults are section 5.1 of the paper (SGD with momentum 0.9, weight decay 4e-5) with a learning rate for small
    batches, and a cosine instead of steps, since runs here are short.
    """
    model: str = 'vt_resnet18'
    model_kwargs: Dict[str, Any] = field(default_factory=dict)  # arguments of timm.create_model
    epochs: int = 30
    batch_size: int = 32
    img_size: Optional[int] = None  # the model's own
    opt: str = 'momentum'
    lr: float = 0.05
    weight_decay: float = 4e-5
    warmup_epochs: int = 2
    smoothing: float = 0.1
    drop: float = 0.
    drop_path: float = 0.
    model_ema_decay: float = 0.998
    scale: Tuple[float, float] = (0.35, 1.0)
    ratio: Tuple[float, float] = (3 / 4, 4 / 3)
    hflip: float = 0.5
    color_jitter: float = 0.4
    aa: Optional[str] = None
    val_fraction: float = 0.2
    seed: int = 0
    precision: str = 'auto'


@dataclass
class FinetuneResult:
    """Outcome of a run; accuracies are counts over the held-out images."""
    model_dir: Path
    correct: int
    total: int
    reloaded_correct: int
    same_predictions: bool
    seconds: float
    val_samples: List[Tuple[str, int]] = field(repr=False)


@torch.inference_mode()
def evaluate(model: nn.Module, loader: Any, device: torch.device) -> Tuple[Dict[str, float], torch.Tensor]:
    """Run a model over a loader, in float32.

    Returns:
        The mean `loss` and the accuracy `top1` in percent; and the predicted class of each image (N,).
    """
    model.eval()
    losses, targets, predictions = [], [], []
    for x, target in loader:
        output, target = model(x.to(device)), target.to(device)
        losses.append(F.cross_entropy(output, target, reduction='none'))
        targets.append(target)
        predictions.append(output.argmax(-1))
    predicted = torch.cat(predictions)
    top1 = (predicted == torch.cat(targets)).double().mean()
    return {'loss': torch.cat(losses).double().mean().item(), 'top1': 100 * top1.item()}, predicted.cpu()


def _has_weights(name_or_dir: str) -> bool:
    return Path(name_or_dir).is_dir() or ':' in name_or_dir or name_or_dir in list_pretrained()


def _starting_point(name: str) -> str:
    """What to start from: a bare name gets the tag of its trunk, or where it has none its `untrained` tag.

    Raises:
        InputError: The hub does not give the trunk.
    """
    tagged = {} if '.' in name or Path(name).is_dir() else get_arch_pretrained_cfgs(name)
    untrained = f'{name}.untrained'
    for trunk, config in tagged.items():
        if not trunk.startswith(f'{name}.trunk_'):
            continue
        file = config.hf_hub_id, WEIGHTS
        try:
            if not isinstance(try_to_load_from_cache(*file), str):
                get_hf_file_metadata(hf_hub_url(*file))  # one request, a download would be tried again and again
        except Exception as e:  # the hub's client raises its own errors, the system's and those of its HTTP library
            raise InputError(
                f'model {name} starts from the trunk {config.hf_hub_id}, which the hub does not give '
                f'({hub_reason(e)}): model {untrained} starts from random weights') from e
        _logger.info(f'starting from {trunk}; --model {untrained} begins new')
        return trunk
    return untrained if untrained in tagged else name


def _create_model(name: str, settings: FinetuneSettings, num_classes: int, pretrained: bool) -> nn.Module:
    decided = sorted(DECIDED & settings.model_kwargs.keys())
    if decided:
        raise InputError(f'model_kwargs must not hold {decided[0]}, which data and other settings decide')
    kwargs = {
        'num_classes': num_classes, 'drop_rate': settings.drop, 'drop_path_rate': settings.drop_path,
        **settings.model_kwargs}
    if _has_weights(name) and (pretrained or name not in list_pretrained()):
        return load_model(name, **kwargs)
    check_name(name)
    try:
        return create_model(name, **kwargs)
    except Exception as e:  # what a model does not take, and the hub's client where model_kwargs ask for weights
        raise InputError(f'model {name!r} cannot be trained here: {hub_reason(e)}') from e


def _check_policy(name: Optional[str]) -> None:
    """Raise an error where timm knows no such policy, which it does itself by `assert` alone."""
    if name and not name.startswith(('rand', 'augmix')) and auto_augment_policy(name.split('-')[0]) is None:
        raise ValueError(name)


def _create_loaders(split: Split, settings: FinetuneSettings, data_config: Dict[str, Any], workers: int, device):
    mode = image_mode(data_config['input_size'][0])
    common = {
        'input_size': data_config['input_size'], 'mean': data_config['mean'], 'std': data_config['std'],
        'interpolation': data_config['interpolation'], 'num_workers': workers, 'device': device,
        'pin_memory': device.type == 'cuda', 'persistent_workers': False,  # which would not learn of the epoch
    }
    try:
        _check_policy(settings.aa)
        train = create_loader(
            ImageFolder(split.train, mode=mode, seed=settings.seed),
            batch_size=min(settings.batch_size, len(split.train)), is_training=True, scale=settings.scale,
            ratio=settings.ratio, hflip=settings.hflip, color_jitter=settings.color_jitter,
            auto_augment=settings.aa, **common)
    except (AssertionError, ValueError) as e:
        raise InputError(f'aa must be an AutoAugment policy of timm, as rand-m9-mstd0.5, got {settings.aa!r}') from e
    val = create_loader(
        ImageFolder(split.val, mode=mode), batch_size=min(settings.batch_size, len(split.val)),
        crop_pct=data_config['crop_pct'], **common)
    return train, val


def _amp_dtype(precision: str, device: torch.device) -> Optional[torch.dtype]:
    if precision == 'auto':
        if device.type != 'cuda':
            return None
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
    return {'float32': None, 'bfloat16': torch.bfloat16, 'float16': torch.float16}[precision]


class _Run:
    """The state of a run: what a checkpoint holds."""

    def __init__(
            self,
            settings: FinetuneSettings,
            start: str,
            pretrained: bool,
            split: Split,
            workers: int,
            device: torch.device,
    ) -> None:
        random_seed(settings.seed)
        self.settings, self.start, self.device = settings, start, device
        model = _create_model(start, settings, len(split.classes), pretrained)
        model.to(device, memory_format=torch.channels_last)  # a training step on CPU is a third faster
        size = {'img_size': settings.img_size, 'in_chans': model.pretrained_cfg['input_size'][0]}
        self.data_config = resolve_data_config(size if settings.img_size else {}, model=model)
        logits = check_input_size(model, self.data_config['input_size'], settings.model)
        if not isinstance(logits, torch.Tensor) or logits.shape != (1, model.num_classes):  # as without pooling
            raise InputError(f'model {settings.model} with these model_kwargs does not give one logit a class')
        pixels = math.prod(self.data_config['input_size'][1:])
        if min(settings.batch_size, len(split.train)) * pixels > MAX_PIXELS:
            raise InputError(
                f'batch_size must be at most {MAX_PIXELS // pixels} for images of this size, got {settings.batch_size}')
        self.train_loader, self.val_loader = _create_loaders(split, settings, self.data_config, workers, device)
        self.model = model
        self.ema = ModelEmaV3(model, decay=settings.model_ema_decay, use_warmup=True)
        self.optimizer = create_optimizer_v2(
            model, opt=settings.opt, lr=settings.lr, weight_decay=settings.weight_decay, momentum=0.9)
        self.scheduler, _ = create_scheduler_v2(
            self.optimizer, 'cosine', num_epochs=settings.epochs, warmup_epochs=settings.warmup_epochs,
            warmup_lr=settings.lr / 100, step_on_epochs=False, updates_per_epoch=len(self.train_loader))
        self.amp_dtype = _amp_dtype(settings.precision, device)
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.amp_dtype == torch.float16)
        self.history: List[Dict[str, float]] = []
        self.fingerprint = {
            **json.loads(json.dumps(asdict(settings))), 'classes': split.classes, 'train_images': len(split.train),
            'val_images': len(split.val)}

    @property
    def ema_model(self) -> nn.Module:
        return self.ema.module

    def train_epoch(self, epoch: int, progress: bool) -> float:
        """Train for one epoch and return the mean loss."""
        random_seed(self.settings.seed, epoch + 1)
        self.train_loader.dataset.epoch = epoch
        self.model.train()
        update = epoch * len(self.train_loader)
        losses = []
        bar = tqdm(
            self.train_loader, desc=f'epoch {epoch + 1}/{self.settings.epochs}', disable=None if progress else True,
            leave=False)
        for x, target in bar:
            self.scheduler.step_update(update)
            with torch.autocast(self.device.type, self.amp_dtype, enabled=self.amp_dtype is not None):
                loss = F.cross_entropy(self.model(x), target, label_smoothing=self.settings.smoothing)
            self.optimizer.zero_grad()
            self.scaler.scale(loss).backward()
            self.scaler.step(self.optimizer)
            self.scaler.update()
            update += 1
            self.ema.update(self.model, step=update)
            losses.append(loss.detach())
        mean = torch.stack(losses).mean().item()
        if not mean < float('inf'):
            raise InputError(f'the loss became {mean} in epoch {epoch + 1}: try a lower lr than {self.settings.lr}')
        return mean

    def save(self, path: Path) -> None:
        """Write the state after an epoch."""
        tensors, scalars = state_tensors({'model': self.model, 'ema': self.ema_model}, self.optimizer)
        write_tensors(path, tensors, {
            'fingerprint': self.fingerprint, 'start': self.start, 'history': self.history, 'optimizer': scalars,
            'scaler': self.scaler.state_dict()})

    def load(self, tensors: Dict[str, torch.Tensor], metadata: Dict[str, Any], out: Path) -> None:
        """Take over a state that `save` wrote in the folder `out`.

        Raises:
            InputError: It belongs to a run with other settings or data.
        """
        check_same_run(out, metadata['fingerprint'], self.fingerprint)
        load_state(tensors, metadata['optimizer'], {'model': self.model, 'ema': self.ema_model}, self.optimizer)
        self.scaler.load_state_dict(metadata['scaler'])
        self.history = metadata['history']


def _describe_start(settings: FinetuneSettings, name: str) -> Dict[str, Any]:
    """What `config.json` says of the settings and of what training starts from, without paths of this machine."""
    is_folder = Path(name.removeprefix('local-dir:')).is_dir()
    pretrained = _has_weights(name)
    return {
        'program': 'vt-zoo finetune',
        'versions': {'vt_zoo': __version__, 'timm': timm.__version__, 'torch': torch.__version__},
        'arguments': {**asdict(settings), 'model': 'a local folder' if is_folder else name},
        'pretrained': pretrained, 'base_model': find_hub_id(name) if pretrained and not is_folder else None,
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
    """Train a model on a folder of images, and check that its files give the same predictions.

    The weights that are validated and kept are the moving average, after the last epoch: picking the best epoch by the
    held-out images would make their accuracy look better than it is. After each epoch the whole state is written, so
    that a run that was killed at any moment goes on from its last complete epoch, to the same result on the same
    machine, with any number of workers.

    A bare name of a model that has a trunk (`vt_resnet18`) starts from it; a name with a tag (`vt_resnet18.untrained`)
    is what it says. A run that goes on needs no hub.

    Args:
        data_dir: Folder of images (see `vt_zoo.data.images.find_split`).
        out: Folder to write: `model/` (timm's hub layout; its `config.json` tells settings and result) and
            `history.csv`; `checkpoint.safetensors` while training goes on.
        settings: What decides the outcome.
        resume: Go on with the run that `out` holds, if it holds one.
        overwrite: Begin anew where `out` holds a run.
        workers: Processes that load images; 0 for none.
        device: As for `find_device`.
        progress: Say what each epoch gave, with a progress bar where standard error is a terminal.

    Returns:
        The result. `correct` of `total` held-out images are right; `reloaded_correct` says the same of the files.

    Raises:
        RunFinishedError: `resume`, and the run is finished.
        InputError: Data, settings or `out` cannot be used, the hub does not give the trunk, or another process trains
            into `out`.
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
        check_run_folder(checkpoint, model_dir, resume, {**asdict(settings), 'model': None})
    device = find_device(device)
    start = time.monotonic()

    goes_on = resume and not overwrite and checkpoint.exists()
    tensors, metadata = read_tensors(checkpoint) if goes_on else ({}, {})
    if goes_on and 'start' not in metadata:
        raise InputError(f'checkpoint {checkpoint} is not one of `vt-zoo finetune`')
    classes = metadata['fingerprint']['classes'] if goes_on else ()
    split = find_split(data_dir, settings.val_fraction, settings.seed, progress, classes)
    if goes_on:
        run = _Run(settings, metadata['start'], False, split, workers, device)
        run.load(tensors, metadata, out)
        _logger.info(f'resuming after epoch {len(run.history)} of {settings.epochs}')
    else:
        run = _Run(settings, _starting_point(settings.model), True, split, workers, device)
    training = _describe_start(settings, run.start)
    if overwrite:
        checkpoint.unlink(missing_ok=True)

    if progress:
        tqdm.write('\n'.join(describe_split(split)))
    for epoch in range(len(run.history), settings.epochs):
        loss = run.train_epoch(epoch, progress)
        metrics, _ = evaluate(run.ema_model, run.val_loader, device)
        run.history.append({
            'epoch': epoch + 1, 'train_loss': loss, 'val_loss': metrics['loss'], 'val_top1': metrics['top1']})
        run.save(checkpoint)
        if progress:
            tqdm.write(f'epoch {epoch + 1:3d}: training loss {loss:.3f}, held-out accuracy {metrics["top1"]:.2f} %')

    _, predictions = evaluate(run.ema_model, run.val_loader, device)
    targets = torch.tensor([t for _, t in split.val])
    correct = int((predictions == targets).sum())
    training.update(
        epochs=settings.epochs, weights='moving average', train_images=len(split.train), val_images=len(targets),
        val_correct=correct)
    run.ema_model.to(memory_format=torch.contiguous_format)  # as safetensors wants it
    write_model(model_dir, run.ema_model, split.classes, run.data_config, training)
    reloaded = load_model(str(model_dir)).to(device, memory_format=torch.channels_last)
    _, reloaded_predictions = evaluate(reloaded, run.val_loader, device)
    write_history(out / 'history.csv', run.history)
    checkpoint.unlink()

    return FinetuneResult(
        model_dir=model_dir,
        correct=correct,
        total=len(targets),
        reloaded_correct=int((reloaded_predictions == targets).sum()),
        same_predictions=bool(torch.equal(predictions, reloaded_predictions)),
        seconds=time.monotonic() - start,
        val_samples=split.val,
    )
