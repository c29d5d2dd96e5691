"""What the training loop does to a model."""
import torch
import torch.nn as nn

from vt_zoo.training.loop import Loop, accelerator_of


def test_convolutions_are_trained_in_channels_last():
    flat, solid = nn.Conv2d(3, 8, 3, bias=False), nn.Conv3d(3, 8, 3, bias=False)
    values = [conv.weight.detach().clone() for conv in (flat, solid)]
    with accelerator_of('cpu', 'no') as accelerator:
        loop = Loop(
            nn.ModuleList([flat, solid]), accelerator, {'opt': 'sgd', 'lr': 0.1, 'weight_decay': 0.},
            {'sched': 'cosine'}, iterations=1, batch_size=1, seed=0, ema_decay=0.9)
        for model in (loop.model, loop.kept_model):
            assert model[0].weight.is_contiguous(memory_format=torch.channels_last)
            assert model[1].weight.is_contiguous()
            assert all(torch.equal(conv.weight, value) for conv, value in zip(model, values))
