"""Where modules of 0.1 are now: an import of the old path gives the new module with a DeprecationWarning, until 0.3."""
import sys
import warnings
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import spec_from_loader
from types import ModuleType
from typing import Any, Optional

MOVED = {
    'vt_zoo.analysis.capture': 'vt_zoo.analysis.records',
    'vt_zoo.analysis.count': 'vt_zoo.analysis.cost',
    'vt_zoo.analysis.subject': 'vt_zoo.weights.load',
    'vt_zoo.checkpoint': 'vt_zoo.weights.files',
    'vt_zoo.convert': 'vt_zoo.weights.conversion',
    'vt_zoo.digits': 'vt_zoo.data.digits',
    'vt_zoo.finetune': 'vt_zoo.classification.train',
    'vt_zoo.folders': 'vt_zoo.data.folders',
    'vt_zoo.hub': 'vt_zoo.weights.hub',
    'vt_zoo.image_stream': 'vt_zoo.data.image_stream',
    'vt_zoo.images': 'vt_zoo.data.images',
    'vt_zoo.model_card': 'vt_zoo.weights.model_card',
    'vt_zoo.publish': 'vt_zoo.weights.publish',
    'vt_zoo.quantize': 'vt_zoo.export.int8',
    'vt_zoo.run_state': 'vt_zoo.training.run_state',
    'vt_zoo.seeding': 'vt_zoo.data.seeding',
    'vt_zoo.segmentation.composed_digits': 'vt_zoo.data.composed_digits',
    'vt_zoo.segmentation.evaluate': 'vt_zoo.segmentation.metrics',
    'vt_zoo.segmentation.label_map': 'vt_zoo.data.label_map',
    'vt_zoo.segmentation.model_files': 'vt_zoo.weights.segmenters',
}


class _Finder(MetaPathFinder, Loader):

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> Optional[ModuleSpec]:
        return spec_from_loader(fullname, self) if fullname in MOVED else None

    def exec_module(self, module: ModuleType) -> None:
        old = module.__name__
        warnings.warn(f'{old} is {MOVED[old]} since vt_zoo 0.2', DeprecationWarning, stacklevel=2)
        sys.modules[old] = import_module(MOVED[old])


def install() -> None:
    """Let old paths be found."""
    sys.meta_path.append(_Finder())
