"""Quantising ONNX files of `vt-zoo export` to int8 by onnxruntime's own tools, calibrated on a folder of images."""
import json
import logging
import random
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass
from graphlib import TopologicalSorter
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any, Dict, Iterable, Iterator, List, Optional, Set, Tuple, Union

import numpy as np
from tqdm import tqdm

from ..data.folders import find_images
from ..data.images import load_image
from ..errors import InputError
from ..files import whole
from ..weights.loading import create_prepare
from .formats import check_out, check_packages, quiet, sentence

__all__ = ['Quantized', 'quantize']

_logger = logging.getLogger(__name__)

DEFAULT_LIMIT = 100  # images: on the digits, more change nothing and 10 lose accuracy (benchmarks/results/int8.md)
WEIGHTED = ('Conv', 'Gemm', 'MatMul')  # operators of nodes that may have weights
OF_MAPS = ('Add', 'MaxPool', 'Relu')  # operators on feature maps between convolutions
QUANTIZED_BY = ('QuantizeLinear', 'DequantizeLinear')


@dataclass
class Quantized:
    """Summary of what `quantize` wrote.

    Attributes:
        nodes: For each operator that may have weights, the number of nodes in int8 and the total number of nodes.
        num_images: Number of images used to find the ranges and to compare the files.
        agreement: Share of these images (for a segmenter, of their pixels) with the same class as in float32.
        mean_difference: Largest difference of an output, as a share of the largest output, averaged over the images.
        largest_difference: The same for the worst image.
    """
    nodes: Dict[str, Tuple[int, int]]
    num_images: int
    agreement: float
    mean_difference: float
    largest_difference: float


class Reader:
    """Reader of images (1, C, H, W) for onnxruntime's calibration."""

    def __init__(self, images: Iterable[np.ndarray]) -> None:
        self.images = iter(images)

    def get_next(self) -> Optional[Dict[str, np.ndarray]]:
        x = next(self.images, None)
        return None if x is None else {'image': x}


def choose_nodes(graph: Any) -> List[str]:
    """Choose the nodes of a float32 graph to compute in int8, and return their names.

    These are the convolutions and the matrix products with weights, which take most of the time and of the file; and
    sums, maxima and ReLUs of the outputs of convolutions, which would otherwise be converted to float32 and back.
    The following stay in float32:

    * products of two activations, of pixels with tokens and of tokens with each other, and their softmax: onnxruntime
      would have to round both operands, whose ranges depend on the images;
    * the stacked matrices of the grouped products in tokenizer and transformer: onnxruntime has no int8 product for
      them with a scale per channel;
    * sums, norms and means of tokens, and the resizing and norms of a decoder, which take little time.

    Args:
        graph: onnx.GraphProto in topological order.
    """
    ranks = {tensor.name: len(tensor.dims) for tensor in graph.initializer}
    maps, names = set(), []
    for node in graph.node:
        is_map = node.op_type == 'Conv' or (node.op_type in OF_MAPS and maps.issuperset(node.input))
        if is_map:
            maps.update(node.output)
        if is_map or node.op_type == 'Gemm' or (node.op_type == 'MatMul' and ranks.get(node.input[1]) == 2):
            names.append(node.name)
    return names


def quantize_static_arguments(graph: Any) -> Dict[str, Any]:
    """Keyword arguments for onnxruntime's `quantize_static`.

    Activations are uint8, as with int8 onnxruntime is slower than in float32 on x86. Weights have a scale per channel
    and 7 bits, so that no sum of two products saturates in the 16 bits that x86 CPUs without VNNI have for it. Matrix
    products return float32, which the sums, softmaxes and norms after them take.
    """
    from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType

    return {
        'quant_format': QuantFormat.QDQ, 'calibrate_method': CalibrationMethod.MinMax, 'per_channel': True,
        'activation_type': QuantType.QUInt8, 'weight_type': QuantType.QInt8, 'reduce_range': True,
        'op_types_to_quantize': [*WEIGHTED, *OF_MAPS], 'nodes_to_quantize': choose_nodes(graph),
        'extra_options': {'OpTypesToExcludeOutputQuantization': ['Gemm', 'MatMul']}}


def quantize(
        file: Union[str, Path],
        images: Union[str, Path],
        out: Union[str, Path],
        limit: int = DEFAULT_LIMIT,
        progress: bool = True,
        overwrite: bool = False,
) -> Quantized:
    """Quantise a float32 file of `vt-zoo export --format onnx` to int8.

    The ranges of activations are their smallest and largest values on the images. The new file is loaded and compared
    with the old one on the same images; it is written to `out` only if all outputs are finite. It has the metadata of
    the old file, and `quantization`, which says how it was made.

    Args:
        file: The float32 file.
        images: Folder with images, in subfolders or not, like those that the model will be used on.
        out: File to write, other than `file`, in an existing folder.
        limit: Number of images to use, drawn with a fixed seed.
        progress: Show progress bars if standard error is a terminal.
        overwrite: Replace `out` if it exists, which is an error otherwise.

    Raises:
        InputError: An argument cannot be used, an image cannot be read, onnxruntime is not installed or cannot quantise
            the file, or outputs of the result are not finite.
        OSError: `out` cannot be written.
    """
    file, out = Path(file), Path(out)
    check_packages('quantize', 'onnx', 'onnxruntime')
    check_out('onnx', out, overwrite)
    if out.exists() and file.exists() and out.samefile(file):
        raise InputError(f'out must be another file than {file}')
    metadata = _read_metadata(file)
    prepare = create_prepare(json.loads(metadata['preprocessing']))
    paths = _draw_images(Path(images), limit)

    def prepared(desc: str) -> Iterator[np.ndarray]:
        for path in tqdm(paths, desc=desc, disable=None if progress else True, leave=False):
            yield prepare(load_image(path))[None].numpy()

    size = file.stat().st_size  # the tools write at least as much
    with whole(out, replace=overwrite) as new:
        _logger.info(f'calibrating on {len(paths)} images')
        with _quiet_tools(), sentence(f'{file} cannot be quantised'), _disk_errors(new.parent, size):
            nodes = _write(file, prepared('calibrating'), new)
        _logger.info(f'comparing with {file}')
        with _quiet_tools(), sentence(f'the int8 file of {file} does not run'), _disk_errors(new.parent, size):
            quantized = Quantized(nodes, len(paths), *_compare(file, new, prepared('comparing')))
            _write_metadata(new, metadata, quantized)
    return quantized


def _read_metadata(file: Path) -> Dict[str, str]:
    """Read the metadata of a float32 file of `vt-zoo export`."""
    import onnx

    if not file.is_file():
        raise InputError(f'{file} {"is not a file" if file.exists() else "does not exist"}')
    try:
        model = onnx.load(file)
    except OSError:
        raise
    except Exception:  # protobuf's own errors
        model = onnx.ModelProto()
    if not model.graph.node:  # protobuf also reads some files that are not ONNX
        raise InputError(f'{file} is not an ONNX file')
    if any(node.op_type in QUANTIZED_BY for node in model.graph.node):
        raise InputError(f'{file} is quantised already')
    metadata = {entry.key: entry.value for entry in model.metadata_props}
    if 'preprocessing' not in metadata:
        raise InputError(f'{file} does not say how its images are prepared: vt-zoo export did not write it')
    return metadata


def _draw_images(folder: Path, limit: int) -> List[str]:
    if not folder.is_dir():
        raise InputError(f'image folder {folder} {"is not a folder" if folder.exists() else "does not exist"}')
    paths = find_images(folder)
    if not paths:
        raise InputError(f'image folder {folder} holds no images')
    return random.Random(0).sample(paths, min(limit, len(paths)))


@contextmanager
def _quiet_tools() -> Iterator[None]:
    """Silence onnxruntime and its tools; their errors are raised in any case."""
    import onnxruntime

    onnxruntime.set_default_logger_severity(4)
    try:
        with quiet(logging.ERROR):
            yield
    finally:
        onnxruntime.set_default_logger_severity(2)  # its default


@contextmanager
def _disk_errors(folder: Path, size: int) -> Iterator[None]:
    """Turn any error into an OSError if a folder lacks space for `size` bytes; some versions of the tools do not."""
    try:
        yield
    except OSError:
        raise
    except Exception as error:
        try:
            with NamedTemporaryFile(dir=folder) as probe:
                for _ in range(size // 2 ** 20 + 1):
                    probe.write(bytes(2 ** 20))
                probe.flush()
        except OSError as e:
            raise OSError(e.errno, e.strerror, str(folder)) from error
        raise


def _write(file: Path, images: Iterator[np.ndarray], path: Path) -> Dict[str, Tuple[int, int]]:
    """Write an int8 file, with the tools' temporary files beside it, and return `Quantized.nodes`."""
    import onnx
    from onnxruntime.quantization import quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    prepared = path.with_name('prepared.onnx')
    quant_pre_process(file, prepared, skip_symbolic_shape=True)
    graph = onnx.load(prepared).graph
    arguments = quantize_static_arguments(graph)
    quantize_static(prepared, path, Reader(images), **arguments)
    _sort(path)
    total = Counter(node.op_type for node in graph.node)
    chosen = Counter(node.op_type for node in graph.node if node.name in set(arguments['nodes_to_quantize']))
    return {op: (chosen[op], total[op]) for op in WEIGHTED if total[op]}


def _inputs(node: Any) -> Set[str]:
    """Names of a node's inputs, including those that its subgraphs take from outside."""
    inner = [n for attribute in node.attribute if attribute.HasField('g') for n in attribute.g.node]
    return set(node.input).union(*map(_inputs, inner))


def _sort(path: Path) -> None:
    """Sort nodes so that each comes after its inputs, since onnxruntime's tools overlook those of a loop's body."""
    import onnx

    model = onnx.load(path)
    nodes = [onnx.NodeProto.FromString(node.SerializeToString()) for node in model.graph.node]
    makers = {name: i for i, node in enumerate(nodes) for name in node.output if name}
    needed = {i: {makers[name] for name in _inputs(node) if name in makers} for i, node in enumerate(nodes)}
    del model.graph.node[:]
    model.graph.node.extend(nodes[i] for i in TopologicalSorter(needed).static_order())
    onnx.save(model, path)


def _compare(file: Path, other: Path, images: Iterator[np.ndarray]) -> Tuple[float, float, float]:
    """Compare two files; return the agreement, mean difference and largest difference of `Quantized`."""
    import onnxruntime

    sessions = [onnxruntime.InferenceSession(path, providers=['CPUExecutionProvider']) for path in (file, other)]
    same, differences = [], []
    for x in images:
        expected, result = (session.run(None, {'image': x})[0] for session in sessions)
        if result.shape != expected.shape:
            raise ValueError(f'its output is of shape {list(result.shape)}, not {list(expected.shape)}')
        if not np.isfinite(result).all():
            raise ValueError('its output is not finite')
        same.append((result.argmax(1) == expected.argmax(1)).ravel())
        differences.append(np.abs(result - expected).max() / np.abs(expected).max())
    return float(np.concatenate(same).mean()), float(np.mean(differences)), float(np.max(differences))


def _write_metadata(path: Path, metadata: Dict[str, str], quantized: Quantized) -> None:
    import onnx
    import onnxruntime

    model = onnx.load(path)
    said = {
        'activations': 'uint8', 'weights': 'int8 of 7 bits, by channel', 'nodes': quantized.nodes,
        'num_images': quantized.num_images, 'agreement': quantized.agreement,
        'onnxruntime_version': onnxruntime.__version__}
    onnx.helper.set_model_props(model, {**metadata, 'quantization': json.dumps(said)})
    onnx.save(model, path)
