"""Data sets of images and masks in the layouts in which they are published.

A mask holds one class index per pixel; losses and metrics ignore 255. As in COCO, a mask refers to the pixels as the
image file stores them: if EXIF orientation turns an image upright (`load_upright`), its mask is turned with it. An EXIF
orientation in the mask's own file is ignored.
"""
import json
import os
from pathlib import Path
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Sequence, Tuple, Type, Union

import numpy as np
import torch.utils.data
from PIL import ExifTags, Image, ImageOps

from ..data.folders import is_image, is_left_out
from ..data.images import load_upright
from ..data.label_map import IGNORED, LabelMap
from ..errors import InputError, first_line
from ..files import check_regular

__all__ = ['CocoPanopticStuff', 'CocoStuff', 'FolderDataset', 'LookIntoPerson', 'SegmentationDataset', 'load_dataset']

Sample = Tuple[Path, Path]

SPLITS = ('train', 'val', 'test')
GREY = ('1', 'L', 'P', 'I', 'I;16', 'I;16B', 'I;16L', 'I;16N')
LOSSY = ('JPEG', 'MPO', 'JPEG2000')  # formats that change pixel values
STEPS = {'L;2': 85, 'L;4': 17}  # factors by which Pillow multiplies PNG's grey values of 2 and 4 bits

# labels.txt of https://github.com/nightrome/cocostuff, ids 92 to 182
COCO_STUFF = (
    'banner', 'blanket', 'branch', 'bridge', 'building-other', 'bush', 'cabinet', 'cage', 'cardboard', 'carpet',
    'ceiling-other', 'ceiling-tile', 'cloth', 'clothes', 'clouds', 'counter', 'cupboard', 'curtain', 'desk-stuff',
    'dirt', 'door-stuff', 'fence', 'floor-marble', 'floor-other', 'floor-stone', 'floor-tile', 'floor-wood', 'flower',
    'fog', 'food-other', 'fruit', 'furniture-other', 'grass', 'gravel', 'ground-other', 'hill', 'house', 'leaves',
    'light', 'mat', 'metal', 'mirror-stuff', 'moss', 'mountain', 'mud', 'napkin', 'net', 'paper', 'pavement', 'pillow',
    'plant-other', 'plastic', 'platform', 'playingfield', 'railing', 'railroad', 'river', 'road', 'rock', 'roof', 'rug',
    'salad', 'sand', 'sea', 'shelf', 'sky-other', 'skyscraper', 'snow', 'solid-other', 'stairs', 'stone', 'straw',
    'structural-other', 'table', 'tent', 'textile-other', 'towel', 'tree', 'vegetable', 'wall-brick', 'wall-concrete',
    'wall-other', 'wall-panel', 'wall-stone', 'wall-tile', 'wall-wood', 'water-other', 'waterdrops', 'window-blind',
    'window-other', 'wood')
COCO_THINGS = 91

LIP = (
    'Background', 'Hat', 'Hair', 'Glove', 'Sunglasses', 'UpperClothes', 'Dress', 'Coat', 'Socks', 'Pants', 'Jumpsuits',
    'Scarf', 'Skirt', 'Face', 'Left-arm', 'Right-arm', 'Left-leg', 'Right-leg', 'Left-shoe', 'Right-shoe')


class SegmentationDataset(torch.utils.data.Dataset):
    """Dataset of (image, mask) pairs whose masks hold class indices.

    An item is an RGB PIL image and its mask, int64 (H, W) of values 0 to len(classes) - 1 or `ignore_index`; or the
    output of the transform for both.

    Args:
        samples: Pairs of files (image, mask), which are not checked for existence here.
        classes: Names of the classes, at most 255.
        transform: Called with (image, mask). May be set later.

    Attributes:
        flip_pairs: Pairs of classes that are swapped in a mirror image, such as left and right arm.
        label_map: Meaning of mask values that are not class indices, see `map_labels`.
        described_by: Files, other than images and masks, that say what the masks mean.

    Raises:
        InputError: In `load` and `__getitem__`, if a file cannot be read, the mask does not have the size of the stored
            image, or it holds a value that is not a class.
    """
    ignore_index = IGNORED
    flip_pairs: Sequence[Tuple[int, int]] = ()
    described_by: Sequence[Path] = ()
    own_labels = True  # the masks are the user's own, not those of a published data set

    def __init__(self, samples: List[Sample], classes: Sequence[str], transform: Optional[Callable] = None) -> None:
        if len(classes) > IGNORED:
            raise InputError(f'{len(classes)} classes do not fit into a mask, at most {IGNORED} do')
        self.samples = samples
        self.classes = list(classes)
        self.transform = transform
        self.label_map: Optional[Dict[Union[int, str], int]] = None
        self._label_map: Optional[LabelMap] = None

    def map_labels(self, label_map: Optional[Dict[Union[int, str], int]]) -> None:
        """Set what mask values mean that are not class indices.

        Args:
            label_map: Class index, or 255 to ignore it, for each grey value and each colour 'R,G,B' that a mask may
                hold, as returned by `read_label_map`. None for masks of class indices.

        Raises:
            InputError: The layout is that of a published data set, or the map has a class that does not exist.
        """
        if label_map is not None and not self.own_labels:
            raise InputError('label_map is only for format folder, as the masks of the other formats need none')
        self._label_map = None if label_map is None else LabelMap(label_map, len(self.classes))
        self.label_map = label_map

    def __len__(self) -> int:
        return len(self.samples)

    def load(self, index: int) -> Tuple[Image.Image, np.ndarray]:
        """Load the image and the mask of a sample, without the transform."""
        image_path, mask_path = self.samples[index]
        image, orientation = load_upright(image_path)
        labels, size = self._labels(index), image.size
        stored = size[::-1] if orientation > 4 else size
        if labels.shape[::-1] != stored:
            width, height = labels.shape[::-1]
            turned = f' before its EXIF orientation {orientation} turns it' if orientation != 1 else ''
            raise InputError(
                f'mask {mask_path} is {width}x{height} pixels, but image {image_path} is {stored[0]}x{stored[1]}'
                f'{turned}')
        return image, _turned(labels, orientation).astype(np.int64)

    def __getitem__(self, index: int) -> Any:
        image, mask = self.load(index)
        return (image, mask) if self.transform is None else self.transform(image, mask)

    def _labels(self, index: int) -> np.ndarray:
        """Read a mask as its file stores it: (H, W), values 0 to len(classes) - 1 or 255."""
        path = self.samples[index][1]
        if self._label_map is None:
            return _read_indices(path, len(self.classes))
        return _read_mapped(path, self._label_map)


class FolderDataset(SegmentationDataset):
    """A folder with `images/{train,val,test}/NAME.jpg`, `masks/{train,val,test}/NAME.png` and `classes.txt`.

    `classes.txt` has one name per line. Images may have any of the extensions in
    `vt_zoo.data.folders.IMAGE_EXTENSIONS`. Masks are grey or palette images (of 1 to 16 bits) whose values are class
    indices, or 255 for ignored pixels; see `map_labels` for other values and for coloured masks. `test/` is never used
    in training and may be missing.
    """

    def __init__(self, root: Union[str, Path], split: str, transform: Optional[Callable] = None) -> None:
        root = Path(root)
        images = _images(_part(root / 'images', split))
        classes = _read_names(root / 'classes.txt')
        repeated = [name for name in classes if classes.count(name) > 1]
        if repeated:
            raise InputError(f'{root / "classes.txt"} has {repeated[0]} twice, each class needs a name of its own')
        super().__init__(_with_masks(images, _part(root / 'masks', split)), classes, transform)


class CocoStuff(SegmentationDataset):
    """COCO-stuff's 91 stuff classes, from its stuffthingmaps. Things and unlabelled pixels are ignored.

    The layout is that of https://github.com/nightrome/cocostuff: `images/{train,val}2017/*.jpg` and, unpacked from
    stuffthingmaps_trainval2017.zip, `annotations/{train,val}2017/*.png`. A mask's value is the class id minus 1: 0 to
    90 are things, 91 to 181 are stuff, 255 is unlabelled.
    """
    own_labels = False

    def __init__(self, root: Union[str, Path], split: str, transform: Optional[Callable] = None) -> None:
        root, name = Path(root), f'{split}2017'
        images = _images(_part(root / 'images', name))
        super().__init__(_with_masks(images, _folder(root / 'annotations' / name)), COCO_STUFF, transform)

    def _labels(self, index: int) -> np.ndarray:
        labels = _read_indices(self.samples[index][1], COCO_THINGS + len(self.classes))
        return np.where((labels < COCO_THINGS) | (labels == IGNORED), IGNORED, labels - COCO_THINGS)


class CocoPanopticStuff(SegmentationDataset):
    """COCO's panoptic annotations as used by Detectron2's semantic FPN: class 0 is all things, 1 to 53 are stuff.

    The layout is COCO's: `{train,val}2017/*.jpg` (or below `images/`), `annotations/panoptic_{train,val}2017.json`, and
    `panoptic_{train,val}2017/*.png` below `annotations/` or, as in Detectron2, beside it. A pixel's segment number is
    R + 256 G + 256^2 B; 0 is void and ignored. The classes are the `categories` of the json, in the order of their ids.
    """
    own_labels = False

    def __init__(self, root: Union[str, Path], split: str, transform: Optional[Callable] = None) -> None:
        root, name = Path(root), f'{split}2017'
        images = _images(_folder(root / name, root / 'images' / name))
        masks = _folder(root / 'annotations' / f'panoptic_{name}', root / f'panoptic_{name}')
        self._json = root / 'annotations' / f'panoptic_{name}.json'
        self.described_by = (self._json,)
        segments, categories = _read_panoptic(self._json)
        stuff = sorted(i for i, (_, is_thing) in categories.items() if not is_thing)
        super().__init__(_with_masks(images, masks), ['things', *(categories[i][0] for i in stuff)], transform)
        for image, mask in self.samples:
            if mask.name not in segments:
                raise InputError(f'{self._json} has no segments for {mask.name}, the mask of image {image}')
        self._segments = [segments[mask.name] for _, mask in self.samples]
        self._label_of = {i: 0 for i in categories} | {i: 1 + label for label, i in enumerate(stuff)}

    def _labels(self, index: int) -> np.ndarray:
        path = self.samples[index][1]
        pixels = _read_mask(path, ('RGB',), 'RGB of segment numbers').pixels
        red, green, blue = np.moveaxis(pixels.astype(np.int32), 2, 0)
        numbers = red + 256 * green + 256 ** 2 * blue
        labels = np.full(numbers.shape, IGNORED, dtype=np.uint8)
        unknown = numbers != 0
        for number, category in self._segments[index].tolist():
            of_segment = numbers == number
            labels[of_segment] = self._label_of[category]
            unknown &= ~of_segment
        if unknown.any():
            raise InputError(
                f'mask {path} has the segment {numbers[unknown][0]}, allowed are 0 (void) and the '
                f'{len(self._segments[index])} segments that {self._json} lists for it')
        return labels


class LookIntoPerson(SegmentationDataset):
    """LIP: people in 20 classes, which are background, clothes and parts of the body, with left and right separate.

    The layout is `TrainVal_images/{train,val}_images/*.jpg` and
    `TrainVal_parsing_annotations/{train,val}_segmentations/*.png`, each of which may be below a second folder of the
    same name, as some archives unpack. If there is a `{train,val}_id.txt` beside the folder of images, the split
    consists of the names in it; otherwise of all images.
    """
    flip_pairs = ((14, 15), (16, 17), (18, 19))
    own_labels = False

    def __init__(self, root: Union[str, Path], split: str, transform: Optional[Callable] = None) -> None:
        folder = _lip_folder(Path(root), 'TrainVal_images', f'{split}_images')
        images = _images(folder)
        ids = folder.parent / f'{split}_id.txt'
        if ids.exists():
            by_name = {path.stem: path for path in images}
            names = _read_names(ids)
            for name in names:
                if name not in by_name:
                    raise InputError(f'{ids} lists {name}, but {folder / name}.jpg does not exist')
            images = [by_name[name] for name in names]
        masks = _lip_folder(Path(root), 'TrainVal_parsing_annotations', f'{split}_segmentations')
        super().__init__(_with_masks(images, masks), LIP, transform)


FORMATS: Dict[str, Type[SegmentationDataset]] = {
    'folder': FolderDataset,
    'coco_stuff': CocoStuff,
    'coco_panoptic_stuff': CocoPanopticStuff,
    'lip': LookIntoPerson,
}


def load_dataset(
        format: str,
        root: Union[str, Path],
        split: str,
        transform: Optional[Callable] = None,
) -> SegmentationDataset:
    """Find the images and masks of a split. This reads file names, and COCO's panoptic json, but no pixels.

    Args:
        format: A key of `FORMATS`, whose classes describe their layouts.
        root: Folder of the data set.
        split: 'train', 'val' or 'test'.
        transform: Called with (image, mask).

    Raises:
        InputError: The format or the split is unknown, a folder or file is missing, a folder holds no images, or an
            image has no mask.
    """
    if format not in FORMATS:
        raise InputError(f'format {format!r} is unknown, allowed are {", ".join(FORMATS)}')
    if split not in SPLITS:
        raise InputError(f'split {split!r} is unknown, allowed are {", ".join(SPLITS)}')
    return FORMATS[format](_folder(Path(root)), split, transform)


def _folder(*candidates: Path) -> Path:
    """The first candidate that is a folder."""
    for path in candidates:
        if path.is_dir():
            return path
    path = candidates[0]
    raise InputError(f'data folder {path} {"is not a folder" if path.exists() else "does not exist"}')


def _part(folder: Path, name: str) -> Path:
    """The folder of a part of the data set."""
    if not (folder / name).is_dir() and _folder(folder):
        parts = sorted(path.name for path in folder.iterdir() if path.is_dir())
        raise InputError(f'data folder {folder / name} does not exist, {folder} holds {", ".join(parts[:6]) or "none"}')
    return folder / name


def _lip_folder(root: Path, archive: str, name: str) -> Path:
    return _folder(root / archive / name, root / archive / archive / name)


def _images(folder: Path) -> List[Path]:
    names = sorted(name for name in os.listdir(folder) if is_image(name) and not is_left_out(name))
    if not names:
        raise InputError(f'data folder {folder} holds no images')
    return [folder / name for name in names]


def _with_masks(images: List[Path], folder: Path) -> List[Sample]:
    names = set(os.listdir(folder))  # listed once: a data set may have 10^5 files, perhaps on a network drive
    samples = [(image, folder / f'{image.stem}.png') for image in images]
    for image, mask in samples:
        if mask.name not in names:
            raise InputError(f'image {image} has no mask, {mask} does not exist')
    return samples


def _read_names(path: Path) -> List[str]:
    check_regular(path, 'list of names')
    try:
        names = [line.strip() for line in path.read_text(encoding='utf-8-sig').rstrip().splitlines()]
    except FileNotFoundError:
        raise InputError(f'{path} does not exist') from None
    except (OSError, UnicodeDecodeError) as e:
        raise InputError(f'{path} cannot be read: {e}') from e
    if not names or '' in names:
        raise InputError(f'{path} {"has an empty line" if names else "is empty"}, one name per line is needed')
    return names


def _read_panoptic(path: Path) -> Tuple[Dict[str, np.ndarray], Dict[int, Tuple[str, bool]]]:
    """Read panoptic annotations.

    COCO's training file has 1.3 million segments. Each is reduced to its ids as soon as it is parsed, and they are kept
    in arrays, which stay shared with the processes that load data, whereas lists and dicts would be copied.

    Returns:
        Segment and category ids, int32 (segments, 2), by file name of the mask; and (name, whether it is a thing) by
        category id.
    """
    def shrink(entry: Dict[str, Any]) -> Any:
        if 'segments_info' in entry:
            return entry['file_name'], np.array(entry['segments_info'], dtype=np.int32).reshape(-1, 2)
        if 'category_id' in entry:
            return entry['id'], entry['category_id']
        return entry if 'isthing' in entry or 'annotations' in entry else None

    check_regular(path, 'list of segments')
    try:
        with open(path, encoding='utf-8') as f:
            content = json.load(f, object_hook=shrink)
        segments = dict(content['annotations'])
        categories = {c['id']: (str(c['name']), bool(c['isthing'])) for c in content['categories']}
        used = set().union(*(of_mask[:, 1].tolist() for of_mask in segments.values()))
    except FileNotFoundError:
        raise InputError(f'{path} does not exist') from None
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise InputError(f'{path} cannot be read as panoptic annotations: {type(e).__name__} {first_line(e)}') from e
    unknown = used - set(categories)
    if unknown:
        raise InputError(f'{path} has a segment of category {min(unknown)}, which is not among its categories')
    return segments, categories


class _Mask(NamedTuple):
    """A mask as its file stores it."""
    mode: str
    pixels: np.ndarray
    palette: Optional[np.ndarray]  # (colours, 3), uint8


def _read_mask(path: Path, modes: Sequence[str], needed: str) -> _Mask:
    check_regular(path, 'mask')
    try:
        with Image.open(path) as mask:
            mode, pictures = mask.mode, getattr(mask, 'n_frames', 1)
            step = STEPS.get(mask.tile[0][3], 1) if mask.format == 'PNG' and mask.tile else 1
            pixels = np.asarray(mask)
            palette = np.array(mask.getpalette('RGB'), dtype=np.uint8).reshape(-1, 3) if mode == 'P' else None
            lossy = mask.format in LOSSY
    except Exception as e:  # as in load_image
        reason = 'it is not an image' if isinstance(e, Image.UnidentifiedImageError) else str(e).rstrip('.')
        raise InputError(f'mask {path} cannot be read: {reason}') from e
    if mode not in modes:
        raise InputError(f'mask {path} is an image of mode {mode!r}, needed is {needed}')
    if lossy:
        raise InputError(f'mask {path} has the content of a JPEG, which changes labels: a PNG is needed')
    if pictures > 1:
        raise InputError(f'mask {path} holds {pictures} pictures, but only one is allowed')
    return _Mask(mode, pixels // step if step > 1 else pixels, palette)


def _read_indices(path: Path, count: int) -> np.ndarray:
    """Read a mask (H, W) of indices below `count`, or 255."""
    needed = 'grey or palette of class indices, or a label_map of its colours, as {"255,0,0": 1}'
    indices = _read_mask(path, GREY, needed).pixels
    if indices.dtype == bool:
        indices = indices.astype(np.uint8)
    wrong = indices[(indices < 0) | ((indices >= count) & (indices != IGNORED))]
    if wrong.size:
        raise InputError(f'mask {path} has the label {wrong[0]}, allowed are 0 to {count - 1} and {IGNORED} (ignored)')
    return indices


def _read_mapped(path: Path, label_map: LabelMap) -> np.ndarray:
    """Read a mask (H, W) of class indices or 255 by a label map.

    If the map has colours, a palette image is read by its colours; if the map has only colours, grey values count as
    colours too. White in a one-bit image is 255 if the map has that value but not 1.
    """
    colored = ('RGB', 'RGBA') if label_map.colors else ()
    mask = _read_mask(path, (*GREY, *colored), f'grey or palette{" or RGB" if colored else ""} of what label_map names')
    pixels = mask.pixels
    try:
        if mask.mode == 'RGBA' and pixels[..., 3].min() < 255:
            raise InputError('has transparent pixels, but opaque ones are needed')
        if mask.mode in colored:
            return label_map.of_colors(pixels[..., :3])
        if pixels.dtype == bool:
            white = 1 if 1 in label_map.values or (label_map.values and IGNORED not in label_map.values) else 255
            pixels = pixels * np.uint8(white)
        palette = mask.palette
        if palette is None and pixels.dtype == np.uint8 and not label_map.values:
            palette = np.arange(256, dtype=np.uint8)[:, None].repeat(3, 1)
        if palette is None or not label_map.colors:
            return label_map.of_values(pixels)
        present = np.unique(pixels)
        if present[-1] >= len(palette):
            raise InputError(f'has the index {present[-1]}, but a palette of {len(palette)} colours')
        labels = np.zeros(256, dtype=np.int16)
        labels[present] = label_map.of_colors(palette[present])
        return labels[pixels]
    except InputError as e:
        raise InputError(f'mask {path} {e}') from None


def _turned(labels: np.ndarray, orientation: int) -> np.ndarray:
    """Turn a mask of the stored pixels upright in the same way as an image of this EXIF orientation."""
    if orientation == 1:
        return labels
    mask = Image.fromarray(labels.astype(np.uint8))
    mask.getexif()[ExifTags.Base.Orientation] = orientation
    return np.asarray(ImageOps.exif_transpose(mask))
