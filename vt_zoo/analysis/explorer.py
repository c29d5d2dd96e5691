"""A web page that shows what tokens look at. gradio is imported only when the page is built (extra `explore`).

The page needs nothing from the internet: it uses the system's fonts, and analytics are off.
"""
import html
import os
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Dict, List, Optional, Tuple, Union

import numpy as np
import torch
from PIL import Image

from ..data.images import load_image
from ..errors import InputError, printable
from ..weights.loading import SEGMENTATION, Loaded
from .figures import draw_token, overlay_tokens
from .gate import Gate, is_uploaded
from .metrics import attention_entropy, record_interaction
from .records import capture_tokens

__all__ = ['create_app']

MAX_SIDE = 1024  # of an image given to a segmenter, which needs about 1 GB of memory at 1024x1024
MAX_FILE_SIZE = '20mb'
CLASSES = 5  # number of most likely classes to show
THUMBNAIL = 192  # longer side in pixels

CSS = '''
#tokens .grid-wrap {min-height: 0}
#tokens .caption-label {font-size: 11px}
#image img {width: 100%; height: 100%; object-fit: contain}
'''


@dataclass(eq=False)
class Look:
    """What a model sees in one image.

    Attributes:
        image: The image as the model saw it.
        prediction: Probabilities of the most likely classes; for a segmenter, the mask (height, width) of 0 and 1 of
            each class that occurs.
        attention: A (L, H, W) of each module that has one, by its number, counted from 1; for VT-FPN, of each level.
        interaction: A-hat (L, H, W) of the same modules; None for a module that has none.
    """
    image: Image.Image
    prediction: Dict[str, Union[float, np.ndarray]]
    attention: Dict[int, torch.Tensor]
    interaction: Dict[int, Optional[torch.Tensor]]


@torch.inference_mode()
def look(loaded: Loaded, image: Image.Image) -> Look:
    """Run a model on an image and keep what its tokens attend to.

    Args:
        loaded: The model.
        image: RGB image. For a segmenter, it is shrunk if a side is longer than 1024 pixels.

    Raises:
        InputError: The model does not take images of this size.
        ValueError: The model has no tokens that attend to pixels.
    """
    if loaded.task == SEGMENTATION and max(image.size) > MAX_SIDE:
        image = image.copy()
        image.thumbnail((MAX_SIDE, MAX_SIDE))
    x = loaded.prepare(image)
    shown = loaded.shown(x)
    prediction = _segment(loaded, x) if loaded.task == SEGMENTATION else _classify(loaded, x)
    records = capture_tokens(loaded.model, x[None])
    attention = {i: r.attention[0] for i, r in enumerate(records, 1) if r.attention is not None}
    if not attention:
        raise ValueError('its tokenizers have no attention')
    interaction = {i: record_interaction(records, i - 1) for i in attention}
    return Look(shown, prediction, attention, {i: None if a is None else a[0] for i, a in interaction.items()})


def _classify(loaded: Loaded, x: torch.Tensor) -> Dict[str, float]:
    top = loaded.model(x[None]).softmax(-1)[0].topk(min(CLASSES, len(loaded.classes)))
    names = [printable(loaded.classes[i]) for i in top.indices]
    unique = [name if names.count(name) == 1 else f'{name} ({i})' for name, i in zip(names, top.indices.tolist())]
    return dict(zip(unique, top.values.tolist()))


def _segment(loaded: Loaded, x: torch.Tensor) -> Dict[str, np.ndarray]:
    from ..segmentation.metrics import segment

    classes = segment(loaded.model, x[None], tuple(x.shape[-2:])).argmax(1)[0]
    counts = classes.flatten().bincount(minlength=len(loaded.classes))
    present = [i for i in counts.argsort(descending=True) if counts[i] > 0]
    return {loaded.classes[i]: (classes == i).float().numpy() for i in present}


def _colors(classes: List[str]) -> Dict[str, str]:
    from ..segmentation.predict import palette

    return {name: f'#{r:02x}{g:02x}{b:02x}' for name, (r, g, b) in zip(classes, palette(len(classes)))}


def _draw_tokens(seen: Optional[Look], module: int) -> Optional[List[Tuple[Image.Image, str]]]:
    """Draw small pictures of all tokens, with captions; tokens are counted from 1, as in the figures."""
    if seen is None:
        return None
    image = seen.image.copy()
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    entropy = attention_entropy(seen.attention[module][None], normalize=True)[0].tolist()
    pictures = overlay_tokens(image, seen.attention[module])
    return [(picture, f'{i}: {e:.2f}') for i, (picture, e) in enumerate(zip(pictures, entropy), 1)]


def _draw_one(seen: Optional[Look], module: int, token: int) -> Tuple[Optional[Image.Image], str]:
    """Draw a large picture of a token, and describe its entropy in words."""
    if seen is None:
        return None, ''
    attention = seen.attention[module]
    nats, share = (attention_entropy(attention[None], normalize)[0, token] for normalize in (False, True))
    height, width = attention.shape[-2:]
    return draw_token(seen.image, attention, seen.interaction[module], token), (
        f'**Token {token + 1}**: the entropy of A is **{nats:.3f}** nats, **{share:.3f}** of ln({height} · {width}), '
        'which uniform attention has.')


def _draw_all(seen: Optional[Look], module: int, token: int) -> Tuple:
    return (_draw_tokens(seen, module), *_draw_one(seen, module, token))


def create_app(loaded: Loaded, title: str, folder: Path, port: int) -> Any:
    """Build the page as an ASGI application, for uvicorn or another server on this machine.

    Args:
        loaded: The model to explore; it processes one image at a time.
        title: Heading of the page.
        folder: Folder for uploaded and drawn files, which only this page may use. It is kept small, but not deleted.
        port: Port that the server listens on; requests with another Host or from another Origin get a 403.

    Raises:
        InputError: gradio or matplotlib is not installed.
        ValueError: The model has no tokens that attend to pixels.
    """
    try:
        import gradio as gr
        from fastapi import FastAPI
    except ImportError:
        raise InputError("the explorer needs gradio: pip install 'vt_zoo[explore]'") from None
    folder = folder.resolve()
    os.environ['GRADIO_TEMP_DIR'] = str(folder)  # read whenever a file is saved
    lock = threading.Lock()  # the hooks of `capture_tokens` work for one image at a time
    blank = look(loaded, Image.new('RGB', (64, 64)))
    modules = list(blank.attention)
    overlay_tokens(blank.image, blank.attention[modules[0]])  # raises now if matplotlib is missing

    def open_image(path: Optional[str]) -> Tuple:
        if path is None:
            return None, None, None
        try:
            if not is_uploaded(path, folder):
                raise InputError('the image must be an uploaded file')
            image = load_image(path)
            with lock:
                seen = look(loaded, image)
        except InputError as e:
            gr.Warning(html.escape(str(e).replace(path, Path(path).name)), duration=None)
            return None, None, None
        predicted = seen.prediction
        if loaded.task == SEGMENTATION:
            predicted = seen.image, [(mask, name) for name, mask in predicted.items()]
        return seen, seen.image, predicted

    with gr.Blocks(title=title, analytics_enabled=False) as blocks:
        seen, token = gr.State(), gr.State(0)
        gr.Markdown(f'## {html.escape(title)}')
        with gr.Row():
            with gr.Column(scale=1, min_width=260):
                file = gr.File(label='Image', height=120, elem_id='file')
                gr.Markdown('What the model sees')
                image = gr.Image(show_label=False, height=220, elem_id='image', buttons=[])
                if loaded.task == SEGMENTATION:
                    gr.Markdown('The mask')
                    prediction = gr.AnnotatedImage(
                        show_label=False, color_map=_colors(loaded.classes), elem_id='prediction', buttons=[])
                else:
                    prediction = gr.Label(label='Prediction', elem_id='prediction')
            with gr.Column(scale=3, min_width=480):
                module = gr.Radio(
                    modules, value=modules[0], elem_id='module',
                    label='Level of VT-FPN, from fine to coarse' if loaded.task == SEGMENTATION else 'VT module')
                gr.Markdown('Where each token looks, with the entropy as a share of uniform attention. Click a token.')
                gallery = gr.Gallery(
                    show_label=False, columns=8, height='auto', object_fit='contain', allow_preview=False, buttons=[],
                    interactive=False, elem_id='tokens')
                text = gr.Markdown(elem_id='entropy')
                picture = gr.Image(show_label=False, elem_id='token', buttons=[])

        def pick(seen: Optional[Look], module: int, event: gr.EventData) -> Tuple:
            if seen is None:
                raise gr.Error('open an image first')
            data = event._data if isinstance(event._data, dict) else {}
            index, tokens = data.get('index'), len(seen.attention[module])
            if not isinstance(index, int) or not 0 <= index < tokens:
                raise gr.Error(f'the token must be a whole number from 0 to {tokens - 1}')
            return (index, *_draw_one(seen, module, index))

        # clicks made while the page is busy are queued and handled in order
        in_order = {'trigger_mode': 'multiple', 'concurrency_id': 'page', 'concurrency_limit': 1}
        draw_all = {'fn': _draw_all, 'inputs': [seen, module, token], 'outputs': [gallery, picture, text], **in_order}
        file.change(open_image, file, [seen, image, prediction], **in_order).then(**draw_all)
        module.change(**draw_all)
        gallery.select(pick, [seen, module], [token, picture, text], **in_order)
    font = [gr.themes.Font(name) for name in ('Helvetica Neue', 'Arial', 'sans-serif')]
    mono = [gr.themes.Font('monospace')]
    app = gr.mount_gradio_app(
        FastAPI(openapi_url=None), blocks, '/', footer_links=[], run_history=False, ssr_mode=False, pwa=False,
        mcp_server=False, enable_monitoring=False, max_file_size=MAX_FILE_SIZE, css=CSS,
        theme=gr.themes.Default(font=font, font_mono=mono))
    blocks.has_launched = True  # otherwise gradio opens files that were not uploaded
    return Gate(app, folder, port)
