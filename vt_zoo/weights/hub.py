"""Models on the Hugging Face Hub: which repository a name means, its downloaded file, and what client errors mean."""
import hashlib
import os
import re
from pathlib import Path
from typing import Any, Dict, Optional

import torch.nn as nn
from huggingface_hub import hf_hub_download
from timm.models import get_pretrained_cfg, parse_model_name

from ..errors import InputError, first_line

WEIGHTS = 'model.safetensors'

_REASONS = {
    401: 'the hub does not know the token, or has no such repository that the token may read',
    403: 'the token does not allow it',
    404: 'the hub has no such repository, revision or file',
}


def find_hub_id(name: str) -> Optional[str]:
    """Repository on the hub, `org/name` or `org/name@revision`, that a model's weights come from; None for others.

    Args:
        name: `hf-hub:org/name` or a name that timm knows, with its tag.
    """
    kind, model_id = parse_model_name(name)
    if kind is not None:
        return model_id if kind == 'hf-hub' else None
    cfg = get_pretrained_cfg(model_id)
    return _repository(cfg.to_dict()) if cfg is not None else None


def find_trunk_hub_id(model: nn.Module) -> Optional[str]:
    """Repository on the hub that the pretrained trunk of a VTNet comes from; None for other models and other files."""
    return _repository(getattr(getattr(model, 'trunk', None), 'pretrained_cfg', {}))


def _repository(cfg: Dict[str, Any]) -> Optional[str]:
    elsewhere = cfg.get('file') or cfg.get('hf_hub_filename') not in (None, WEIGHTS)
    return None if elsewhere else cfg.get('hf_hub_id')


def download_weights(hub_id: str, cache_dir: Optional[str] = None) -> Path:
    """Download a repository's `model.safetensors` unless it is in the client's cache, and return its path there.

    Over HTTP, the client checks the size of a download but not its content. In the cache, large files are named after
    the SHA-256 that the hub gives for them, so their content can be checked here. On file systems without symbolic
    links there is no such name, and so no check.

    Raises:
        InputError: The file is not the one that the hub announced.
        Exception: Any error of the client.
    """
    repo_id, _, revision = hub_id.partition('@')
    path = Path(hf_hub_download(repo_id, WEIGHTS, revision=revision or None, cache_dir=cache_dir))
    name = Path(os.readlink(path)).name if path.is_symlink() else ''
    if re.fullmatch('[0-9a-f]{64}', name) and hashlib.sha256(path.read_bytes()).hexdigest() != name:
        raise InputError(f'its file in the cache is not what the hub announced, delete {path.resolve()}')
    return path


def hub_reason(error: Exception) -> str:
    """What an error of the hub's client means, in a few words without a full stop."""
    status = getattr(getattr(error, 'response', None), 'status_code', None)
    return _REASONS.get(status) or first_line(error).rstrip('.:')[:200]
