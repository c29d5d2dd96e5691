"""Helpers that several test files import."""
import pytest
import timm

from vt_zoo._requirements import timm_is_at_least
from vt_zoo.checkpoint import load_model

TIMM_READS_FOLDERS = timm_is_at_least('1.0.31')

# for tests in which timm itself loads a folder
needs_timm_that_reads_folders = pytest.mark.skipif(
    not TIMM_READS_FOLDERS, reason='timm before 1.0.31 unpickles the weights of a folder, whatever they are')


def load_folder(folder):
    """The model of a folder in timm's hub layout, by timm alone where it reads them."""
    if TIMM_READS_FOLDERS:
        return timm.create_model(f'local-dir:{folder}', pretrained=True).eval()
    return load_model(str(folder))
