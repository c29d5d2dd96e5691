"""Settings of a training run."""
from dataclasses import dataclass, field
from typing import Any, Dict, Optional, Tuple

__all__ = ['FinetuneSettings']


@dataclass
class FinetuneSettings:
    """What decides the outcome of a run. Names are those of timm's train.py; `vt-zoo finetune --help` explains them.

    The defaults are section 5.1 of the paper (SGD with momentum 0.9, weight decay 4e-5) with a learning rate for small
    batches, and a cosine instead of steps, since runs here are short.
    """
    model: str = 'vt_resnet18'
    model_kwargs: Dict[str, Any] = field(default_factory=dict)  # arguments of timm.create_model
    epochs: int = 30
    batch_size: int = 32
    img_size: Optional[int] = None  # the model's own
    opt: str = 'momentum'
    lr: float = 0.05
    weight_decay: float = 4e-5
    warmup_epochs: int = 2
    smoothing: float = 0.1
    drop: float = 0.
    drop_path: float = 0.
    model_ema_decay: float = 0.998
    scale: Tuple[float, float] = (0.35, 1.0)
    ratio: Tuple[float, float] = (3 / 4, 4 / 3)
    hflip: float = 0.5
    color_jitter: float = 0.4
    aa: Optional[str] = None
    val_fraction: float = 0.2
    seed: int = 0
    precision: str = 'auto'
