"""Self-attention of timm's ViTs, with and without fused attention."""
import pytest
import timm
import torch

from vt_zoo.analysis.vit_attention import capture_self_attention, patch_grid


@pytest.fixture(scope='module')
def vit():
    torch.manual_seed(0)
    return timm.create_model('test_vit').eval()


def images(model):
    return torch.randn(2, *model.pretrained_cfg['input_size'], generator=torch.Generator().manual_seed(1))


def test_attention_is_that_of_each_layer(vit):
    x, seen = images(vit), []
    handles = [
        block.attn.qkv.register_forward_hook(lambda m, _, y: seen.append(y.detach())) for block in vit.blocks]
    maps = capture_self_attention(vit, x)
    for handle in handles:
        handle.remove()
    assert len(maps) == len(vit.blocks)
    for block, qkv, a in zip(vit.blocks, seen, maps):
        heads = block.attn.num_heads
        q, k, _ = qkv.double().reshape(2, -1, 3, heads, block.attn.head_dim).permute(2, 0, 3, 1, 4)
        expected = ((q * block.attn.head_dim ** -0.5) @ k.transpose(-2, -1)).softmax(-1)
        torch.testing.assert_close(a.double(), expected, rtol=1e-4, atol=1e-6)


def test_model_is_as_before(vit):
    x = images(vit)
    with torch.no_grad():
        before = vit(x)
    fused = [b.attn.fused_attn for b in vit.blocks]
    capture_self_attention(vit, x)
    assert [b.attn.fused_attn for b in vit.blocks] == fused
    assert not any(m._forward_pre_hooks for m in vit.modules())
    with torch.no_grad():
        assert torch.equal(vit(x), before)


@pytest.mark.parametrize(('name', 'prefix'), [('test_vit', 1), ('deit_tiny_distilled_patch16_224', 2)])
def test_grid(name, prefix):
    model = timm.create_model(name).eval()
    x = images(model)
    (rows, columns), before = patch_grid(model, x)
    assert (rows * columns + before) == capture_self_attention(model, x)[0].shape[-1]
    assert before == prefix


@pytest.mark.parametrize('name', ['resnet18', 'swin_tiny_patch4_window7_224'])
def test_other_models(name):
    model = timm.create_model(name).eval()
    with pytest.raises(ValueError, match='model must'):
        capture_self_attention(model, torch.randn(1, 3, 224, 224))
