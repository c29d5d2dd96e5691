"""Exporting trained models, in their inference form, to files for other runtimes, which are checked before use."""
import importlib
import io
import json
import logging
import warnings
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Optional, Tuple, Union

import torch
import torch.nn as nn
from timm.utils import reparameterize_model

from .._version import __version__
from ..errors import InputError, check_utf8, first_line, printable
from ..files import whole
from ..weights.loading import CLASSIFICATION, SEGMENTATION, Loaded, check_input_size, check_logits, load

__all__ = ['Exported', 'export']

_logger = logging.getLogger(__name__)

OPSETS = range(18, 26)  # torch's exporter makes 18 and converts upwards; 25 is the newest that was tried
DEFAULT_OPSET = 18  # the oldest, which most runtimes can read
TOLERANCE = 1e-4  # as a share of the largest output
METADATA_FILE = 'metadata.json'  # in TorchScript and .pt2 files
EXAMPLE_SIZE = (224, 224)  # for models that take images of any size
AOTI_STRIDE = 32  # VT-FPN compiled for free sizes gives wrong results at sizes that are not multiples (torch 2.15)
SMALLEST_SIDE = 64  # of the images used to check a file: two pixels of the coarsest map

Runs = Callable[[torch.Tensor], torch.Tensor]


@dataclass
class Exported:
    """Summary of what `export` wrote.

    Attributes:
        inputs: Shapes of the inputs by name, in which a free dimension has a name instead of a number.
        outputs: Shapes of the outputs, in the same form.
        difference: Largest difference from PyTorch, as a share of the largest output.
        shapes: Shapes of the images used in the comparison.
    """
    inputs: Dict[str, List[Union[int, str]]]
    outputs: Dict[str, List[Union[int, str]]]
    difference: float
    shapes: List[Tuple[int, ...]]


@dataclass
class _Job:
    """One export: a model in its inference form, and what the file should contain.

    Attributes:
        model: The model in its inference form.
        x: Images to trace the model with.
        free: Dimensions of x that are free in the file, with their names.
        stride: Free sizes are multiples of this number.
        metadata: Metadata texts by name.
        opset: ONNX opset.
    """
    model: nn.Module
    x: torch.Tensor
    free: Dict[int, str]
    stride: int
    metadata: Dict[str, str]
    opset: int


def _trace(job: _Job) -> torch.export.ExportedProgram:
    free = {dim: torch.export.Dim.DYNAMIC for dim in job.free}
    if job.stride > 1:
        free.update({dim: job.stride * torch.export.Dim(f'cells_{dim}', min=2) for dim in job.free if dim > 0})
    return torch.export.export(job.model, (job.x,), dynamic_shapes=(free,))


def _write_onnx(job: _Job, path: Path) -> None:
    import onnx

    program = torch.onnx.export(
        _trace(job), (job.x,), dynamo=True, input_names=['image'], output_names=['logits'], opset_version=job.opset,
        verbose=False)
    proto = program.model_proto
    made = {entry.domain: entry.version for entry in proto.opset_import}['']
    if made != job.opset:
        raise InputError(f'this model cannot be exported with opset {job.opset}, torch gives {made}')
    _name_dimensions(proto.graph, job.free)
    onnx.helper.set_model_props(proto, job.metadata)
    onnx.save(proto, path)  # a single file, so a model of more than 2 GB raises


def _name_dimensions(graph: Any, names: Dict[int, str]) -> None:
    """Rename the free dimensions of the input, which torch calls s77 and the like, wherever they occur."""
    dims = graph.input[0].type.tensor_type.shape.dim
    renamed = {dims[i].dim_param: name for i, name in names.items()}
    for value in (*graph.input, *graph.output, *graph.value_info):
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param in renamed:
                dim.dim_param = renamed[dim.dim_param]


def _load_onnx(path: Path) -> Runs:
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=['CPUExecutionProvider'])
    return lambda x: torch.from_numpy(session.run(None, {'image': x.numpy()})[0])


def _write_torchscript(job: _Job, path: Path) -> None:
    content = io.BytesIO()  # writing directly to a file, torch ends the process if the disk is full
    torch.jit.save(torch.jit.script(job.model), content, _extra_files={METADATA_FILE: json.dumps(job.metadata)})
    path.write_bytes(content.getbuffer())


def _write_pt2(job: _Job, path: Path) -> None:
    content = io.BytesIO()
    torch.export.save(_trace(job), content, extra_files={METADATA_FILE: json.dumps(job.metadata)})
    path.write_bytes(content.getbuffer())


def _load_pt2(path: Path) -> Runs:
    return torch.export.load(path).module()


def _write_aoti(job: _Job, path: Path) -> None:
    configs = {'aot_inductor.metadata': job.metadata}
    if hasattr(torch._inductor.config.aot_inductor, 'check_lowerbound'):
        configs['aot_inductor.check_lowerbound'] = False  # so that a batch of one, which works, is not refused
    torch._inductor.aoti_compile_and_package(_trace(job), package_path=str(path), inductor_configs=configs)


def _load_aoti(path: Path) -> Runs:
    return torch._inductor.aoti_load_package(str(path))


@dataclass(frozen=True)
class Format:
    """A file format: the suffix of its files, and how to write and load one."""
    suffix: str
    write: Callable[[_Job, Path], None]
    load: Callable[[Path], Runs]


FORMATS = {
    'onnx': Format('.onnx', _write_onnx, _load_onnx),
    'torchscript': Format('.pt', _write_torchscript, torch.jit.load),
    'pt2': Format('.pt2', _write_pt2, _load_pt2),
    'aoti': Format('.pt2', _write_aoti, _load_aoti),
}


def export(
        name_or_dir: str,
        file_format: str,
        out: Union[str, Path],
        dynamic_size: bool = False,
        opset: Optional[int] = None,
        overwrite: bool = False,
) -> Exported:
    """Write a model, in its inference form, as a file for another runtime.

    The file is loaded again by its runtime and compared with the trained model, on noise of several batch sizes and, if
    they are free, several image sizes. It is written to `out` only if no output differs by more than `TOLERANCE` of the
    largest one. The batch size is free in every format.

    Every file has the same metadata: architecture, preprocessing (of `Loaded`), class names, inputs, outputs, and the
    versions of vt_zoo and torch, each as JSON. ONNX files have it in metadata_props, AOTInductor files in
    `get_metadata()`, TorchScript and torch.export files in the extra file `METADATA_FILE`.

    Args:
        name_or_dir: As in `vt_zoo.load`.
        file_format: 'onnx'; 'torchscript'; 'pt2', the format of torch.export; or 'aoti', compiled by AOTInductor for
            this machine's CPU.
        out: File to write, in an existing folder.
        dynamic_size: Leave height and width free. In TorchScript they are wherever the model leaves them free.
        opset: ONNX opset, one of `OPSETS`; None for `DEFAULT_OPSET`.
        overwrite: Replace `out` if it exists, which is an error otherwise.

    Raises:
        InputError: An argument cannot be used, the model cannot be loaded or exported to this format, what the format
            needs is not installed, or the file does not compute the same as the model.
        OSError: `out` cannot be written.
    """
    out = Path(out)
    _check(file_format, out, dynamic_size, opset, overwrite)
    _check_installed(file_format)
    loaded = load(name_or_dir)
    any_size = dynamic_size or file_format == 'torchscript'
    channels, *size = loaded.preprocessing['input_size']
    if loaded.task == CLASSIFICATION:
        check_logits(loaded.model, loaded.input_size, str(name_or_dir))
        any_size = dynamic_size or (any_size and _takes_other_sizes(loaded))
    if None in size:
        if not any_size:
            raise InputError(f'model {name_or_dir} is for images of any size: add --dynamic-size')
        size = EXAMPLE_SIZE
    stride = AOTI_STRIDE if any_size and file_format == 'aoti' and loaded.task == SEGMENTATION else 1
    x = torch.randn(
        2, channels, *(_multiple(side, stride) for side in size), generator=torch.Generator().manual_seed(0))
    free = {0: 'batch'}
    if any_size:
        free.update({2: 'height', 3: 'width'} if stride == 1 else {2: f'{stride}*height', 3: f'{stride}*width'})
    inputs, outputs = _describe(loaded, x, free)
    model = reparameterize_model(loaded.model).requires_grad_(False)
    metadata = _metadata(loaded, inputs, outputs)
    form = FORMATS[file_format]
    with whole(out, replace=overwrite) as new:
        _logger.info(f'writing {file_format}')
        with quiet(), sentence(f'model {name_or_dir} cannot be written as {file_format}'):
            form.write(_Job(model, x, free, stride, metadata, opset or DEFAULT_OPSET), new)
        shapes = _shapes(x.shape, any_size, stride)
        _logger.info(f'comparing it with PyTorch on {len(shapes)} batches')
        with quiet(), sentence(f'the file that {file_format} made of model {name_or_dir} does not run'):
            difference = largest_difference(loaded.model, form.load(new), shapes)
        if not difference <= TOLERANCE:  # or if it is NaN
            raise InputError(
                f'the file that {file_format} made of model {name_or_dir} differs from PyTorch by {difference:.1e} of '
                f'the largest output, allowed is {TOLERANCE:.0e}: nothing was written')
    return Exported(inputs, outputs, difference, shapes)


def _check(file_format: str, out: Path, dynamic_size: bool, opset: Optional[int], overwrite: bool) -> None:
    if file_format not in FORMATS:
        raise InputError(f'format must be one of {", ".join(FORMATS)}, got {file_format!r}')
    check_out(file_format, out, overwrite)
    if opset is not None and file_format != 'onnx':
        raise InputError(f'opset is only for format onnx, got format {file_format}')
    if opset is not None and opset not in OPSETS:
        raise InputError(f'opset must be from {OPSETS[0]} to {OPSETS[-1]}, got {opset}')
    if dynamic_size and file_format == 'torchscript':
        raise InputError('format torchscript takes images of any size as it is: leave --dynamic-size out')


def default_out(name_or_dir: str, file_format: str) -> Path:
    """Default file for a model: named after its folder and beside it; for a name, in the current folder."""
    folder = Path(name_or_dir.removeprefix('local-dir:'))
    if folder.is_dir():
        path = folder.resolve() if folder.name in ('', '..') else folder
    else:
        path = Path(name_or_dir.rpartition('/')[2].rpartition(':')[2])
    return path.with_name(path.name + FORMATS[file_format].suffix)


def check_out(file_format: str, out: Path, overwrite: bool = False) -> None:
    """Raise InputError if a file of this format cannot be written as `out`.

    This is the case if the suffix is wrong, the name is not UTF-8, the file exists or its folder does not.
    """
    check_utf8(out)
    suffix = FORMATS[file_format].suffix
    if out.suffix != suffix:
        raise InputError(f'out must end in {suffix} for format {file_format}, got {out}')
    if out.is_dir():
        raise InputError(f'out must be a file, got the folder {out}')
    if out.exists() and not overwrite:
        raise InputError(f'{out} is there already: choose another --out, or replace it with --overwrite')
    if not out.parent.is_dir():
        raise InputError(f'folder {out.parent} of --out does not exist')


def check_packages(what: str, *packages: str) -> None:
    """Raise InputError if a package of the extra `export` cannot be imported."""
    try:
        for package in packages:
            importlib.import_module(package)
    except ImportError as e:
        raise InputError(f"{what} needs {e.name}: pip install 'vt_zoo[export]'") from None


def _check_installed(file_format: str) -> None:
    if file_format == 'onnx':
        check_packages('format onnx', 'onnx', 'onnxruntime', 'onnxscript')
    if file_format == 'aoti':
        from torch._inductor.cpp_builder import get_cpp_compiler
        from torch._inductor.exc import InvalidCxxCompiler

        try:
            get_cpp_compiler()
        except InvalidCxxCompiler:
            raise InputError('format aoti needs a C++ compiler: install g++, or name one in CXX') from None


def _describe(loaded: Loaded, x: torch.Tensor, free: Dict[int, str]) -> Tuple[Dict[str, List], Dict[str, List]]:
    """Names and shapes of the inputs and outputs."""
    image = [free.get(i, n) for i, n in enumerate(x.shape)]
    logits = [image[0], len(loaded.classes), *(image[2:] if loaded.task == SEGMENTATION else [])]
    return {'image': image}, {'logits': logits}


def _metadata(loaded: Loaded, inputs: Dict[str, List], outputs: Dict[str, List]) -> Dict[str, str]:
    model = loaded.model
    return {name: json.dumps(value) for name, value in {
        'architecture': model.name if loaded.task == SEGMENTATION else model.pretrained_cfg['architecture'],
        'preprocessing': loaded.preprocessing, 'class_names': [printable(name) for name in loaded.classes],
        'inputs': inputs, 'outputs': outputs,
        'vt_zoo_version': __version__, 'torch_version': torch.__version__}.items()}


def _multiple(side: int, stride: int) -> int:
    return -(-side // stride) * stride


def _shapes(shape: Tuple[int, ...], any_size: bool, stride: int) -> List[Tuple[int, ...]]:
    """Shapes of the images used in the comparison."""
    channels, height, width = shape[1:]
    shapes = [(1, channels, height, width), (3, channels, height, width)]
    if any_size:
        smaller = max(SMALLEST_SIDE, 3 * height // 4 + 1), max(SMALLEST_SIDE, 2 * width // 3 + 1)
        sizes = [(2, *smaller), (1, height + 13, width + 30), (3, height + 32, width)]
        shapes += [(batch, channels, *(_multiple(side, stride) for side in size)) for batch, *size in sizes]
    return shapes


def _takes_other_sizes(loaded: Loaded) -> bool:
    """Whether a classifier takes all sizes of the comparison, not only its own."""
    try:
        for _, *size in _shapes((1, *loaded.input_size), True, 1):
            check_input_size(loaded.model, size, '')
    except InputError:
        return False
    return True


@torch.no_grad()
def largest_difference(model: nn.Module, other: Runs, shapes: List[Tuple[int, ...]]) -> float:
    """Largest difference between two models' outputs on noise, as a share of the largest output of the first."""
    generator = torch.Generator().manual_seed(1)
    differences = []
    for shape in shapes:
        x = torch.randn(shape, generator=generator)
        expected, result = model(x), other(x)
        if result.shape != expected.shape:
            raise ValueError(f'its output is of shape {list(result.shape)}, not {list(expected.shape)}')
        differences.append((result - expected).abs().max() / expected.abs().max())
    return torch.stack(differences).max().item()  # NaN if one of them is


@contextmanager
def quiet(level: int = logging.WARNING) -> Iterator[None]:
    """Silence the output, warnings and logs (up to a level) of exporters, which are of no use to the user."""
    disabled = logging.root.manager.disable
    logging.disable(level)
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
            warnings.simplefilter('ignore')
            yield
    finally:
        logging.disable(disabled)


@contextmanager
def sentence(what: str) -> Iterator[None]:
    """Turn the errors of exporters and runtimes, which are of many types, into an InputError."""
    try:
        yield
    except (InputError, OSError):
        raise
    except Exception as e:
        raise InputError(f'{what}: {first_line(e)[:200]}') from e
