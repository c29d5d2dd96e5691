"""Measures of attention against their formulas, written out in NumPy, and on cases whose value is known."""
import math

import numpy as np
import pytest
import torch

from vt_zoo.analysis.metrics import (
    attention_correlation,
    attention_entropy,
    attention_spread,
    effective_rank,
    foreground_ratio,
    foreground_share,
    interaction_map,
    locality,
    record_interaction,
    resize_attention,
    token_cosine,
    token_similarity,
    uniform_locality,
)
from vt_zoo.analysis.records import VTRecord


def attention(batch=2, tokens=3, height=4, width=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(batch, tokens, height * width, generator=generator, dtype=torch.float64)
    return logits.softmax(-1).unflatten(-1, (height, width))


def uniform(height, width):
    return torch.full((1, 2, height, width), 1 / (height * width), dtype=torch.float64)


def one_pixel(height, width, row, column):
    a = torch.zeros(1, 1, height, width, dtype=torch.float64)
    a[0, 0, row, column] = 1
    return a


def test_entropy():
    a = attention()
    expected = np.array([[-sum(p * math.log(p) for p in m.flatten().tolist()) for m in image] for image in a])
    np.testing.assert_allclose(attention_entropy(a), expected, rtol=1e-12)
    np.testing.assert_allclose(attention_entropy(a, normalize=True), expected / math.log(20), rtol=1e-12)


def test_entropy_of_known_maps():
    assert attention_entropy(uniform(473, 473))[0, 0].item() == pytest.approx(12.318, abs=5e-4)  # the paper's E_conv
    torch.testing.assert_close(attention_entropy(uniform(7, 3), normalize=True), torch.ones(1, 2, dtype=torch.float64))
    assert attention_entropy(one_pixel(4, 4, 2, 1)).item() == 0
    assert attention_entropy(one_pixel(1, 1, 0, 0), normalize=True).item() == 0


def test_interaction():
    a = attention()
    w = torch.randn(2, 3, 3, dtype=torch.float64).softmax(-1)
    expected = np.zeros(a.shape)
    for b in range(2):
        for l in range(3):  # noqa: E741  the paper's letter
            for other in range(3):
                expected[b, l] += w[b, l, other].item() * a[b, other].numpy()
    np.testing.assert_allclose(interaction_map(a, w), expected, rtol=1e-12)
    np.testing.assert_allclose(interaction_map(a, w).sum((-2, -1)), 1, rtol=1e-12)


def test_interaction_of_a_pyramid():
    """Tokens of two levels, one transformer: the coarse level's attention counts in the fine one's map."""
    fine, coarse = attention(1, 2, 4, 4), attention(1, 2, 2, 2, seed=1)
    w = torch.randn(1, 4, 4, dtype=torch.float64).softmax(-1)
    records = [VTRecord(a, w, None, torch.zeros(1, 2, 3)) for a in (fine, coarse)]
    both = torch.cat([fine, resize_attention(coarse, (4, 4))], 1)
    torch.testing.assert_close(record_interaction(records, 0), torch.einsum('lm,mhw->lhw', w[0, :2], both[0])[None])
    assert record_interaction(records, 1).shape == (1, 2, 2, 2)
    lone = VTRecord(fine, w[:, :2, :2], None, torch.zeros(1, 2, 3))
    torch.testing.assert_close(record_interaction([*records, lone], 2), interaction_map(fine, w[:, :2, :2]))
    assert record_interaction([VTRecord(None, w, None, torch.zeros(1, 4, 3))], 0) is None


def test_resized_attention_sums_to_one():
    a = resize_attention(attention(), (9, 2))
    assert a.shape == (2, 3, 9, 2)
    torch.testing.assert_close(a.sum((-2, -1)), torch.ones(2, 3, dtype=torch.float64))


def test_foreground():
    a = attention()
    mask = torch.rand(2, 4, 5, generator=torch.Generator().manual_seed(1)) > 0.6
    for b in range(2):
        for t in range(3):
            inside, outside = a[b, t][mask[b]].numpy(), a[b, t][~mask[b]].numpy()
            assert foreground_share(a, mask)[b, t].item() == pytest.approx(inside.sum(), rel=1e-6)
            assert foreground_ratio(a, mask)[b, t].item() == pytest.approx(inside.mean() / outside.mean(), rel=1e-6)


def test_foreground_of_a_finer_mask():
    """A mask of 8 x 10 counts by the share of foreground in each pixel of A."""
    a = attention()
    mask = torch.zeros(2, 8, 10)
    mask[:, :3, :5] = 1
    cover = mask.unfold(1, 2, 2).unfold(2, 2, 2).mean((-2, -1)).double()
    torch.testing.assert_close(foreground_share(a, mask), (a * cover[:, None]).sum((-2, -1)))


def test_foreground_ratio_of_known_maps():
    mask = torch.zeros(1, 6, 6)
    mask[0, :2] = 1
    torch.testing.assert_close(foreground_ratio(uniform(6, 6), mask), torch.ones(1, 2, dtype=torch.float64))
    assert foreground_ratio(uniform(6, 6), torch.zeros(1, 6, 6)).isnan().all()
    assert foreground_ratio(uniform(6, 6), torch.ones(1, 6, 6)).isnan().all()


def test_spread():
    a = attention(1, 2)
    expected = []
    for m in a[0].numpy():
        places = np.array([(i, j) for i in range(4) for j in range(5)], float)
        weights = m.flatten()
        centre = weights @ places
        expected.append(sum(w * math.dist(p, centre) for w, p in zip(weights, places)) / math.hypot(4, 5))
    np.testing.assert_allclose(attention_spread(a)[0], expected, rtol=1e-12)
    assert attention_spread(one_pixel(9, 7, 3, 6)).item() == 0
    assert attention_spread(uniform(128, 128))[0, 0].item() == pytest.approx(0.3826 / math.sqrt(2), abs=1e-3)


def test_similarity():
    a = attention(3)
    expected = np.mean([[
        [np.vdot(m, n) / np.linalg.norm(m) / np.linalg.norm(n) for n in image.numpy()] for m in image.numpy()]
        for image in a], axis=0)
    np.testing.assert_allclose(token_similarity(a), expected, rtol=1e-12)
    twins = a[:, [0, 0]]
    torch.testing.assert_close(token_similarity(twins), torch.ones(2, 2, dtype=torch.float64))


def literal_cosine(rows):
    """Mean cosine of two different rows of a matrix."""
    pairs = [(i, j) for i in range(len(rows)) for j in range(len(rows)) if i != j]
    return np.mean([rows[i] @ rows[j] / np.linalg.norm(rows[i]) / np.linalg.norm(rows[j]) for i, j in pairs])


def literal_rank(rows):
    shares = np.linalg.svd(rows - rows.mean(0))[1] ** 2
    shares = shares[shares > 1e-12 * shares.sum()] / shares.sum()
    return math.exp(-(shares * np.log(shares)).sum())


def test_how_alike_tokens_are():
    a = attention(3)
    tokens = torch.randn(3, 7, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = [literal_cosine(image.reshape(len(image), -1) - image.mean()) for image in a.numpy()]
    np.testing.assert_allclose(attention_correlation(a), expected, rtol=1e-10)
    np.testing.assert_allclose(token_cosine(tokens), [literal_cosine(t) for t in tokens.numpy()], rtol=1e-10)
    np.testing.assert_allclose(effective_rank(tokens), [literal_rank(t) for t in tokens.numpy()], rtol=1e-10)
    for half in (torch.float16, torch.bfloat16):
        torch.testing.assert_close(effective_rank(tokens.to(half)), effective_rank(tokens).float(), rtol=0.02, atol=0)


def test_how_alike_known_tokens_are():
    same, corners = torch.ones(1, 4, 6), torch.eye(4)[None]
    assert token_cosine(same).item() == pytest.approx(1) and effective_rank(same).item() == 0
    assert token_cosine(corners).item() == 0 and effective_rank(corners).item() == pytest.approx(3)
    for scale in (1e-20, 1, 1e25):
        assert effective_rank(scale * torch.randn(1, 1, 64).expand(1, 16, 64)).item() == 0
        assert effective_rank(scale * corners).item() == pytest.approx(3)
    halves = torch.cat([torch.eye(2), torch.eye(2)])[None]  # two pairs of equal tokens differ in one direction
    assert effective_rank(halves).item() == pytest.approx(1)
    for value in (float('nan'), float('inf')):
        broken = torch.stack([corners[0], corners[0].where(corners[0] > 0, value)])
        rank = effective_rank(broken)
        assert rank[0].item() == pytest.approx(3) and rank[1].isnan()
    pixels = one_pixel(4, 5, 1, 2)
    assert attention_correlation(torch.cat([pixels, pixels], dim=1)).item() == pytest.approx(1)
    assert attention_correlation(uniform(4, 5)).item() == 0
    assert token_cosine(same[:, :1]).isnan().all() and attention_correlation(pixels).isnan().all()


@pytest.mark.parametrize('prefix', [0, 2])
def test_locality(prefix):
    rows, columns = 3, 4
    logits = torch.randn(2, 3, prefix + 12, prefix + 12, generator=torch.Generator().manual_seed(0)).double()
    w = logits.softmax(-1)
    expected = np.zeros((2, 3))
    for b in range(2):
        for h in range(3):
            for i in range(rows):
                for j in range(columns):
                    of_pixel = w[b, h, prefix + i * columns + j, prefix:].numpy().reshape(rows, columns)
                    near = of_pixel[max(i - 1, 0):i + 2, max(j - 1, 0):j + 2]
                    expected[b, h] += near.sum() / of_pixel.sum() / (rows * columns)
    np.testing.assert_allclose(locality(w, (rows, columns), prefix), expected, rtol=1e-12)


def test_locality_of_known_maps():
    assert uniform_locality((14, 14)) == pytest.approx(0.0416, abs=1e-4)
    even = torch.full((1, 1, 196, 196), 1 / 196)
    assert locality(even, (14, 14)).item() == pytest.approx(uniform_locality((14, 14)), rel=1e-5)
    assert locality(torch.eye(12)[None, None], (3, 4)).item() == 1
