"""Mean IoU, IoU a class and pixel accuracy against a literal NumPy form."""
import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from vt_zoo.segmentation.metrics import evaluate, segment

IGNORED = 255


class Same(nn.Module):
    """Logits that are the image; keeps what it is called with."""

    def __init__(self):
        super().__init__()
        self.parameter = nn.Parameter(torch.zeros(1))
        self.sizes = []

    def forward(self, x):
        assert not self.training
        self.sizes.append(tuple(x.shape[-2:]))
        self.seen = x
        return x


def reference(predictions, masks, num_classes):
    """IoU of each class (None where it is absent), their mean, and pixel accuracy; lists of arrays (H, W)."""
    prediction = np.concatenate([p.ravel() for p in predictions])
    mask = np.concatenate([m.ravel() for m in masks])
    prediction, mask = prediction[mask != IGNORED], mask[mask != IGNORED]
    iou = []
    for c in range(num_classes):
        union = ((prediction == c) | (mask == c)).sum()
        iou.append(((prediction == c) & (mask == c)).sum() / union if union else None)
    return iou, np.mean([v for v in iou if v is not None]), (prediction == mask).mean()


def logits_of(prediction, num_classes):
    """Logits (1, classes, H, W) of which a prediction (H, W) is the argmax."""
    return torch.eye(num_classes)[torch.as_tensor(prediction, dtype=torch.long)].permute(2, 0, 1)[None]


def measure(predictions, masks, num_classes):
    return evaluate(
        Same().train(), [(logits_of(p, num_classes), torch.as_tensor(m)[None]) for p, m in zip(predictions, masks)],
        num_classes)


def random_pair(rng, classes, shape, ignored=0.2):
    prediction, mask = rng.choice(classes, shape), rng.choice(classes, shape)
    mask = np.where(rng.random(shape) < 0.4, prediction, mask)
    return prediction, np.where(rng.random(shape) < ignored, IGNORED, mask)


@pytest.mark.parametrize('num_classes', [2, 11, 255])
def test_measures(num_classes):
    rng = np.random.default_rng(0)
    pairs = [random_pair(rng, num_classes, shape) for shape in ((5, 7), (40, 30), (1, 1), (33, 64))]
    predictions, masks = zip(*pairs)
    metrics = measure(predictions, masks, num_classes)
    iou, miou, accuracy = reference(predictions, masks, num_classes)
    assert metrics.iou == [v if v is None else pytest.approx(v, rel=1e-5) for v in iou]
    assert metrics.miou == pytest.approx(miou, rel=1e-5)
    assert metrics.pixel_accuracy == pytest.approx(accuracy, rel=1e-5)


def test_batches_of_several_images():
    rng = np.random.default_rng(0)
    pairs = [random_pair(rng, 4, (6, 8)) for _ in range(5)]
    one_by_one = measure(*zip(*pairs), 4)
    images = torch.cat([logits_of(p, 4) for p, _ in pairs])
    masks = torch.stack([torch.as_tensor(m) for _, m in pairs])
    assert evaluate(Same(), [(images[:2], masks[:2]), (images[2:], masks[2:])], 4) == one_by_one


@pytest.mark.parametrize('prediction, mask, iou', [
    ([0, 0, 2, 2], [0, 2, 2, 2], [0.5, None, 2 / 3, None, None]),
    ([0, 0, 1, 0], [0, 0, 0, 0], [0.75, 0, None]),
    ([0, 0, 0, 0], [0, 0, 1, 0], [0.75, 0, None]),
    ([0, 1, 2, 0], [0, 1, 2, 0], [1, 1, 1]),
    ([1, 2, 0, 1], [0, 1, 2, 0], [0, 0, 0]),
])
def test_known_measures(prediction, mask, iou):
    """A class that is absent from both has no IoU, and does not count in the mean."""
    metrics = measure([np.array([prediction])], [np.array([mask])], len(iou))
    assert metrics.iou == [v if v is None else pytest.approx(v) for v in iou]
    assert metrics.miou == pytest.approx(np.mean([v for v in iou if v is not None]))
    assert metrics.pixel_accuracy == np.equal(prediction, mask).mean()


def test_predictions_at_ignored_pixels_do_not_matter():
    rng = np.random.default_rng(0)
    prediction, mask = random_pair(rng, 3, (20, 20))
    other = np.where(mask == IGNORED, 3, prediction)
    metrics = measure([other], [mask], 4)
    assert metrics == measure([prediction], [mask], 4)
    assert metrics.iou[3] is None


def test_all_pixels_ignored(input_error):
    with input_error('no pixel of the masks has a class'):
        measure([np.zeros((2, 2), dtype=int)], [np.full((2, 2), IGNORED)], 3)


def test_one_image_that_is_all_ignored_changes_nothing():
    rng = np.random.default_rng(0)
    prediction, mask = random_pair(rng, 3, (6, 6))
    with_it = measure([prediction, prediction], [mask, np.full((6, 6), IGNORED)], 3)
    assert with_it == measure([prediction], [mask], 3)


@pytest.mark.parametrize('shape, eval_size, size', [
    ((20, 30), None, (20, 30)), ((20, 30), 10, (10, 15)), ((20, 30), 40, (40, 60)), ((20, 30), 7, (7, 10)),
    ((20, 30), (16, 16), (16, 16)), ((20, 30), (8, 50), (8, 50)), ((30, 20), 10, (15, 10)), ((20, 20), 10, (10, 10))])
def test_eval_size(shape, eval_size, size):
    """Pillow resizes as antialiased bilinear interpolation does, and enlarges as plain one does."""
    def resize(maps, height, width):
        return np.stack([
            np.asarray(Image.fromarray(c).resize((width, height), Image.Resampling.BILINEAR)) for c in maps])

    model = Same().eval()
    image = torch.randn(1, 4, *shape, generator=torch.Generator().manual_seed(0))
    logits = segment(model, image, (40, 60), eval_size)
    assert model.sizes == [size]
    expected = resize(image[0].numpy(), *size)
    np.testing.assert_allclose(model.seen[0].numpy(), expected, atol=1e-5)
    assert logits.shape == (1, 4, 40, 60)
    np.testing.assert_allclose(logits[0].numpy(), resize(expected, 40, 60), atol=1e-5)


def test_measures_are_those_at_the_masks_resolution():
    """A prediction at a quarter of the size, brought to the size of the mask."""
    rng = np.random.default_rng(0)
    image = torch.as_tensor(rng.normal(size=(1, 3, 40, 60)), dtype=torch.float32)
    mask = rng.choice([0, 1, 2, IGNORED], (40, 60))
    metrics = evaluate(Same(), [(image, torch.as_tensor(mask)[None])], 3, 10)
    prediction = segment(Same().eval(), image, (40, 60), 10).argmax(1)[0].numpy()
    iou, miou, accuracy = reference([prediction], [mask], 3)
    assert metrics.iou == pytest.approx(iou)
    assert (metrics.miou, metrics.pixel_accuracy) == pytest.approx((miou, accuracy))


@pytest.mark.parametrize('error', [RuntimeError, ValueError, AssertionError])
def test_model_that_does_not_take_the_size(error, input_error):
    class Strict(Same):
        def forward(self, x):
            raise error('only 224')

    with input_error('does not take images of 5x8 pixels: only 224'):
        segment(Strict().eval(), torch.zeros(1, 3, 5, 8), (5, 8))


def test_evaluation_leaves_no_gradient():
    model = Same()
    evaluate(model, [(torch.randn(1, 3, 2, 2), torch.zeros(1, 2, 2, dtype=torch.long))], 3)
    assert not model.seen.requires_grad
    assert not model.training
