"""Lazy exports: packages import what they export on first use, so that `import vt_zoo` stays cheap."""
import sys
from importlib import import_module
from typing import Any, Callable, Dict, List, Sequence, Tuple


def exports(
        package: str,
        names: Dict[str, Sequence[str]],
        packages: Sequence[str] = (),
) -> Tuple[List[str], Callable[[str], Any], Callable[[], List[str]]]:
    """Create what a package needs to export names of its modules lazily.

    Args:
        package: Name of the package.
        names: Names to export from each module.
        packages: Subpackages to export.

    Returns:
        `__all__`, `__getattr__` and `__dir__` of the package.
    """
    modules = {name: module for module, found in names.items() for name in found}

    def find(name: str) -> Any:
        if name in packages:
            return import_module(f'{package}.{name}')
        if name not in modules:
            raise AttributeError(f'module {package!r} has no attribute {name!r}')
        return getattr(import_module(f'{package}.{modules[name]}'), name)

    def names_for_completion() -> List[str]:
        return sorted({*(name for name in vars(sys.modules[package]) if name.startswith('__')), *modules, *packages})

    return sorted([*modules, *packages]), find, names_for_completion
