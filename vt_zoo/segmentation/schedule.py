"""Learning rate as a function of the iteration alone, so that a run goes on after any interruption."""
import math

from .settings import SegmentSettings


def learning_rate(settings: SegmentSettings, iteration: int) -> float:
    """Rate of an iteration, counted from 0.

    'multistep' is Detectron2's: to a tenth at each of `steps`. 'poly' is lr * (1 - i / iterations) ** power, 'cosine'
    half a period of it; both end at 0. In the first `warmup` iterations the rate rises linearly from a thousandth.
    """
    done = iteration / settings.iterations
    if settings.schedule == 'multistep':
        factor = 0.1 ** sum(iteration >= step for step in settings.steps)
    elif settings.schedule == 'poly':
        factor = (1 - done) ** settings.power
    else:
        factor = 0.5 * (1 + math.cos(math.pi * done))
    if iteration < settings.warmup:
        factor *= 0.001 + 0.999 * iteration / settings.warmup
    return settings.lr * factor
