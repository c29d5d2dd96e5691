"""Publishing models on the Hugging Face Hub: the folder to upload, and the upload."""
import hashlib
import json
import re
import shutil
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Dict, Optional, Tuple, Union

from huggingface_hub import HfApi, ModelCard, get_token, hf_hub_download
from huggingface_hub.errors import RemoteEntryNotFoundError
from huggingface_hub.utils import HFValidationError, validate_repo_id
from safetensors import safe_open

from .._version import __version__
from ..errors import InputError
from ..files import whole
from .files import drop_second_num_classes
from .hub import WEIGHTS, hub_reason
from .loading import SEGMENTATION, check_logits, find_model, load, task_of
from .model_card import create_card

__all__ = ['upload', 'write_release']


CARD = 'README.md'


def _signed(card: str) -> str:
    """Append a comment to a card by which `_is_edited` recognises it."""
    card = card.rstrip('\n') + '\n'
    return f'{card}\n<!-- written by vt-zoo publish, {hashlib.sha256(card.encode()).hexdigest()} -->\n'


def _is_edited(card: str) -> bool:
    """Whether a card differs from the one that `_signed` returned."""
    return _signed(re.sub(r'\n<!-- written by vt-zoo publish, \w+ -->\n$', '', card)) != card


def check_repo_id(repo_id: str) -> None:
    """Raise InputError if this is not an `org/name` that the hub accepts."""
    try:
        validate_repo_id(repo_id)
        if '/' in repo_id:
            return
    except HFValidationError:
        pass
    raise InputError(f'repo-id must be org/name of letters, digits, "-", "_" and ".", got {repo_id!r}')


def _dtype(weights: Path) -> str:
    """Types of a file's floating-point tensors, in words."""
    with safe_open(weights, framework='pt') as f:
        dtypes = {f.get_slice(k).get_dtype() for k in f.keys()}  # noqa: SIM118
    names = {'F64': 'float64', 'F32': 'float32', 'F16': 'float16', 'BF16': 'bfloat16'}
    return ' and '.join(sorted(names[d] for d in dtypes if d in names))


def write_release(
        checkpoint_dir: Union[str, Path],
        out: Union[str, Path],
        repo_id: str,
        license_id: Optional[str] = None,
        dataset: Optional[str] = None,
) -> None:
    """Write the folder to upload to the hub: `model.safetensors`, `config.json` and `README.md`.

    The weights are copied unchanged, after checking that they load.

    Args:
        checkpoint_dir: Folder written by `vt-zoo finetune`, `vt-zoo convert` or timm's `save_for_hf`.
        out: Folder to write, which must not exist yet.
        repo_id: `org/name` on the hub.
        license_id: The hub's name for the weights' licence, such as 'apache-2.0'; if None, the card says unknown.
        dataset: Name of the data; if None, the card says unknown.

    Raises:
        InputError: There is no model, it does not load, or `out` exists.
        OSError: `out` cannot be written.
    """
    check_repo_id(repo_id)
    folder, out = find_model(Path(checkpoint_dir)), Path(out)
    if out.exists():
        raise InputError(f'{out} is there already: choose another --out')
    if not (folder / 'config.json').is_file():
        raise InputError(f'{checkpoint_dir} holds no model: neither config.json nor model/config.json is there')
    if task_of(folder) == SEGMENTATION:
        raise InputError(
            f'{folder} holds a segmenter, publish is for classifiers: its folder has a model card, upload it with '
            f'`hf upload ORG/NAME {folder}`')
    loaded = load(folder)
    if not (folder / WEIGHTS).is_file():
        raise InputError(f'model folder {folder} holds no {WEIGHTS}, the one file of weights that timm reads')
    check_logits(loaded.model, loaded.input_size, str(folder))
    config: Dict[str, Any] = json.loads((folder / 'config.json').read_text(encoding='utf-8'))
    drop_second_num_classes(config)
    try:
        card = create_card(repo_id, loaded.model, config, _dtype(folder / WEIGHTS), license_id, dataset)
    except Exception as e:  # `training` may hold anything if another program wrote it
        raise InputError(f'model {folder} has no card: its config.json holds unusual entries ({e!r})') from e
    with whole(out, replace=False) as new:
        new.mkdir()
        shutil.copyfile(folder / WEIGHTS, new / WEIGHTS)
        (new / 'config.json').write_text(json.dumps(config, indent=2))
        (new / CARD).write_text(_signed(str(card)), encoding='utf-8')


def upload(
        folder: Union[str, Path],
        repo_id: str,
        private: bool = False,
        replace_card: bool = False,
) -> Tuple[str, bool]:
    """Create the repository if it does not exist, and upload a folder of `write_release` as one commit.

    A model card on the hub that someone has edited since `vt-zoo publish` wrote it is kept.

    The token is the one of `hf auth login`, or HF_TOKEN in the environment. The hub's own validator checks the card
    before anything is created.

    Args:
        folder: Folder of `write_release`.
        repo_id: `org/name` on the hub.
        private: Make a new repository private, and refuse to upload to a public one.
        replace_card: Replace the model card even if it was edited.

    Returns:
        URL of the commit, and whether an edited card was kept.

    Raises:
        InputError: There is no token, the hub refuses the card or the token, the repository is public though it should
            be private, or the hub cannot be reached.
    """
    if get_token() is None:
        raise InputError('there is no token of the hub: run `hf auth login` or set HF_TOKEN')
    api = HfApi(library_name='vt_zoo', library_version=__version__)
    try:
        ModelCard.load(Path(folder) / 'README.md').validate()
        api.create_repo(repo_id, private=private or None, exist_ok=True)
        if private and not api.model_info(repo_id).private:
            raise InputError(
                f'{repo_id} is public: nothing was uploaded; make it private in its settings at the hub, or leave '
                '--private out')
        keep = not replace_card and _has_edited_card(repo_id)
        commit = api.upload_folder(
            repo_id=repo_id, folder_path=folder, commit_message='Upload model with vt_zoo',
            ignore_patterns=[CARD] if keep else None)
    except InputError:
        raise
    except ValueError as e:
        raise InputError(f'the hub refuses {repo_id}: {" ".join(str(e).split())[:200]}') from e
    except Exception as e:  # from the client, its HTTP library or the system
        raise InputError(f'{repo_id} cannot be published at {api.endpoint}: {hub_reason(e)}') from e
    return commit.commit_url, keep


def _has_edited_card(repo_id: str) -> bool:
    with TemporaryDirectory() as cache:  # if the hub does not answer, the client would use its own, older one
        try:
            card = Path(hf_hub_download(repo_id, CARD, cache_dir=cache)).read_bytes()
        except RemoteEntryNotFoundError:
            return False
    return _is_edited(card.decode(errors='replace'))
