"""Methods that learn a score per weight, as the equations have them: autograd, full sorts, plain numbers."""

import math

import torch
from torch import nn

from tests.reference.training import Method


class OptG(Method):
    """w = m theta in front of a straight-through m(q); m anew in each epoch."""

    def __init__(self, thetas, pools, *, epochs, beta=1.0):
        super().__init__(thetas, pools)
        self.epochs, self.beta, self.chosen = epochs, beta, 0
        self.learned = {name: nn.Parameter(torch.zeros_like(thetas[name])) for name in self.names}
        self.masks = {name: torch.ones_like(thetas[name], dtype=torch.bool) for name in self.names}

    def share(self):
        return 1 / (1 + math.exp(-self.beta * (self.epoch - self.epochs / 2)))

    rate = share

    def shown(self, name, theta):
        if self.epoch != self.chosen:
            self.choose()
        q = self.learned[name]
        return theta * (self.masks[name] + q - q.detach())

    def choose(self):
        self.chosen = self.epoch
        way = 1.0 if self.epoch == self.epochs - 1 else self.share()
        for names, sparsity in self.pools:
            scores = [self.learned[name].detach().flatten() for name in names]
            order = torch.cat(scores).sort(descending=True, stable=True).indices
            kept = torch.zeros(len(order), dtype=torch.bool)
            kept[order[: len(order) - round(way * sparsity * len(order))]] = True
            for name, part in zip(names, kept.split([len(score) for score in scores]), strict=True):
                self.masks[name] = part.view(self.thetas[name].shape)

    def mask(self, name):
        return self.masks[name]

    def weight(self, name):
        return self.latent(name) * self.masks[name]

    def threshold(self, name):
        return None
