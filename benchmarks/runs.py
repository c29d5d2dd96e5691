"""Runs of a benchmark side by side, one thread each; every one is recorded when it ends."""
import json
import statistics
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Callable, List, Optional, Sequence

from tqdm import tqdm

from vt_zoo.files import whole


def read_runs(log: Path) -> List[dict]:
    """Runs that a log records; none where there is no log."""
    return json.loads(log.read_text())['runs'] if log.exists() else []


def run_all(
        work: Callable[..., dict],
        jobs: List[tuple],
        runs: List[dict],
        log: Path,
        environment: str,
        processes: int,
        report: Optional[Callable[[List[dict], str], str]] = None,
) -> None:
    """Run jobs, append what each returns to `runs`, and write all of them after each.

    Args:
        work: Called with the words of a job, in a process of its own.
        jobs: Words of each job.
        runs: Runs so far, to append to.
        log: JSON file to write.
        environment: Machine and versions, for the log.
        processes: Jobs at a time.
        report: Makes Markdown of the runs and the environment, for a file beside the log; None where it needs all runs.
    """
    with ProcessPoolExecutor(processes, get_context('spawn')) as pool:
        futures = [pool.submit(work, *job) for job in jobs]
        for future in tqdm(as_completed(futures), desc='runs', total=len(futures)):
            runs.append(future.result())
            write_runs(log, runs, environment, report)


def write_runs(
        log: Path,
        runs: List[dict],
        environment: str,
        report: Optional[Callable[[List[dict], str], str]] = None,
) -> None:
    """Write runs to a log, and what `report` makes of them beside it."""
    with whole(log) as new:
        new.write_text(json.dumps({'environment': environment, 'runs': runs}, indent=1) + '\n')
    if report is not None:
        with whole(log.with_suffix('.md')) as new:
            new.write_text(report(runs, environment))


def mean_and_spread(values: Sequence[float], digits: int = 2) -> str:
    """The mean over seeds, with its standard deviation where there are several."""
    spread = f' ± {statistics.stdev(values):.{digits}f}' if len(values) > 1 else ''
    return f'{statistics.mean(values):.{digits}f}{spread}'
