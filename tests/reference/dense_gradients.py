"""Methods that read dense gradients or let weights come back, as the equations have them. Slow and plain."""

import math

import torch

from tests.reference.training import GMP, Hard, HardMask, Method, largest, ratio


def forget(host, theta, kept=0.0):
    """Zero what the optimizer remembers of a weight, but of some entries."""
    for slot in host.state[theta].values():
        if slot.shape == theta.shape:
            slot.mul_(kept)


class KeepMask(Hard):
    """The weights start with zeros and keep them."""

    def __init__(self, thetas, names, zeros):
        super().__init__(thetas, [([name], 0.0) for name in names], start=0, end=1)
        for name in names:
            size = thetas[name].numel()
            (self.masks[name],) = largest([thetas[name]], size - round(zeros * size))
        self.clear()

    def clear(self):
        for name in self.names:
            self.thetas[name].data.mul_(self.masks[name])

    def shown(self, name, theta):
        return theta * self.masks[name]

    def after_step(self, epoch, batch, batches):
        self.clear()


class StraightThrough(Hard):
    """w = theta + stop_gradient(m theta - theta), the mask taken after every so many steps."""

    def shown(self, name, theta):
        return theta + (theta * self.masks[name] - theta).detach()

    def after_step(self, epoch, batch, batches):
        super().after_step(epoch, batch, batches)
        if self.step % self.every == 0:
            self.choose(ratio(epoch, batch, batches, self.start, self.end))


def lamp(theta):
    """Score by score, from the definition."""
    squares = theta.detach().double().flatten() ** 2
    scores = [square / squares[squares >= square].sum() for square in squares]
    return torch.stack(scores).view(theta.shape)


class LAMP(GMP):
    """The largest scores of all layers are kept."""

    def choose(self, share):
        for names, sparsity in self.pools:
            scores = [lamp(self.thetas[name]) for name in names]
            size = sum(score.numel() for score in scores)
            self.masks.update(zip(names, largest(scores, size - round(sparsity * share * size)), strict=True))


class Powers(Hard):
    """The latents are roots of the weights."""

    def __init__(self, thetas, pools, *, power, **settings):
        self.power = power
        for names, _ in pools:
            for name in names:
                thetas[name].data = thetas[name].data.sign() * thetas[name].data.abs() ** (1 / power)
        super().__init__(thetas, pools, **settings)

    def raised(self, theta):
        return theta.sign() * theta.abs() ** self.power

    def weight(self, name):
        return self.raised(self.latent(name)) * self.masks[name]


class Powerpropagation(Powers):
    """Masks on a cubic ramp, differentiated by autograd."""

    def shown(self, name, theta):
        return self.raised(theta) * self.masks[name]

    def after_step(self, epoch, batch, batches):
        super().after_step(epoch, batch, batches)
        at_end = (epoch + 1, batch) == (self.end, batches)
        if epoch < self.end and (self.step % self.every == 0 or at_end):
            self.choose(ratio(epoch, batch, batches, self.start, self.end))


class TopKAST(Powers):
    """Two nested sets per layer, taken by full sorts; a penalty in the loss; all else put back after each step."""

    def __init__(self, thetas, pools, *, outside, strength, density, power=1.0, end, every):
        self.outside, self.strength, self.density = outside, strength, density
        self.moving = {}
        super().__init__(thetas, pools, power=power, start=0, end=end, every=every)
        self.choose(1.0)

    def choose(self, share, exploring=True):
        super().choose(1.0)
        for name in self.names:
            theta, kept = self.thetas[name], self.masks[name]
            (wide,) = largest([theta], theta.numel() - round(self.outside[name] * theta.numel()))
            self.moving[name] = wide | kept if exploring else kept

    def shown(self, name, theta):
        silent = ~self.moving[name]
        return HardMask.apply(self.raised(theta), self.masks[name], 1.0, silent)

    def penalty(self):
        total = 0.0
        for name in self.names:
            squares = self.thetas[name] ** 2 / 2
            newcomers = self.moving[name] & ~self.masks[name]
            total = total + squares[self.masks[name]].sum() + squares[newcomers].sum() / self.density
        return self.strength * total

    def before_step(self, host, epoch, batch, batches):
        self.host, self.before = host, {name: self.latent(name).clone() for name in self.names}

    def after_step(self, epoch, batch, batches):
        super().after_step(epoch, batch, batches)
        for name in self.names:
            theta = self.thetas[name]
            theta.data.copy_(torch.where(self.moving[name], theta.data, self.before[name]))
            forget(self.host, theta, self.moving[name])
        at_end = (epoch + 1, batch) == (self.end, batches)
        if epoch < self.end and (self.step % self.every == 0 or at_end):
            self.choose(1.0, exploring=not at_end)


class ACDC(Hard):
    """Sparse in some phases, ``[(first epoch, next one), ...]``, else dense; pruned weights restart from zero."""

    def __init__(self, thetas, pools, *, phases, reset):
        super().__init__(thetas, pools, start=0, end=1)
        self.phases, self.reset, self.sparse = phases, reset, False

    def shown(self, name, theta):
        return theta * self.masks[name]

    def before_step(self, host, epoch, batch, batches):
        self.host = host

    def after_step(self, epoch, batch, batches):
        for name in self.names:
            self.thetas[name].data.mul_(self.masks[name])
        position = epoch + batch / batches + 1e-9
        before, self.sparse = self.sparse, any(a <= position < b for a, b in self.phases)
        if self.sparse and not before:
            self.choose(1.0)
            for name in self.names:
                self.thetas[name].data.mul_(self.masks[name])
        if before and not self.sparse:
            self.choose(0.0)
            for name in self.names if self.reset else ():
                forget(self.host, self.thetas[name])


class LATS(Method):
    """w = theta + stop_gradient(soft(theta) - theta), at one threshold for all."""

    def __init__(self, thetas, names, *, final, epochs):
        super().__init__(thetas, [(names, None)])
        self.final, self.epochs, self.tau = final, epochs, 0.0

    def weight(self, name):
        theta = self.latent(name)
        return theta.sign() * (theta.abs() - self.tau).clamp(min=0.0)

    def shown(self, name, theta):
        return theta + (self.weight(name) - theta).detach()

    def after_step(self, epoch, batch, batches):
        share = (epoch * batches + batch) / (self.epochs * batches)
        self.tau = self.final * (share + math.sin(math.pi * share) / math.pi)

    def mask(self, name):
        return self.latent(name).abs() > self.tau

    def threshold(self, name):
        return self.tau
