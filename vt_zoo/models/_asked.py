"""Lets timm's `reparameterize_model`, which asks the children of a model but not the model itself, reach the model."""
import weakref
from typing import Any, Dict, Optional

import torch
import torch.nn as nn


class _OfModel:
    """A model's `reparameterize`, offered by its child: the copy's own in a copied model, no effect in a lone child."""

    def __init__(self, model: Optional[nn.Module] = None) -> None:
        self._model = None if model is None else weakref.ref(model)

    def __call__(self) -> None:
        model = None if self._model is None else self._model()
        if model is not None:
            model.reparameterize()

    def __deepcopy__(self, memo: Dict[int, Any]) -> '_OfModel':
        return _OfModel(None if self._model is None else memo.get(id(self._model())))

    def __reduce__(self) -> tuple:
        return _OfModel, ()


class AsksModel(nn.Module):
    """Base class of a model that offers timm its own `reparameterize` through its child `asked`, even if replaced."""

    asked: str

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name == self.asked and isinstance(value, nn.Module) and not isinstance(value, torch.jit.ScriptModule):
            value.reparameterize = _OfModel(self)

    def __setstate__(self, state: Dict[str, Any]) -> None:
        super().__setstate__(state)
        setattr(self, self.asked, getattr(self, self.asked))
