"""Slow twins of `lightning_sparse.functional`: plain Python numbers, one element at a time, from the equations."""

import itertools
import math

import torch


def numbers(tensor):
    """All elements in logical order, whatever the memory format."""
    return tensor.detach().double().contiguous().view(-1).tolist()


def like(values, tensor):
    return torch.tensor(values, dtype=torch.float64).reshape(tensor.shape).to(tensor.dtype)


def sorted_magnitudes(tensors):
    return sorted(abs(x) for tensor in tensors for x in numbers(tensor))


def quantile(tensors, q):
    """Linear interpolation between the order statistics around position (N - 1) q."""
    ordered = sorted_magnitudes(tensors)
    position = (len(ordered) - 1) * q
    low, high = ordered[math.floor(position)], ordered[math.ceil(position)]
    return low + (high - low) * (position - math.floor(position))


def topk_masks(tensors, k):
    """Rank everything by magnitude; among equals the earlier one wins."""
    entries = [(-abs(x), which, where) for which, t in enumerate(tensors) for where, x in enumerate(numbers(t))]
    kept = {(which, where) for _, which, where in sorted(entries)[:k]}
    return [
        torch.tensor([(which, where) in kept for where in range(t.numel())], dtype=torch.bool).reshape(t.shape)
        for which, t in enumerate(tensors)
    ]


def affordable(tensors, costs, budget, scales=None):
    """Buy from the largest magnitude down until one does not fit."""
    scales = scales or [1.0] * len(tensors)
    entries = [
        (-abs(x / scale), which, where, cost)
        for which, (t, cost, scale) in enumerate(zip(tensors, costs, scales, strict=True))
        for where, x in enumerate(numbers(t))
    ]
    spent = 0
    for bought, (*_, cost) in enumerate(sorted(entries)):
        spent += cost
        if spent > budget:
            return bought
    return len(entries)


def soft_threshold(theta, tau):
    return like([math.copysign(max(abs(x) - tau, 0.0), x) for x in numbers(theta)], theta)


def rescale_channels(weight, theta, tau):
    """c_o = 1.01 / (r_o + 0.01), r_o the share of the channel's magnitude that its kept weights hold."""
    scaled = []
    for w, t in zip(weight, theta, strict=True):
        magnitudes = [abs(x) for x in numbers(t)]
        kept = [x if x > tau else 0.0 for x in magnitudes]
        share = (sum(kept) / len(kept) + 1e-6) / (sum(magnitudes) / len(magnitudes) + 1e-6)
        scaled += [x * 1.01 / (share + 0.01) for x in numbers(w)]
    return like(scaled, weight)


def anneal_gradient(grad, mask, alpha):
    return like([g * (1.0 if m else alpha) for g, m in zip(numbers(grad), numbers(mask), strict=True)], grad)


def cubic(progress):
    return 1 - (1 - progress) ** 3


def gradient_annealing_decay(progress):
    """The larger of a cosine and of a sigmoid over [-6, 6]."""
    cosine = (1 + math.cos(math.pi * progress)) / 2
    sigmoid = 1 - 1 / (1 + math.exp(-(-6 + (6 - -6) * progress)))
    return max(cosine, sigmoid)


def groups(shape, pattern):
    """Per group the positions of its members, from the definition."""
    found = {}
    for where in itertools.product(*map(range, shape)):
        if pattern == "channel":
            key = where[:1]
        elif pattern.startswith("block"):
            a, b = map(int, pattern.removeprefix("block:").split("x"))
            key = (where[0] // a, where[1] // b, *where[2:])
        else:
            key = (where[0], where[1] // int(pattern.split(":")[1]), *where[2:])
        found.setdefault(key, []).append(where)
    return found


def patterned_masks(tensors, k, pattern):
    """Rank groups by their mean magnitude, earlier ones first among equals, or weights with the n largest in front."""
    entries = []
    for which, tensor in enumerate(tensors):
        for key, members in groups(tensor.shape, pattern).items():
            sizes = [abs(float(tensor[where].detach())) for where in members]
            if ":" not in pattern or pattern.startswith("block"):
                entries.append((-sum(sizes) / len(sizes), which, key, members))
                continue
            order = sorted(range(len(members)), key=lambda i: -sizes[i])
            for rank, i in enumerate(order):
                ahead = rank < int(pattern.split(":")[0])
                entries.append((-math.inf if ahead else -sizes[i], which, members[i], [members[i]]))
    masks = [torch.zeros(tensor.shape, dtype=torch.bool) for tensor in tensors]
    for _, which, _, members in sorted(entries, key=lambda entry: entry[:3])[:k]:
        for where in members:
            masks[which][where] = True
    return masks
