"""Helpers that several test files import."""
import re
import subprocess
import sys
from dataclasses import replace

import pytest
import timm
import torch

from vt_zoo._requirements import timm_is_at_least
from vt_zoo.weights.loading import load_model

TIMM_READS_FOLDERS = timm_is_at_least('1.0.31')

# for tests in which timm itself loads a folder
needs_timm_that_reads_folders = pytest.mark.skipif(
    not TIMM_READS_FOLDERS, reason='timm before 1.0.31 unpickles the weights of a folder, whatever they are')


def load_folder(folder):
    """The model of a folder in timm's hub layout, by timm alone where it reads them."""
    if TIMM_READS_FOLDERS:
        return timm.create_model(f'local-dir:{folder}', pretrained=True).eval()
    return load_model(str(folder))


def as_in_version_0_1(state_dict):
    """A state dict of ours with the names of vt_zoo 0.1: norms of value and query maps, no learned filters."""
    maps = [
        n for n in state_dict
        if re.search(r'(tokenizers?(\.\d+)?\.value|projectors?(\.\d+)?\.query)\.conv\.weight$', n)]
    assert maps
    norms = {n.replace('.conv.', '.norm.'): torch.ones(len(state_dict[n])) for n in maps}
    kept = {n: t for n, t in state_dict.items() if not (n.endswith('tokenizer.filters.weight') and t.ndim == 2)}
    return {**kept, **norms}


def with_eval_size(loaded, eval_size):
    """A segmenter of `vt_zoo.load` for images of a short side, of (height, width), or as they are."""
    fixed = isinstance(eval_size, tuple)
    size = {'input_size': (3, *(eval_size if fixed else (None, None))), 'short_side': None if fixed else eval_size}
    return replace(loaded, preprocessing={**loaded.preprocessing, **size})


def words_of(settings):
    return [word for name, value in settings.items() for word in (f'--{name.replace("_", "-")}', str(value))]


def run_by_two(launcher, two_processes, words):
    """What a command prints in two processes, of `accelerate launch` or of the fixture `two_processes`."""
    if launcher == 'accelerate':
        process = subprocess.run(
            [sys.executable, '-m', 'accelerate.commands.launch', '--multi_gpu', '--num_processes', '2', '-m', 'vt_zoo',
             *words], capture_output=True, text=True, timeout=300)
        assert process.returncode == 0, process.stderr
        return process.stdout
    results = two_processes(*words)
    assert [r.code for r in results] == [0, 0], results[0].stderr
    return ''.join(r.stdout for r in results)
