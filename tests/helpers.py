"""Helpers that several test files import."""
import re

import pytest
import timm

from vt_zoo.checkpoint import load_model

TIMM_READS_FOLDERS = [int(n) for n in re.findall(r'\d+', timm.__version__)[:3]] >= [1, 0, 31]

# for tests in which timm itself loads a folder
needs_timm_that_reads_folders = pytest.mark.skipif(
    not TIMM_READS_FOLDERS, reason='timm before 1.0.31 unpickles the weights of a folder, whatever they are')


def load_folder(folder):
    """The model of a folder in timm's hub layout, by timm alone where it reads them."""
    if TIMM_READS_FOLDERS:
        return timm.create_model(f'local-dir:{folder}', pretrained=True).eval()
    return load_model(str(folder))
