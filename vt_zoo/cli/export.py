"""Write a trained model as a file for another runtime: ONNX, TorchScript, torch.export or AOTInductor.

The file holds the model in its inference form, with its preprocessing and class names. Before it gets its name it is
loaded again and compared with PyTorch on several batches. The number of images in a batch is always free.
"""
import argparse
from pathlib import Path

from vt_zoo.export import DEFAULT_OPSET, FORMATS, OPSETS, export

from .arguments import positive_int


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this command's arguments."""
    add = parser.add_argument
    add('model', metavar='MODEL', help='model as in `vt-zoo predict`, or folder of `vt-zoo segment`')
    add('--format', required=True, choices=FORMATS, help='pt2 is of torch.export, aoti is compiled for this CPU')
    add('--out', required=True, metavar='FILE', help='file to write, which must not be there')
    add('--dynamic-size', action='store_true', help='leave height and width free; torchscript does as it is')
    add('--opset', type=positive_int, default=None, metavar='N',
        help=f'of onnx, {OPSETS[0]} to {OPSETS[-1]}; {DEFAULT_OPSET}, which the most runtimes read, if not given')


def run(args: argparse.Namespace) -> None:
    """Export, and print what was written."""
    exported = export(args.model, args.format, args.out, args.dynamic_size, args.opset)
    for title, values in (('input', exported.inputs), ('output', exported.outputs)):
        for name, shape in values.items():
            print(f'{title:10} {name} ({", ".join(map(str, shape))})')
    print(f'difference {exported.difference:.1e} of the largest output, on {len(exported.shapes)} batches')
    print(f'file       {args.out}, {Path(args.out).stat().st_size} bytes')
