"""Publish a model on the Hugging Face Hub, with a model card.

CHECKPOINT_DIR is what `vt-zoo finetune` or `vt-zoo convert` wrote. The card says how the weights came about, from what
these commands wrote down; what is not there is called unknown. A token is needed: `hf auth login`, or HF_TOKEN.
"""
import argparse
from pathlib import Path
from tempfile import TemporaryDirectory

from vt_zoo.publish import upload, write_release


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this command's arguments."""
    add = parser.add_argument
    add('checkpoint_dir', metavar='CHECKPOINT_DIR', help='folder with a model, or with model/')
    add('--repo-id', required=True, metavar='ORG/NAME', help='where it goes on the hub')
    add('--license', default=None, metavar='ID', help='of the weights, as apache-2.0; unknown if not given')
    add('--dataset', default=None, metavar='NAME', help='name of the data; unknown if not given')
    add('--private', action='store_true', help='make a new repository private')
    add('--dry-run', action='store_true', help='show what would go up, and upload nothing')
    add('--out', default=None, metavar='DIR', help='keep what goes up in this folder, which must not be there')


def run(args: argparse.Namespace) -> None:
    """Write the folder, then show or upload it."""
    with TemporaryDirectory() as temporary:
        folder = Path(args.out or Path(temporary) / 'model')
        write_release(args.checkpoint_dir, folder, args.repo_id, args.license, args.dataset)
        if args.dry_run:
            for path in sorted(folder.iterdir()):
                print(f'{path.stat().st_size:12,} bytes  {path.name}')
            print(f'\n{(folder / "README.md").read_text(encoding="utf-8")}', end='')
        else:
            print(f'published  {upload(folder, args.repo_id, args.private)}')
            print(f'use        vt-zoo predict IMAGE --model hf-hub:{args.repo_id}')
