"""Draws the learning rates of the recipes as timm's scheduler sets them.

    python benchmarks/learning_rate.py

writes benchmarks/results/learning_rate.png. tests/test_recipes.py compares the same rates with the paper's words.
"""
from pathlib import Path
from typing import List

import torch
import yaml
from matplotlib.figure import Figure
from timm.scheduler import create_scheduler_v2

from vt_zoo.files import whole
from vt_zoo.recipes import recipe_path

RESULTS = Path(__file__).parent / 'results'
KEYS = ('sched', 'warmup_lr', 'warmup_epochs', 'warmup_prefix', 'decay_epochs', 'decay_rate')


def learning_rates(name: str) -> List[float]:
    """Of each epoch."""
    recipe = yaml.safe_load(recipe_path(name).read_text())
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=recipe['lr'])
    scheduler, epochs = create_scheduler_v2(
        optimizer, num_epochs=recipe['epochs'], **{key: recipe[key] for key in KEYS if key in recipe})
    rates = []
    for epoch in range(epochs):
        rates.append(optimizer.param_groups[0]['lr'])
        scheduler.step(epoch + 1)
    return rates


def main() -> None:
    figure = Figure(figsize=(8, 3), layout='constrained')
    for ax, name in zip(figure.subplots(1, 2), ('plain', 'advanced')):
        rates = learning_rates(name)
        ax.step(range(len(rates)), rates, where='post', color='#0072b2')
        ax.set(xlabel='epoch', ylabel='learning rate', yscale='log')
        ax.set_title(f'{name}: first {rates[0]:g}, highest {max(rates):g}, last {rates[-1]:.2g}', fontsize=10)
        ax.grid(alpha=0.3)
    with whole(RESULTS / 'learning_rate.png') as new:
        figure.savefig(new, dpi=110)


if __name__ == '__main__':
    main()
