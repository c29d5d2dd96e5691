"""Models on the Hugging Face Hub: the folder that goes up, and the upload."""
import json
import shutil
from pathlib import Path
from typing import Any, Dict, Optional, Union

from huggingface_hub import HfApi, ModelCard, get_token
from huggingface_hub.utils import HFValidationError, validate_repo_id
from safetensors import safe_open

from ._version import __version__
from .checkpoint import check_input_size, drop_second_num_classes, load_model, whole
from .errors import InputError
from .hub import WEIGHTS, hub_reason
from .model_card import create_card

__all__ = ['check_repo_id', 'upload', 'write_release']


def check_repo_id(repo_id: str) -> None:
    """Raise InputError where this is no `org/name` that the hub takes."""
    try:
        validate_repo_id(repo_id)
        if '/' in repo_id:
            return
    except HFValidationError:
        pass
    raise InputError(f'repo-id must be org/name of letters, digits, "-", "_" and ".", got {repo_id!r}')


def _find_model(checkpoint_dir: Path) -> Path:
    for folder in (checkpoint_dir, checkpoint_dir / 'model'):
        if (folder / 'config.json').is_file():
            if not (folder / WEIGHTS).is_file():
                raise InputError(f'model folder {folder} holds no {WEIGHTS}, the one file of weights that timm reads')
            return folder
    raise InputError(f'{checkpoint_dir} holds no model: neither config.json nor model/config.json is there')


def _dtype(weights: Path) -> str:
    """Types of a file's floating-point tensors."""
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
    """Write the folder that goes to the hub: `model.safetensors`, `config.json` and `README.md`.

    The weights are copied as they are, after a check that they load.

    Args:
        checkpoint_dir: What `vt-zoo finetune` or `vt-zoo convert` wrote, or timm's `save_for_hf`.
        out: Folder to write, which must not be there.
        repo_id: `org/name` on the hub.
        license_id: The hub's name of the weights' licence, as 'apache-2.0'; the card says unknown where None.
        dataset: Name of the data; the card says unknown where None.

    Raises:
        InputError: There is no model, it does not load, or `out` is there.
        OSError: `out` cannot be written.
    """
    check_repo_id(repo_id)
    folder, out = _find_model(Path(checkpoint_dir)), Path(out)
    if out.exists():
        raise InputError(f'{out} is there already: choose another --out')
    model = load_model(str(folder))
    check_input_size(model, model.pretrained_cfg['input_size'], str(folder))
    config: Dict[str, Any] = json.loads((folder / 'config.json').read_text())
    names = config.get('label_names')
    if names is not None and len(names) != model.num_classes:
        raise InputError(f'model {folder} has {model.num_classes} classes, its config.json names {len(names)}')
    drop_second_num_classes(config)
    try:
        card = create_card(repo_id, model, config, _dtype(folder / WEIGHTS), license_id, dataset)
    except Exception as e:  # `training` may hold anything where others wrote it
        raise InputError(f'model {folder} has no card: its config.json holds unusual entries ({e!r})') from e
    with whole(out, replace=False) as new:
        new.mkdir()
        shutil.copyfile(folder / WEIGHTS, new / WEIGHTS)
        (new / 'config.json').write_text(json.dumps(config, indent=2))
        card.save(new / 'README.md')


def upload(folder: Union[str, Path], repo_id: str, private: bool = False) -> str:
    """Create the repository where it is not there, and upload a folder of `write_release` as one commit.

    The token is that of `hf auth login` or the environment's HF_TOKEN. The hub's own validator reads the card before
    anything is created.

    Returns:
        Address of the commit.

    Raises:
        InputError: There is no token, the hub refuses the card or the token, or it cannot be reached.
    """
    if get_token() is None:
        raise InputError('there is no token of the hub: run `hf auth login` or set HF_TOKEN')
    api = HfApi(library_name='vt_zoo', library_version=__version__)
    try:
        ModelCard.load(Path(folder) / 'README.md').validate()
        api.create_repo(repo_id, private=private or None, exist_ok=True)
        commit = api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message='Upload model with vt_zoo')
    except ValueError as e:
        raise InputError(f'the hub refuses {repo_id}: {" ".join(str(e).split())[:200]}') from e
    except Exception as e:  # of the client, of the library that it sends with, of the system
        raise InputError(f'{repo_id} cannot be published at {api.endpoint}: {hub_reason(e)}') from e
    return commit.commit_url
