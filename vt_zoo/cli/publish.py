"""Publish a model on the Hugging Face Hub, with a model card.

CHECKPOINT_DIR is a folder that `vt-zoo finetune` or `vt-zoo convert` wrote. The model card says how the weights were
made, as these commands recorded it; what they did not record is given as unknown. You need a token: `hf auth login`,
or HF_TOKEN.
"""
import argparse
from pathlib import Path
from tempfile import TemporaryDirectory

from vt_zoo.weights.model_card import UNKNOWN
from vt_zoo.weights.publish import upload, write_release


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this command's arguments."""
    add = parser.add_argument
    add('checkpoint_dir', metavar='CHECKPOINT_DIR',
        help='path to the model folder, or to the run folder with model/ in it')
    add('--repo-id', required=True, metavar='ORG/NAME', help='repository on the hub, created if it does not exist')
    add('--license', default=UNKNOWN, metavar='ID', help="license of the weights, by the hub's name, e.g. apache-2.0")
    add('--dataset', default=UNKNOWN, metavar='NAME', help='name of the training data, for the model card')
    add('--private', action='store_true',
        help='create a private repository; if the repository exists and is public, stop before anything is uploaded')
    add('--replace-card', action='store_true',
        help='replace the model card even if it was edited on the hub (default: keep it)')
    add('--dry-run', action='store_true', help='print the files and the model card without uploading them')
    add('--out', default=None, metavar='DIR', help='new folder to keep the uploaded files in')


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
            address, kept = upload(folder, args.repo_id, args.private, args.replace_card)
            print(f'published  {address}')
            if kept:
                print('card       kept, it was edited on the hub; --replace-card replaces it')
            print(f'use        vt-zoo predict IMAGE --model hf-hub:{args.repo_id}')
