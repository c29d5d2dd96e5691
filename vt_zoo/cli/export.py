"""Write a trained model as a file for another runtime: ONNX, TorchScript, torch.export or AOTInductor.

The file holds the model in its inference form, with its preprocessing and class names. It is loaded again and compared
with PyTorch on several batches before it is written under its name. Batches may have any number of images.
"""
import argparse
from pathlib import Path

from vt_zoo.export.formats import DEFAULT_OPSET, FORMATS, OPSETS, default_out, export

from .arguments import positive_int


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this command's arguments."""
    add = parser.add_argument
    add('model', metavar='MODEL', help='model as in `vt-zoo predict`, or a folder of `vt-zoo segment`')
    add('--format', required=True, choices=FORMATS,
        help='kind of file; pt2 is that of torch.export, aoti is compiled by AOTInductor for the CPU of this machine')
    add('--out', default=argparse.SUPPRESS, metavar='FILE',
        help='file to write (default: MODEL.onnx, .pt or .pt2, next to the folder MODEL, or here if MODEL is a name)')
    add('--overwrite', action='store_true', help='replace FILE if it exists')
    add('--dynamic-size', action='store_true',
        help='accept images of any height and width, not only of the input size; torchscript does if the model does')
    add('--opset', type=positive_int, default=argparse.SUPPRESS, metavar='N',
        help=f'version of the ONNX operators, {OPSETS[0]} to {OPSETS[-1]}; only for onnx (default: {DEFAULT_OPSET}, '
             'which most runtimes read)')


def run(args: argparse.Namespace) -> None:
    """Export, and print what was written."""
    out = Path(getattr(args, 'out', None) or default_out(args.model, args.format))
    exported = export(
        args.model, args.format, out, args.dynamic_size, getattr(args, 'opset', None), args.overwrite)
    for title, values in (('input', exported.inputs), ('output', exported.outputs)):
        for name, shape in values.items():
            print(f'{title:10} {name} ({", ".join(map(str, shape))})')
    print(f'difference {exported.difference:.1e} of the largest output, on {len(exported.shapes)} batches')
    print(f'file       {out}, {out.stat().st_size} bytes')
