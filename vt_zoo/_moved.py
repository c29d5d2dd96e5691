"""Import paths and names of version 0.1, which work until 0.3, with a DeprecationWarning."""
import sys
import warnings
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import spec_from_loader
from operator import attrgetter
from types import ModuleType
from typing import Any, Callable, Optional

MODULES = {  # old modules, and the modules that have their names now
    'vt_zoo.analysis.capture': ['vt_zoo.analysis.records'],
    'vt_zoo.analysis.count': ['vt_zoo.analysis.cost'],
    'vt_zoo.analysis.subject': ['vt_zoo.weights.loading'],
    'vt_zoo.checkpoint': ['vt_zoo.weights.files', 'vt_zoo.weights.loading', 'vt_zoo.files'],
    'vt_zoo.convert': ['vt_zoo.weights.conversion'],
    'vt_zoo.digits': ['vt_zoo.data.digits'],
    'vt_zoo.finetune': ['vt_zoo.classification.train', 'vt_zoo.classification.settings'],
    'vt_zoo.folders': ['vt_zoo.data.folders'],
    'vt_zoo.hub': ['vt_zoo.weights.hub'],
    'vt_zoo.image_stream': ['vt_zoo.data.image_stream'],
    'vt_zoo.images': ['vt_zoo.data.images'],
    'vt_zoo.model_card': ['vt_zoo.weights.model_card'],
    'vt_zoo.publish': ['vt_zoo.weights.publish'],
    'vt_zoo.quantize': ['vt_zoo.export.int8'],
    'vt_zoo.run_state': ['vt_zoo.training.run_state'],
    'vt_zoo.seeding': ['vt_zoo.data.seeding'],
    'vt_zoo.segmentation.composed_digits': ['vt_zoo.data.composed_digits'],
    'vt_zoo.segmentation.evaluate': ['vt_zoo.segmentation.metrics', 'vt_zoo.data.images'],
    'vt_zoo.segmentation.label_map': ['vt_zoo.data.label_map'],
    'vt_zoo.segmentation.model_files': ['vt_zoo.weights.loading', 'vt_zoo.segmentation.train'],
}
NAMES = {
    'Subject': 'Loaded', 'capture': 'capture_tokens', 'create_segmentation_model': 'create_segmenter',
    'load_segmentation_model': 'load', 'load_subject': 'load'}
KEPT = {  # modules that still exist, and what each of their old names is now
    'vt_zoo.layers': {
        'KMeans': 'kmeans.KMeans', 'PixelLinear': 'linear.PixelLinear', 'PositionCode': 'position_code.PositionCode',
        'TokenLinear': 'linear.TokenLinear', 'TokenNorm': 'linear.TokenNorm',
        'create_logit_norm': 'linear.create_logit_norm', 'merge_heads': 'attention.merge_heads',
        'pixel_groups': 'linear.pixel_groups', 'split_heads': 'attention.split_heads',
        'token_grid': 'tokenizer.token_grid'},
    'vt_zoo.segmentation.settings': {
        'list_segmentation_recipes': 'SegmentSettings.recipes', 'read_settings': 'SegmentSettings.read'},
    'vt_zoo.segmentation.train': {'train': 'train_segmenter'},
}


class _OldModule(ModuleType):

    def __getattr__(self, name: str) -> Any:
        new = NAMES.get(name, name)
        for module in map(import_module, MODULES[self.__name__]):
            if not name.startswith('__') and hasattr(module, new):
                warnings.warn(
                    f'{self.__name__}.{name} is {module.__name__}.{new} since vt_zoo 0.2', DeprecationWarning,
                    stacklevel=2)
                return getattr(module, new)
        raise AttributeError(f'module {self.__name__!r} has no attribute {name!r}')


class _Finder(MetaPathFinder, Loader):

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> Optional[ModuleSpec]:
        return spec_from_loader(fullname, self) if fullname in MODULES else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return _OldModule(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        """Do nothing, as names are found when they are accessed."""


def find_old_modules() -> None:
    """Let `import` find the modules of version 0.1."""
    sys.meta_path.append(_Finder())


def old_names(module: str) -> Callable[[str], Any]:
    """Create `__getattr__` of a module that still exists, for its names in version 0.1."""

    def find(name: str) -> Any:
        if name not in KEPT[module]:
            raise AttributeError(f'module {module!r} has no attribute {name!r}')
        new = KEPT[module][name]
        warnings.warn(f'{name} is {module}.{new} since vt_zoo 0.2', DeprecationWarning, stacklevel=2)
        return attrgetter(new)(import_module(module))
    return find
