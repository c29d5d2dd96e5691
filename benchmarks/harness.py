"""What benchmarks share: the machine, resumable runs side by side, training on tensors, the peak of memory."""
import argparse
import json
import os
import platform
import re
import statistics
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Callable, Dict, Iterable, Iterator, List, Optional, Sequence, Tuple

import timm
import torch
import torch.nn.functional as F
from timm.scheduler import create_scheduler_v2
from tqdm import tqdm

import vt_zoo
from vt_zoo.errors import InputError
from vt_zoo.files import whole

CPU_FLAGS = ('avx2', 'avx512f', 'avx512_vnni', 'avx512_bf16', 'avx512_fp16', 'amx_bf16', 'amx_int8')


def versions() -> str:
    """Of Python and the libraries that decide a result."""
    return (
        f'Python {platform.python_version()}, torch {torch.__version__}, timm {timm.__version__}, vt_zoo '
        f'{vt_zoo.__version__}')


def environment(*more: str, device: str = 'cpu') -> str:
    """The machine and the versions, with more of them."""
    gpu = [] if device == 'cpu' else [torch.cuda.get_device_name()]
    return ', '.join([platform.machine(), f'{os.cpu_count()} CPU cores', *gpu, versions(), *more])


def environments(runs: List[dict]) -> str:
    """Where runs were made, as a sentence."""
    return f'{"; ".join(dict.fromkeys(run["environment"] for run in runs))}.'


def at_least(least: int) -> Callable[[str], int]:
    """Type of an option that is a whole number."""
    def read(word: str) -> int:
        if not word.isdecimal() or int(word) < least:
            raise argparse.ArgumentTypeError(f'must be a whole number of at least {least}, got {word}')
        return int(word)
    return read


@contextmanager
def complaints(parser: argparse.ArgumentParser) -> Iterator[None]:
    """Turn what is wrong with the data or the models into an error of the command line, exit status 2."""
    try:
        yield
    except InputError as e:
        parser.error(str(e))


def add_device(parser: argparse.ArgumentParser) -> None:
    """Add the option `--device`, which refuses a GPU that is not there."""
    def available(name: str) -> str:
        if name == 'cpu' or (name == 'cuda' and torch.cuda.is_available()):
            return name
        raise argparse.ArgumentTypeError(f'must be cpu, or cuda where torch finds a GPU, got {name}')

    parser.add_argument('--device', type=available, default='cpu', help='cpu or cuda (default: %(default)s)')


def add_runs(parser: argparse.ArgumentParser, seeds: List[int]) -> None:
    """Add the options `--seeds`, with this default, and `--jobs`."""
    parser.add_argument(
        '--seeds', type=at_least(0), nargs='+', default=seeds,
        help=f'a run each (default: {" ".join(map(str, seeds))})')
    parser.add_argument(
        '--jobs', type=at_least(1), default=2, help='runs at a time, one thread each (default: %(default)s)')


def machine() -> str:
    """The CPU and what decides its speed; on Linux."""
    cpu = Path('/proc/cpuinfo').read_text()
    flags = set(re.search(r'^flags\s*:(.*)', cpu, re.M)[1].split())
    return (
        f'{re.search(r"^model name.*: (.*)", cpu, re.M)[1]} ({" ".join(f for f in CPU_FLAGS if f in flags)}), '
        f'{len(os.sched_getaffinity(0))} cores, {torch.get_num_threads()} threads')


def read_runs(log: Path) -> List[dict]:
    """Runs that a log records; none where there is no log."""
    return json.loads(log.read_text())['runs'] if log.exists() else []


def run_all(
        work: Callable[..., dict],
        jobs: List[tuple],
        log: Path,
        environment: str,
        processes: int,
        report: Optional[Callable[[List[dict]], str]] = None,
) -> List[dict]:
    """Run the jobs that a log does not record, and write it after each; a failure is raised at the end.

    Args:
        work: Called with a job, in a process of its own; returns measures.
        jobs: What is to be run, as values by name which are recorded with the measures, and what else the work needs.
        log: JSON file to write.
        environment: Machine and versions, which are recorded with each run.
        processes: Jobs at a time.
        report: Makes Markdown of the runs, for a file beside the log; None where it needs all runs.

    Returns:
        All runs that the log then records.
    """
    runs = read_runs(log)
    if report is not None and runs:
        report(runs)  # a log that it cannot read stops here, not after hours
    missing = [job for job in jobs if not any(job[0].items() <= run.items() for run in runs)]
    with ProcessPoolExecutor(processes, get_context('spawn')) as pool:
        futures = {pool.submit(work, *job): job[0] for job in missing}
        for future in tqdm(as_completed(futures), desc='runs', total=len(futures)):
            if future.exception() is None:
                runs = read_runs(log)  # again: another process may have added some
                runs.append({**futures[future], **future.result(), 'environment': environment})
                write_runs(log, runs, report)
    for future in futures:
        future.result()
    return runs


def write_runs(
        log: Path,
        runs: List[dict],
        report: Optional[Callable[[List[dict]], str]] = None,
) -> None:
    """Write runs to a log, and what `report` makes of them beside it."""
    with whole(log) as new:
        new.write_text(json.dumps({'runs': runs}, indent=1) + '\n')
    if report is not None:
        with whole(log.with_suffix('.md')) as new:
            new.write_text(report(runs))


def mean_and_spread(values: Sequence[float], digits: int = 2) -> str:
    """The mean over seeds, with its standard deviation where there are several."""
    spread = f' ± {statistics.stdev(values):.{digits}f}' if len(values) > 1 else ''
    return f'{statistics.mean(values):.{digits}f}{spread}'


def cross_entropy(
        model: torch.nn.Module,
        images: torch.Tensor,
        classes: torch.Tensor,
        autocast: Optional[torch.dtype] = None,
        smoothing: float = 0.,
) -> torch.Tensor:
    """Loss of a batch; `autocast` is the type in which the model runs what may be in it, None for float32."""
    with torch.autocast(images.device.type, autocast, enabled=autocast is not None):
        logits = model(images)
    return F.cross_entropy(logits.float(), classes, label_smoothing=smoothing)


def train_epochs(
        model: torch.nn.Module,
        data: Tuple[torch.Tensor, torch.Tensor],
        optimizer: torch.optim.Optimizer,
        orders: Iterable[torch.Tensor],
        epochs: int,
        batch_size: int,
        warmup_lr: float,
        first: int = 0,
        loss_of: Callable[[torch.nn.Module, torch.Tensor, torch.Tensor], torch.Tensor] = cross_entropy,
) -> Iterator[float]:
    """Train with one epoch of warm-up and a cosine, step by step; whole batches only.

    Args:
        model: Gives logits.
        data: Images (N, C, H, W), or what gives images of indices, and classes (N,), on the model's device.
        optimizer: Its learning rate is the peak.
        orders: Permutations of the images, one an epoch that is left.
        epochs: Number of epochs.
        batch_size: Images a step.
        warmup_lr: Rate of the first step.
        first: Epochs that were trained already.
        loss_of: Loss of the model on images and classes.

    Yields:
        Mean training loss of each epoch, after it.
    """
    x, y = data
    steps = len(y) // batch_size
    scheduler, _ = create_scheduler_v2(
        optimizer, 'cosine', num_epochs=epochs, warmup_epochs=1, warmup_lr=warmup_lr, step_on_epochs=False,
        updates_per_epoch=steps)
    for epoch, order in enumerate(orders, first):
        model.train()
        total = 0.
        for step, batch in enumerate(order[:steps * batch_size].split(batch_size)):
            scheduler.step_update(epoch * steps + step)
            loss = loss_of(model, x[batch], y[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total = total + loss.detach()
        yield total.item() / steps


@torch.inference_mode()
def accuracy(model: torch.nn.Module, x: torch.Tensor, y: torch.Tensor, batch_size: int) -> float:
    """Accuracy in percent."""
    model.eval()
    return 100 * torch.cat([model(part).argmax(1) for part in x.split(batch_size)]).eq(y).float().mean().item()


def reset_peak() -> None:
    """Set the peak back to what is in use."""
    Path('/proc/self/clear_refs').write_text('5')


def peak_bytes() -> int:
    """The peak since it was last reset."""
    return 1024 * int(re.search(r'VmHWM:\s+(\d+) kB', Path('/proc/self/status').read_text())[1])


def time_in_turns(
        works: Dict[Any, Callable[[], Any]],
        rounds: int,
        warm_up: int,
        desc: str,
        untimed: int = 0,
        clock: Callable[[], float] = time.perf_counter,
) -> Dict[Any, List[float]]:
    """Time works that take turns, so that drift of the machine hits all alike.

    Args:
        works: What to call.
        rounds: Times of each.
        warm_up: Rounds before them, which do not count.
        desc: Name on the progress bar.
        untimed: Calls of a work in its turn before the one that is timed.
        clock: Gives seconds.

    Returns:
        Seconds of each call of each work.
    """
    seconds = {key: [] for key in works}
    for _ in tqdm(range(warm_up + rounds), desc):
        for key, work in works.items():
            for _ in range(untimed):
                work()
            start = clock()
            work()
            seconds[key].append(round(clock() - start, 7))
    return {key: values[warm_up:] for key, values in seconds.items()}


def speed_up(base: Sequence[float], own: Sequence[float]) -> str:
    """Speed-up over the base: median and quartiles of the ratios in each round."""
    low, median, high = statistics.quantiles([b / o for b, o in zip(base, own)], n=4, method='inclusive')
    return f'{median:.2f} ({low:.2f} to {high:.2f})'


def table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> List[str]:
    """Lines of a table in Markdown, with an empty one before and after it."""
    cells = [columns, ['---'] * len(columns), *rows]
    return ['', *(f'| {" | ".join(map(str, row))} |' for row in cells), '']
