"""Training with weights in groups, by the definition of the groups. Slow and plain."""

import math

import torch

from tests.reference.dense_gradients import Powerpropagation, TopKAST
from tests.reference.functional import groups, patterned_masks
from tests.reference.sparse_to_sparse import Masked
from tests.reference.training import ST3, Hard, quantile


def numbers_of(pattern):
    """n and m, or None where groups live or die as a whole."""
    return tuple(map(int, pattern.split(":"))) if pattern[0].isdigit() else None


def count_kept(tensors, pattern, sparsity):
    """How many groups, or how many weights if these compete within their group, are left of weights of one pool."""
    counts = [t.numel() if numbers_of(pattern) else len(groups(t.shape, pattern)) for t in tensors]
    return sum(counts) - round(sparsity * sum(counts))


class Grouped(Hard):
    """Masks of groups in the place of masks of weights, for any method that takes the largest."""

    def __init__(self, *args, pattern, **settings):
        self.pattern = pattern
        super().__init__(*args, **settings)

    def size(self, name):
        return self.thetas[name]

    def choose(self, share, **settings):
        super().choose(share, **settings)
        for names, sparsity in self.pools:
            tensors = [self.size(name) for name in names]
            kept = count_kept(tensors, self.pattern, sparsity * share)
            self.masks.update(zip(names, patterned_masks(tensors, kept, self.pattern), strict=True))


class StraightThrough(Grouped):
    """The largest groups, anew at each step."""

    def shown(self, name, theta):
        return theta + (theta * self.masks[name] - theta).detach()

    def after_step(self, epoch, batch, batches):
        super().after_step(epoch, batch, batches)
        self.choose(1.0)


class GroupedPowerpropagation(Grouped, Powerpropagation):
    """Groups compete by what the network would see of them."""

    def size(self, name):
        return self.raised(self.latent(name))


class GroupedTopKAST(Grouped, TopKAST):
    """Both sets consist of groups."""

    size = GroupedPowerpropagation.size

    def choose(self, share, exploring=True):
        super().choose(1.0)
        for name in self.names:
            size = self.size(name)
            (wide,) = patterned_masks([size], count_kept([size], self.pattern, self.outside[name]), self.pattern)
            self.moving[name] = wide | self.masks[name] if exploring else self.masks[name]


class GroupedStatic(Masked):
    """A random mask of whole groups."""

    def __init__(self, thetas, sparsities, *, pattern, seed):
        self.pattern = pattern
        super().__init__(thetas, sparsities, end=0, every=1, seed=seed)

    def first_mask(self, name):
        numbers = self.draw(name)
        return patterned_masks([numbers], count_kept([numbers], self.pattern, self.sparsities[name]), self.pattern)[0]

    def progress(self, *args):
        return 1.0

    def update(self, progress):
        pass


class GroupedST3(ST3):
    """w_g = c theta_g max(1 - tau / norm_g, 0); or, of m weights, sign(theta) max(abs(theta) - min(tau, tau_g), 0)."""

    def __init__(self, thetas, pools, *, pattern, **settings):
        super().__init__(thetas, pools, **settings)
        self.pattern = pattern
        self.members = {}  # per weight a row for each group
        for name in self.names:
            flat = torch.arange(thetas[name].numel()).view(thetas[name].shape)
            self.members[name] = torch.tensor(
                [[flat[at] for at in group] for group in groups(flat.shape, pattern).values()]
            )

    def grouped(self, name):
        return self.thetas[name].detach().flatten()[self.members[name]]

    def norms(self, name):
        return (self.grouped(name) ** 2).mean(1).sqrt()

    def bounds(self, name):
        """The largest of the m - n smallest of each group."""
        kept, of = numbers_of(self.pattern)
        return self.grouped(name).abs().sort(1).values[:, of - kept - 1]

    def scattered(self, name, values):
        flat = torch.zeros(self.thetas[name].numel(), dtype=values.dtype)
        flat[self.members[name].flatten()] = values.flatten()
        return flat.view(self.thetas[name].shape)

    def projected(self, name):
        theta, tau, rows = self.thetas[name].detach(), self.tau[name], self.grouped(name)
        if tau <= 0:
            return theta
        if numbers_of(self.pattern):
            limits = self.bounds(name).clamp(max=tau).unsqueeze(1)
            sparse = self.scattered(name, rows.sign() * (rows.abs() - limits).clamp(min=0.0))
        else:
            sparse = self.scattered(name, rows * (1 - tau / self.norms(name)).clamp(min=0.0).unsqueeze(1))
        if not self.rescale:
            return sparse
        channel, alive = tuple(range(1, theta.ndim)), self.mask(name)
        share = ((theta.abs() * alive).mean(channel, True) + 1e-6) / (theta.abs().mean(channel, True) + 1e-6)
        return sparse * (1.01 / (share + 0.01))

    def choose(self, share):
        for names, sparsity in self.pools:
            unit = {name: 1 / math.sqrt(sum(self.thetas[name].shape)) if self.sigma else 1.0 for name in names}
            tau = self.quantile(names, sparsity, share, unit) if sparsity * share else -1.0
            self.tau.update({name: tau * unit[name] for name in names})

    def quantile(self, names, sparsity, share, unit):
        if numbers_of(self.pattern):
            if share == 1.0:
                return math.inf
            kept, of = numbers_of(self.pattern)
            return quantile([self.grouped(n).abs().sort(1).values[:, : of - kept] / unit[n] for n in names], share)
        norms = [self.norms(name) / unit[name] for name in names]
        sizes = [self.members[name].shape[1] for name in names for _ in self.members[name]]
        q = sparsity * share
        if len(set(sizes)) > 1:  # buy from the largest down until one does not fit
            left, bought = round((1 - q) * sum(sizes)), 0
            for i in torch.cat(norms).argsort(descending=True).tolist():
                left -= sizes[i]
                if left < 0:
                    break
                bought += 1
            q = 1 - bought / len(sizes)
        return quantile(norms, q)

    def mask(self, name):
        if self.fixed:
            return self.fixed[name]
        rows, tau = self.grouped(name), self.tau[name]
        if numbers_of(self.pattern):
            alive = rows.abs() > self.bounds(name).clamp(max=tau).unsqueeze(1)
        else:
            alive = (self.norms(name) > tau).unsqueeze(1).expand_as(rows)
        return self.scattered(name, alive if tau > 0 else torch.ones_like(alive))
