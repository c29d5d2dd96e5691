"""Draw what the tokens of a model look at on images, and measure it.

DIR gets NAME_tokens.png for each image (Figure 6 of the paper: above, where each token looks; below, which pixels
then reach it through the transformer), tokens.png with all images, and tokens.json with the numbers of every module. A
file that cannot be read as an image is named in a warning and left out.
"""
import argparse
import json
import logging
import os
from collections import Counter
from pathlib import Path
from statistics import mean
from typing import Any, Dict, Iterable, List, Sequence

import torch
from tqdm import tqdm

from vt_zoo.analysis.figures import draw_interaction, draw_token_attention
from vt_zoo.analysis.metrics import (
    attention_correlation,
    attention_entropy,
    attention_spread,
    effective_rank,
    record_interaction,
    token_cosine,
    token_similarity,
)
from vt_zoo.analysis.records import VTRecord, capture_tokens
from vt_zoo.data.image_stream import find_images
from vt_zoo.data.images import load_image
from vt_zoo.errors import InputError, either, first_line, printable
from vt_zoo.files import check_output_folder, whole
from vt_zoo.weights import load

from .arguments import positive_int

_logger = logging.getLogger(__name__)

GRID_IMAGES = 16  # number of images in tokens.png, the first ones


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this command's arguments."""
    add = parser.add_argument
    add('images', nargs='+', metavar='IMAGE', help='image file, or folder of images (with its subfolders)')
    add('--model', required=True, metavar='NAME_OR_DIR',
        help='model as in `vt-zoo predict`, or a folder of `vt-zoo segment`')
    add('--out', required=True, metavar='DIR', help='path to the output folder')
    add('--module', type=positive_int, default=1, metavar='N',
        help='number of the VT module to draw, from 1; for VT-FPN that of the pyramid level')
    add('--format', choices=['png', 'svg'], default='png', help='file format of the pictures')


def numbers(records: List[VTRecord]) -> List[Dict[str, Any]]:
    """Compute the metrics of the tokens of one image, for each module."""
    result = []
    for record in records:
        tokens, attention = record.tokens, record.attention
        measures = {'tokens': tokens.shape[1]}
        differ = {'cosine': token_cosine(tokens), 'rank': effective_rank(tokens)}
        if attention is not None:
            of_each = {
                'entropy': attention_entropy(attention), 'spread': attention_spread(attention),
                'entropy_normalized': attention_entropy(attention, normalize=True)}
            measures.update(
                height=attention.shape[-2], width=attention.shape[-1],
                **{name: [round(v, 6) for v in values[0].tolist()] for name, values in of_each.items()})
            differ['correlation'] = attention_correlation(attention)
        measures.update({name: None if v.isnan() else round(v.item(), 6) for name, v in differ.items()})
        result.append(measures)
    return result


def describe(modules: Sequence[Dict[str, Any]], most: int) -> str:
    """Describe in one line how alike the tokens of a module are, on average over the images.

    Args:
        modules: Its measures of each image.
        most: The largest rank that its tokens can have.
    """
    texts = {
        'correlation': 'attention of two tokens correlates {:.2f}', 'cosine': 'cosine of two tokens {:.2f}',
        'rank': f'effective rank {{:.1f}} of at most {most}'}
    values = {name: [m[name] for m in modules if m.get(name) is not None] for name in texts}
    return ', '.join(text.format(mean(values[name])) for name, text in texts.items() if values[name])


@torch.inference_mode()
def run(args: argparse.Namespace) -> None:
    """Draw and measure."""
    loaded = load(args.model)
    images = _open(args.images)
    names = _names(images)
    out = Path(args.out)
    check_output_folder(out)
    drawn, written, similarities, reason = [], [], [], ''
    for path, image in tqdm(images.items(), desc='looking', disable=len(images) < 5 or None, leave=False):
        x = loaded.prepare(image)
        try:
            records = capture_tokens(loaded.model, x[None])
        except ValueError as e:
            raise InputError(f'model {args.model} has no tokens to look at: {e}') from e
        except (RuntimeError, AssertionError) as e:
            reason = f'the model does not take images of {"x".join(map(str, x.shape[-2:]))} pixels: {first_line(e)}'
            _logger.warning(f'{printable(str(path))} is left out: {reason}')
            continue
        have = [str(i) for i, r in enumerate(records, 1) if r.attention is not None]
        if args.module > len(records) or (have and str(args.module) not in have):
            allowed = f'must be {either(have)}' if have else 'has no attention in this model'
            raise InputError(f'module {allowed}, got {args.module}')
        attention = records[args.module - 1].attention
        interaction = record_interaction(records, args.module - 1)
        shown = loaded.shown(x)
        if interaction is not None:
            draw_interaction(
                shown, attention[0], interaction[0], f'{printable(path.name)}, module {args.module}',
                out / f'{names[path]}_tokens.{args.format}')
        if attention is not None:
            drawn.append((shown, attention, printable(path.name)))
        written.append({'image': str(path), 'modules': numbers(records)})
        similarities.append([None if r.attention is None else token_similarity(r.attention) for r in records])
    if not written:
        raise InputError(f'no image can be looked at: {reason}')
    if drawn:
        _draw_grid(drawn[:GRID_IMAGES], out / f'tokens.{args.format}')
    else:
        _logger.warning(f'no module of model {args.model} has an attention to draw')
    mean_similarity = [
        None if values[0] is None else [[round(v, 4) for v in row] for row in torch.stack(values).mean(0).tolist()]
        for values in zip(*similarities)]
    with whole(out / 'tokens.json') as new:
        new.write_text(
            json.dumps({'model': args.model, 'images': written, 'similarity': mean_similarity}, indent=1) + '\n')
    for entry in written[:GRID_IMAGES] if drawn else ():
        entropy = entry['modules'][args.module - 1]['entropy_normalized']
        print(f'{entry["image"]}  entropy of {min(entropy):.3f} to {max(entropy):.3f} (uniform attention: 1)')
    for i, (record, *modules) in enumerate(zip(records, *(entry['modules'] for entry in written)), 1):
        text = describe(modules, min(record.tokens.shape[1] - 1, record.tokens.shape[2]))
        if text:
            print(f'module {i}  {text}')
    if drawn:
        print(f'pictures   {out / f"tokens.{args.format}"} and one of each image')
    print(f'numbers    {out / "tokens.json"}')


def _names(paths: Iterable[Path]) -> Dict[Path, str]:
    """Name the picture of each image: by the image's own name, with its folders if another has the same name."""
    names = {path: path.stem for path in paths}
    counts = Counter(names.values())
    alike = [path for path in names if counts[path.stem] > 1]
    for path in alike:
        folder = os.path.commonpath([p.absolute().parent for p in alike])
        names[path] = '_'.join(path.absolute().relative_to(folder).parts)
    taken: Dict[str, Path] = {}
    for path, name in names.items():
        if name in taken:
            raise InputError(f'images {taken[name]} and {path} would be written to the same name {name}')
        taken[name] = path
    return names


def _open(paths: List[str]) -> Dict[Path, Any]:
    images: Dict[Path, Any] = {}
    sources = [source for source in find_images(paths) if source is not None]
    for source in sources:
        path = Path(source.path)
        if path in images:
            raise InputError(f'images must be different ones, got {path} twice')
        try:
            if source.error is not None:
                raise InputError(source.error)
            images[path] = load_image(path)
        except InputError as e:
            _logger.warning(f'{e}; left out')
    if not images:
        raise InputError('there is no image that can be read')
    return images


def _draw_grid(drawn: List, path: Path) -> None:
    """Draw the images whose attention maps have the same size as the first one's."""
    size = drawn[0][1].shape
    same = [entry for entry in drawn if entry[1].shape == size]
    draw_token_attention(
        [image for image, _, _ in same], torch.cat([attention for _, attention, _ in same]),
        [name[:24] for _, _, name in same], path)
