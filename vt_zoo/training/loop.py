"""The training loop for both tasks: schedule, precision, moving average, multiple processes, state on disk."""
import gc
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Callable, Dict, Iterable, Iterator, List, Optional, Tuple

import torch
import torch.nn as nn
from timm.layers import convert_sync_batchnorm
from timm.optim import create_optimizer_v2, get_optimizer_info
from timm.scheduler import create_scheduler_v2
from timm.utils import ModelEmaV3
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from ..data.seeding import seed_of
from ..devices import find_device
from ..errors import InputError, first_line
from ..weights.files import read_tensors, write_tensors
from .run_state import check_same_run, load_state, state_tensors
from .sampling import IterationBatches, SeededDataset

if TYPE_CHECKING:
    from accelerate import Accelerator

Batch = Tuple[torch.Tensor, torch.Tensor]
LossOf = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
Measures = Dict[str, float]


@contextmanager
def accelerator_of(device: Optional[str], precision: str) -> Iterator['Accelerator']:
    """Context manager for an Accelerator, which handles the device and joins the processes of `accelerate launch`.

    Args:
        device: 'cpu', 'cuda' or 'mps'; None for the one that accelerate finds.
        precision: 'no', 'bf16' or 'fp16'.

    Raises:
        InputError: The device or precision is not available here.
    """
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    is_first = not AcceleratorState._shared_state
    if device is not None:
        found = find_device(device)
        if found.index is not None:
            raise InputError(
                f'device must be cpu, cuda or mps, got {device}: choose a GPU by CUDA_VISIBLE_DEVICES')
        device = found.type
    try:
        accelerator = Accelerator(cpu=device == 'cpu', mixed_precision=precision)
    except ValueError as e:
        raise InputError(f'precision {precision} is not available here: {first_line(e)}') from e
    try:
        if device not in (None, accelerator.device.type):
            raise InputError(f'device {device} is not available here, accelerate gives {accelerator.device.type}')
        yield accelerator
    finally:
        if is_first and accelerator.num_processes == 1:  # so that the next run may have another precision or device
            AcceleratorState._reset_state(reset_partial_state=True)


def to_channels_last(model: nn.Module) -> nn.Module:
    """Lay out the weights of convolutions as channels last, in place: on a CPU, training steps take up to a third less.

    `nn.Module.to` would do so, but refuses models with 3D convolutions.
    """
    for parameter in model.parameters():
        if parameter.ndim == 4:
            parameter.data = parameter.data.to(memory_format=torch.channels_last)
    return model


class Loop:
    """The training of a model by one or several processes, and its state.

    Progress is reported in units: a unit is an iteration, or an epoch of several iterations.

    Attributes:
        iteration: Number of iterations so far.
        history: A line of metrics for each evaluation.
    """

    def __init__(
            self,
            model: nn.Module,
            accelerator: 'Accelerator',
            optimizer: Dict[str, Any],
            schedule: Dict[str, Any],
            iterations: int,
            batch_size: int,
            seed: int,
            ema_decay: float = 0.,
            unit: str = 'iteration',
            unit_iterations: int = 1,
    ) -> None:
        """
        Args:
            model: The model to train; it is moved to the accelerator's device, in channels last.
            accelerator: Accelerator from `accelerator_of`.
            optimizer: Arguments of timm's `create_optimizer_v2`.
            schedule: Arguments of timm's `create_scheduler_v2`, whose epochs are units.
            iterations: Number of iterations.
            batch_size: Samples per iteration, over all processes.
            seed: Random seed of order, augmentation and dropout.
            ema_decay: Decay of the moving average of the weights; 0 for no moving average.
            unit: Name of the unit.
            unit_iterations: Number of iterations per unit.

        Raises:
            InputError: There is no such optimizer, or there are more processes than samples in a batch.
        """
        if batch_size < accelerator.num_processes:
            raise InputError(
                f'batch_size must be at least the number of processes, {accelerator.num_processes}, got {batch_size}')
        model = to_channels_last(model.to(accelerator.device))
        if accelerator.num_processes > 1 and accelerator.device.type == 'cuda':
            model = convert_sync_batchnorm(model)
        try:
            if get_optimizer_info(optimizer['opt'].lower().removeprefix('lookahead_')).second_order:
                raise ValueError('it needs second derivatives')
            created = create_optimizer_v2(model, **optimizer)
        except (TypeError, ValueError, AssertionError) as e:
            raise InputError(f'opt must be an optimizer of timm, got {optimizer["opt"]!r}: {first_line(e)}') from e
        self.scheduler, _ = create_scheduler_v2(
            created, num_epochs=iterations // unit_iterations, step_on_epochs=False, updates_per_epoch=unit_iterations,
            **schedule)
        self.ema = ModelEmaV3(model, ema_decay, use_warmup=True) if ema_decay else None
        self.accelerator, self.lr = accelerator, optimizer['lr']
        self.iterations, self.batch_size, self.seed = iterations, batch_size, seed
        self.unit, self.unit_iterations = unit, unit_iterations
        self.trained, self.optimizer = accelerator.prepare(model, created)
        accelerator.unwrap_model(self.trained, keep_fp32_wrapper=False)  # evaluation is in float32, `step` is not
        self.iteration = 0
        self.history: List[Measures] = []
        self.losses: List[float] = []  # since the last evaluation

    @property
    def device(self) -> torch.device:
        """Device of this process."""
        return self.accelerator.device

    @property
    def model(self) -> nn.Module:
        """The model being trained, without its distributed wrapper."""
        return self.accelerator.unwrap_model(self.trained)

    @property
    def kept_model(self) -> nn.Module:
        """The model that is evaluated and kept: the moving average if there is one."""
        return self.model if self.ema is None else self.ema.module

    def batches(self, dataset: Dataset, workers: int) -> DataLoader:
        """Create the loader of this process's batches, starting from the current iteration.

        The random numbers of a sample depend only on the seed and its number, not on the process that loads it.
        """
        sampler = IterationBatches(
            len(dataset), self.batch_size, self.iteration, self.iterations, self.seed, self.accelerator.process_index,
            self.accelerator.num_processes)
        return DataLoader(
            SeededDataset(dataset), batch_sampler=sampler, num_workers=workers, pin_memory=self.device.type == 'cuda')

    def share(self, number: int) -> range:
        """Indices of the samples, out of `number`, that this process evaluates."""
        return range(self.accelerator.process_index, number, self.accelerator.num_processes)

    def step(self, images: torch.Tensor, targets: torch.Tensor, loss_of: LossOf) -> float:
        """Run one iteration.

        Args:
            images: Images of this process (B, C, H, W).
            targets: Targets of this process, passed to the loss.
            loss_of: Function of outputs and targets, whose mean over the processes is the loss of the whole batch.

        Returns:
            The mean loss over the processes.

        Raises:
            InputError: The batch cannot be trained on, or the loss is not finite.
        """
        self.scheduler.step_update(self.iteration)
        # for dropout: different in each process, but the same in a resumed run
        torch.manual_seed(seed_of(self.seed, self.iteration * self.batch_size + self.accelerator.process_index))
        self.trained.train()
        try:
            with self.accelerator.autocast():
                outputs = self.trained(images.to(self.device))
        except ValueError as e:  # batch norm of a single value per channel
            size = 'x'.join(map(str, images.shape[-2:]))
            raise InputError(f'a batch of {len(images)} images of {size} cannot be trained on: {first_line(e)}') from e
        loss = loss_of(outputs.float(), targets.to(self.device))
        self.optimizer.zero_grad()
        self.accelerator.backward(loss)
        self.optimizer.step()
        self.iteration += 1
        if self.ema is not None:
            self.ema.update(self.model, step=self.iteration)
        value = self.accelerator.reduce(loss.detach(), 'mean').item()
        if not value < float('inf'):
            number = -(-self.iteration // self.unit_iterations)
            raise InputError(f'the loss became {value} in {self.unit} {number}: try a lower lr than {self.lr}')
        self.losses.append(value)
        return value

    def run(
            self,
            batches: Iterable[Batch],
            loss_of: LossOf,
            evaluate: Callable[[], Measures],
            keep: Callable[[Measures], None],
            save: Callable[[], None],
            evaluate_every: int,
            save_every: int,
            describe: Callable[[Measures], str],
            progress: bool,
    ) -> None:
        """Train until the last iteration. Every process must call this.

        Args:
            batches: Batches of the remaining iterations, from `batches()`.
            loss_of: As in `step`.
            evaluate: Evaluates the kept model, each process on its share.
            keep: Called by the first process with the new line of the history, before the state is written.
            save: Writes the state; called by the first process, also before and after each evaluation.
            evaluate_every: Iterations between evaluations; there is also one at the end.
            save_every: Iterations between writes of the state.
            describe: Turns a line of the history into text.
            progress: Print this text, with a progress bar if standard error is a terminal.
        """
        main = self.accelerator.is_main_process
        bar = tqdm(
            total=self.iterations, initial=self.iteration, desc='training', unit='iteration',
            disable=None if progress else True, leave=False)

        def is_due() -> bool:
            measured = self.history[-1][self.unit] * self.unit_iterations if self.history else 0
            at_end = self.iteration == self.iterations
            return self.iteration > measured and (at_end or self.iteration % evaluate_every == 0)

        def measure() -> None:
            bar.clear()  # the evaluation's bar takes its line
            self._share_buffers()
            measures = evaluate()
            self.history.append({
                self.unit: self.iteration // self.unit_iterations,
                'train_loss': sum(self.losses) / max(len(self.losses), 1), **measures})
            self.losses = []
            if main:
                keep(self.history[-1])
                save()
            if progress:
                tqdm.write(describe(self.history[-1]))

        with bar:
            if is_due():  # the evaluation that was interrupted before
                measure()
            for images, targets in batches:
                loss = self.step(images, targets, loss_of)
                bar.set_postfix_str(f'loss {loss:.3f}', refresh=False)
                bar.update()
                due = is_due()
                if main and (due or self.iteration % save_every == 0):
                    save()
                if due:
                    measure()

    def _share_buffers(self) -> None:
        """Copy the batch statistics of the first process to the others, since on CPU each has its own."""
        from accelerate.utils import broadcast

        broadcast(list(self.kept_model.buffers()))

    def _modules(self) -> Dict[str, nn.Module]:
        return {'model': self.model, **({} if self.ema is None else {'ema': self.ema.module})}

    def save(self, path: Path, program: str, fingerprint: Dict[str, Any], **more: Any) -> None:
        """Write the state after an iteration.

        Args:
            path: File to write.
            program: Name of the program that runs the training.
            fingerprint: Settings and data that decide the run, as JSON-serializable values.
            **more: Further JSON-serializable values to write.
        """
        tensors, scalars = state_tensors(self._modules(), self.optimizer)
        scaler = self.accelerator.scaler
        write_tensors(path, tensors, {
            'program': program, 'fingerprint': fingerprint, 'iteration': self.iteration, 'history': self.history,
            'losses': self.losses, 'optimizer': scalars, 'scaler': scaler and scaler.state_dict(), **more})

    def load(self, tensors: Dict[str, torch.Tensor], metadata: Dict[str, Any], out: Path, fingerprint: Dict) -> None:
        """Load a state that `read_state` returned.

        Raises:
            InputError: The state belongs to a run with settings or data other than `fingerprint`.
        """
        check_same_run(out, metadata['fingerprint'], fingerprint)
        load_state(tensors, metadata['optimizer'], self._modules(), self.optimizer)
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(metadata['scaler'])
        self.iteration, self.history, self.losses = metadata['iteration'], metadata['history'], metadata['losses']

    def end(self) -> None:
        """Free the distributed model, then leave the other processes.

        In the opposite order, freeing the model would free gloo and wait for its threads, which wait for Python.
        """
        del self.trained, self.optimizer, self.scheduler
        self.accelerator.free_memory()
        gc.collect()
        self.accelerator.end_training()


def read_state(path: Path, program: str) -> Tuple[Dict[str, torch.Tensor], Dict[str, Any]]:
    """Read a file written by `Loop.save`.

    Raises:
        InputError: The file is damaged, or belongs to another program.
    """
    tensors, metadata = read_tensors(path)
    if metadata.get('program') != program:
        raise InputError(
            f'checkpoint {path} is not one of `{program}` of this version: add --overwrite to start anew')
    return tensors, metadata
