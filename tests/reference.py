"""The paper's equations (1) to (5) and the options of the VT stage, written out in NumPy with float64, image by image.

Positions are rows: x is the pixels of a feature map, (H * W, C), or the map itself, (C, H, W), where it says so.
"""
import math

import numpy as np
import torch.nn as nn
from timm.layers import LayerNorm2d


def array(tensor):
    return tensor.detach().double().numpy()


def pixels(image):
    return image.reshape(image.shape[0], -1).T  # (C, H, W) -> (H*W, C)


def softmax(logits, axis):
    exp = np.exp(logits - logits.max(axis, keepdims=True))
    return exp / exp.sum(axis, keepdims=True)


def matrix(conv):
    """Weights of a map, which may be a grouped point-wise convolution, as one block matrix (C_in, C_out)."""
    if isinstance(conv, nn.Linear):
        return array(conv.weight).T
    weight = array(conv.weight)[:, :, 0, 0]
    rows, columns = conv.in_channels // conv.groups, conv.out_channels // conv.groups
    full = np.zeros((conv.in_channels, conv.out_channels))
    for g in range(conv.groups):
        for i in range(rows):
            for o in range(columns):
                full[g * rows + i, g * columns + o] = weight[g * columns + o, i]
    return full


def normed(norm, x):
    """Norm of the positions of one image (P, C)."""
    if isinstance(norm, nn.Identity):
        return x
    if isinstance(norm, nn.BatchNorm2d):
        mean, var = array(norm.running_mean), array(norm.running_var)
    elif isinstance(norm, nn.GroupNorm):
        mean, var = np.zeros(x.shape[1]), np.zeros(x.shape[1])
        for group in np.split(np.arange(x.shape[1]), norm.num_groups):
            mean[group], var[group] = x[:, group].mean(), x[:, group].var()
    else:
        assert isinstance(norm, LayerNorm2d)
        mean, var = x.mean(1, keepdims=True), x.var(1, keepdims=True)
    return (x - mean) / np.sqrt(var + norm.eps) * array(norm.weight) + array(norm.bias)


def mapped(linear, x):
    if linear is None or isinstance(linear, nn.Identity):
        return x
    return normed(linear.norm, x @ matrix(linear.conv) if hasattr(linear, 'conv') else x)


def bilinear(plane, rows, cols):
    """Bilinear interpolation of one channel (H, W), align_corners=False, without antialiasing."""
    height, width = plane.shape
    result = np.empty((rows, cols))
    for r in range(rows):
        y = max((r + 0.5) * height / rows - 0.5, 0)
        y0 = int(y)
        y1 = min(y0 + 1, height - 1)
        for c in range(cols):
            x = max((c + 0.5) * width / cols - 0.5, 0)
            x0 = int(x)
            x1 = min(x0 + 1, width - 1)
            top = plane[y0, x0] * (1 - x + x0) + plane[y0, x1] * (x - x0)
            bottom = plane[y1, x0] * (1 - x + x0) + plane[y1, x1] * (x - x0)
            result[r, c] = top * (1 - y + y0) + bottom * (y - y0)
    return result


def pooling_reference(x, rows, cols):
    """(C, H, W) -> (L, C)."""
    return np.stack([bilinear(plane, rows, cols).ravel() for plane in x], axis=1)


def unit(v):
    return v / max(np.linalg.norm(v), 1e-12)


def kmeans_reference(x, num_tokens, iterations=5):
    """Lloyd's algorithm on the unit pixels of (C, H, W) -> (L, C)."""
    side = math.ceil(math.sqrt(num_tokens))
    cells = pooling_reference(x, side, side)
    centroids = [unit(cells[i * side ** 2 // num_tokens]) for i in range(num_tokens)]
    points = [unit(p) for p in pixels(x)]
    for _ in range(iterations):
        clusters = [[] for _ in centroids]
        for p in points:
            clusters[int(np.argmax([p @ c for c in centroids]))].append(p)
        centroids = [unit(np.mean(members, axis=0)) if members else c for members, c in zip(clusters, centroids)]
    return np.stack(centroids)


def position_reference(m, coefficients):
    """Code of token coefficients (L, H, W) -> (L, 64)."""
    height, width = coefficients.shape[1:]
    cells = np.stack([bilinear(plane, 8, 8).ravel() for plane in coefficients]) * (height * width)
    return mapped(m.linear, cells)


def tokenizer_reference(m, kind, x, tokens=None):
    """(C, H, W) and (L, CT) -> (L, C), or (L, C + 64) with a position code."""
    p = pixels(x)
    if kind == 'pooling':
        return pooling_reference(x, *m.grid)
    if kind == 'filter':  # equation (1)
        logits = p @ matrix(m.filters)
    elif kind == 'clustering':
        logits = p @ kmeans_reference(x, m.logit_norm.num_features).T
    else:  # equation (2), and learned filters beside those that the tokens make
        w_r = mapped(m.query, tokens) + array(m.filters.weight)
        logits = (p @ matrix(m.key.conv).T) @ w_r.T / np.sqrt(p.shape[1])
    a = softmax(normed(m.logit_norm, logits), 0)
    result = a.T @ mapped(m.value, p)
    if m.position_code is None:
        return result
    return np.concatenate([result, position_reference(m.position_code, a.T.reshape(-1, *x.shape[1:]))], axis=1)


def attention_reference(query, key, value, num_heads):
    heads = zip(*(np.split(t, num_heads, axis=1) for t in (query, key, value)))
    return np.concatenate([softmax(q @ k.T / np.sqrt(q.shape[1]), 1) @ v for q, k, v in heads], axis=1)


def transformer_reference(m, tokens, num_heads=1):
    """Equations (3) and (4)."""
    mixed = attention_reference(mapped(m.key, tokens), mapped(m.query, tokens), mapped(m.value, tokens), num_heads)
    tokens = tokens + normed(m.norm.norm, mixed)
    return tokens + mapped(m.fc2, np.maximum(mapped(m.fc1, tokens), 0))


def mixer_reference(m, kind, tokens, num_heads=1):
    if kind == 'transformer':
        return transformer_reference(m, tokens, num_heads)
    return mapped(m.linear, array(m.adjacency) @ tokens if kind == 'graph' else tokens)


def projector_reference(m, x, tokens, num_heads=1):
    """Equation (5), (H * W, C_in) -> (H * W, C_out)."""
    query = x @ matrix(m.query.conv).T
    return mapped(m.skip, x) + attention_reference(query, mapped(m.key, tokens), mapped(m.value, tokens), num_heads)


def stage_reference(modules, x, tokenizer='filter', recurrent=True, token_mixer='transformer', projector=True,
                    last_projector=False, dynamic_tokens=False, num_heads=1, **_):
    """The whole VT stage on one map (C, H, W), by the options and not by the classes of the modules."""
    tokens = None
    for i, m in enumerate(modules):
        kind = tokenizer if i == 0 or tokenizer == 'pooling' else 'recurrent' if recurrent else 'filter'
        if i == 0 or projector:
            guide, kept = tokens, None
            if i > 0 and dynamic_tokens:
                guide, kept = np.split(tokens, 2)
            tokens = mapped(m.embed, tokenizer_reference(m.tokenizer, kind, x, guide))
            if kept is not None:
                tokens = np.concatenate([tokens, kept])
        tokens = mixer_reference(m.transformer, token_mixer, tokens, num_heads)
        if projector and (i < len(modules) - 1 or last_projector):
            x = projector_reference(m.projector, pixels(x), tokens, num_heads).T.reshape(-1, *x.shape[1:])
    return x, tokens


def assert_close(tensor, expected, tol=1e-9):
    """A result is its reference: maps (B, C, H, W) as pixels (B, H * W, C)."""
    result = array(tensor)
    if result.ndim == 4:
        result = np.stack([pixels(r) for r in result])
    assert result.shape == expected.shape
    np.testing.assert_allclose(result, expected, rtol=tol, atol=tol)


def assert_each(result, reference, *inputs, tol=1e-9):
    """Each image of a batch is the reference of its inputs; what are maps there may be maps or pixels here."""
    references = [reference(*(array(t[b]) for t in inputs)) for b in range(len(inputs[0]))]
    assert_close(result, np.stack([pixels(r) if r.ndim == 3 else r for r in references]), tol)
