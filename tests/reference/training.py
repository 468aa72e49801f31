"""Sparse training as the equations have it: the parameters are the latents, autograd does the rest. Slow and plain."""

import math

import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

from tests.reference.functional import cubic, gradient_annealing_decay


def train(net, method, batches, *, epochs, configure, accumulate=1, clip=None, interval="step"):
    """Call the network with projected latents, differentiate through the projection, step the latents.

    ``configure`` makes the host optimizer and the scheduler from parameters; learned scalars get an SGD of their own.
    """
    thetas = dict(net.named_parameters())
    host, schedule = configure(thetas)
    learner, scalars = learner_of(method, thetas, host)
    followed = ("lr", "momentum") if isinstance(host, torch.optim.SGD) else ("lr",)
    for epoch in range(epochs):
        for index, (x, y) in enumerate(batches):
            method.epoch = epoch
            shown = {name: method.shown(name, thetas[name]) for name in method.names}
            loss = (F.cross_entropy(functional_call(net, shown, (x,)), y) + method.penalty()) / accumulate
            loss.backward()
            if (index + 1) % accumulate == 0 or index + 1 == len(batches):
                if clip is not None:
                    nn.utils.clip_grad_norm_(thetas.values(), clip)
                    nn.utils.clip_grad_norm_(method.learned.values(), clip)
                for group, hosted in scalars:
                    group.update({key: hosted[key] for key in followed})
                    group["lr"] *= method.rate()
                method.before_step(host, epoch, index + 1, len(batches))
                host.step()
                learner.step()
                host.zero_grad()
                learner.zero_grad()
                method.after_step(epoch, index + 1, len(batches))
                if interval == "step":
                    schedule.step()
            method.after_batch(epoch)
        if interval == "epoch":
            schedule.step()
    return thetas


def learner_of(method, thetas, host):
    """One group per learned scalar, beside the group of the host optimizer that holds its weight."""
    hosts = {id(p): group for group in host.param_groups for p in group["params"]}
    sgd = isinstance(host, torch.optim.SGD)
    groups = []
    for name, scalar in method.learned.items():
        group = hosts[id(thetas[name])]
        settings = {key: group[key] for key in ("momentum", "nesterov")} if sgd else {"momentum": 0.9}
        groups.append({"params": [scalar], "weight_decay": method.weight_decay, "lr": 0.0, **settings})
    # An optimizer wants at least one parameter.
    learner = torch.optim.SGD(groups or [nn.Parameter(torch.zeros(()))], lr=0.0)
    return learner, [(g, hosts[id(thetas[n])]) for g, n in zip(learner.param_groups, method.learned, strict=False)]


class Method:
    """What the network sees of a latent, and what happens after a step. Dense as it stands."""

    weight_decay = 0.0

    def __init__(self, thetas, pools):
        """``pools`` lists the weights that compete with one another: ``[(names, sparsity), ...]``."""
        self.thetas, self.pools, self.epoch, self.step = thetas, pools, 0, 0
        self.names = [name for names, _ in pools for name in names]
        self.learned = {}

    def shown(self, name, theta):
        return theta

    def penalty(self):
        return 0.0

    def rate(self):
        return 1.0

    def before_step(self, host, epoch, batch, batches):
        pass

    def after_step(self, epoch, batch, batches):
        self.step += 1

    def after_batch(self, epoch):
        pass

    def latent(self, name):
        return self.thetas[name].detach()


def ratio(epoch, batch, batches, start, end):
    """Share of the final sparsity that is due once ``batch`` batches of an epoch are done; the ramp is cubic."""
    if epoch < start:
        return 0.0
    if epoch >= end:
        return 1.0
    return cubic(((epoch - start) * batches + batch) / ((end - start) * batches))


def quantile(tensors, q):
    """By a full sort."""
    ordered = torch.cat([tensor.detach().flatten() for tensor in tensors]).abs().sort().values
    position = (len(ordered) - 1) * q
    low, high = ordered[math.floor(position)], ordered[math.ceil(position)]
    return float(low + (high - low) * (position - math.floor(position)))


def largest(tensors, k):
    """Masks of the k largest magnitudes, by a full stable sort."""
    order = (
        torch.cat([tensor.detach().flatten() for tensor in tensors]).abs().sort(descending=True, stable=True).indices
    )
    kept = torch.zeros(len(order), dtype=torch.bool)
    kept[order[:k]] = True
    parts = kept.split([tensor.numel() for tensor in tensors])
    return [part.view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]


class ST3(Method):
    """w = theta + stop_gradient(P(theta) - theta); all thresholds anew after a step."""

    def __init__(self, thetas, pools, *, start, end, rescale=True, sigma=False, fix_from=None, every=1):
        super().__init__(thetas, pools)
        self.start, self.end, self.rescale, self.sigma = start, end, rescale, sigma
        self.fix_from, self.every = fix_from, every
        self.tau = dict.fromkeys(self.names, -1.0)
        self.fixed = {}

    def shown(self, name, theta):
        if self.fixed:
            return theta * self.fixed[name]
        return theta + (self.projected(name) - theta).detach()

    def projected(self, name):
        theta, tau = self.thetas[name].detach(), self.tau[name]
        if tau <= 0:
            return theta
        mask = (theta.abs() > tau).to(theta.dtype)
        sparse = (theta - tau * theta.sign()) * mask
        if not self.rescale:
            return sparse
        channel = tuple(range(1, theta.ndim))
        kept = (theta.abs() * mask).mean(channel, keepdim=True) + 1e-6
        dense = theta.abs().mean(channel, keepdim=True) + 1e-6
        return sparse * (1.01 / (kept / dense + 0.01))

    def after_step(self, epoch, batch, batches):
        super().after_step(epoch, batch, batches)
        if not self.fixed and self.step % self.every == 0:
            self.choose(ratio(epoch, batch, batches, self.start, self.end))

    def choose(self, share):
        for names, sparsity in self.pools:
            unit = {name: 1 / math.sqrt(sum(self.thetas[name].shape)) if self.sigma else 1.0 for name in names}
            q = sparsity * share
            tau = quantile([self.thetas[name] / unit[name] for name in names], q) if q else -1.0
            self.tau.update({name: tau * unit[name] for name in names})

    def after_batch(self, epoch):
        if epoch == self.fix_from and not self.fixed:
            self.choose(1.0)
            baked = {name: self.projected(name) for name in self.names}
            self.fixed = {name: self.mask(name) for name in self.names}
            for name, weight in baked.items():
                self.thetas[name].data.copy_(weight)

    def latent(self, name):
        return super().latent(name) * self.fixed[name] if self.fixed else super().latent(name)

    def mask(self, name):
        return self.fixed[name] if self.fixed else self.thetas[name].detach().abs() > self.tau[name]

    def weight(self, name):
        return self.latent(name) if self.fixed else self.projected(name)

    def threshold(self, name):
        return None if self.fixed or self.tau[name] <= 0 else self.tau[name]


class STR(Method):
    """w = sign(theta) relu(abs(theta) - sigmoid(s)), differentiated by autograd."""

    def __init__(self, thetas, pools, *, init, weight_decay):
        super().__init__(thetas, pools)
        self.weight_decay = weight_decay
        dtype = next(iter(thetas.values())).dtype
        self.learned = {name: nn.Parameter(torch.tensor(init, dtype=dtype)) for name in self.names}

    def shown(self, name, theta):
        return theta.sign() * F.relu(theta.abs() - self.learned[name].sigmoid())

    def mask(self, name):
        return self.latent(name).abs() > self.learned[name].detach().sigmoid()

    def weight(self, name):
        return STR.shown(self, name, self.latent(name)).detach()

    def threshold(self, name):
        return float(self.learned[name].detach().sigmoid())


class ProxyRelu(torch.autograd.Function):
    """relu whose derivative at x <= 0 is alpha instead of 0, and 0 where ``silent``."""

    @staticmethod
    def forward(ctx, x, alpha, silent):
        ctx.save_for_backward(x, silent)
        ctx.alpha = alpha
        return F.relu(x)

    @staticmethod
    def backward(ctx, grad):
        x, silent = ctx.saved_tensors
        derivative = torch.where(x > 0, 1.0, torch.full_like(x, ctx.alpha))
        return grad * derivative * ~silent, None, None


class Annealed:
    """Gradient Annealing: alpha of the epoch, and which weights get no gradient at all."""

    def annealing(self, *, alpha, epochs, reset, backward_sparsity=None):
        self.alpha, self.epochs, self.reset, self.backward_sparsity = alpha, epochs, reset, backward_sparsity

    def alpha_now(self):
        if self.reset is not None and self.epoch >= self.reset:
            return 0.0
        return self.alpha * gradient_annealing_decay(self.epoch / self.epochs)

    def silent(self, theta, mask):
        if self.backward_sparsity is None:
            return torch.zeros_like(mask)
        (heard,) = largest([theta], theta.numel() - round(self.backward_sparsity * theta.numel()))
        return ~(heard | mask)


class AutoSparse(Annealed, STR):
    """STR with the proxy derivative."""

    def __init__(self, thetas, pools, *, init, weight_decay, alpha_in_threshold=True, **annealing):
        super().__init__(thetas, pools, init=init, weight_decay=weight_decay)
        self.alpha_in_threshold = alpha_in_threshold
        self.annealing(**annealing)

    def shown(self, name, theta):
        tau = self.learned[name].sigmoid()
        silent = self.silent(theta, self.mask(name))
        if self.alpha_in_threshold:
            return theta.sign() * ProxyRelu.apply(theta.abs() - tau, self.alpha_now(), silent)
        # The value of either, the gradient of the first to theta, that of the second to s.
        to_theta = ProxyRelu.apply(theta.abs() - tau.detach(), self.alpha_now(), silent)
        to_s = F.relu(theta.detach().abs() - tau)
        return theta.sign() * (to_theta + to_s - to_s.detach())


class BudgetedAutoSparse(AutoSparse):
    """Thresholds c sigma(s), with the one number c as the ramp asks."""

    def __init__(self, thetas, pools, *, start, end, **settings):
        super().__init__(thetas, pools, **settings)
        self.start, self.end, self.c = start, end, 0.0

    def tau(self, name):
        return self.c * self.learned[name].sigmoid()

    def shown(self, name, theta):
        if not self.c:
            return theta
        silent = self.silent(theta, self.mask(name))
        return theta.sign() * ProxyRelu.apply(theta.abs() - self.tau(name), self.alpha_now(), silent)

    def after_step(self, epoch, batch, batches):
        super().after_step(epoch, batch, batches)
        ((names, sparsity),) = self.pools
        q = sparsity * ratio(epoch, batch, batches, self.start, self.end)
        self.c = quantile([self.thetas[name] / self.learned[name].sigmoid() for name in names], q) if q else 0.0

    def mask(self, name):
        return self.latent(name).abs() > self.tau(name).detach() if self.c else torch.ones_like(self.latent(name)) > 0

    def weight(self, name):
        return self.shown(name, self.latent(name)).detach()

    def threshold(self, name):
        return float(self.tau(name).detach())


class HardMask(torch.autograd.Function):
    """m theta, with (m + alpha (1 - m)) g for a gradient, and 0 where ``silent``."""

    @staticmethod
    def forward(ctx, theta, mask, alpha, silent):
        ctx.save_for_backward(mask, silent)
        ctx.alpha = alpha
        return theta * mask

    @staticmethod
    def backward(ctx, grad):
        mask, silent = ctx.saved_tensors
        return grad * torch.where(mask, 1.0, torch.full_like(grad, ctx.alpha)) * ~silent, None, None, None


class Hard(Method):
    """Hard masks on a cubic ramp, taken after every so many steps."""

    def __init__(self, thetas, pools, *, start, end, every=1):
        super().__init__(thetas, pools)
        self.start, self.end, self.every = start, end, every
        self.masks = {name: torch.ones_like(thetas[name], dtype=torch.bool) for name in self.names}
        if end == 0:
            self.choose(1.0)

    def choose(self, share):
        for names, sparsity in self.pools:
            tensors = [self.thetas[name] for name in names]
            size = sum(tensor.numel() for tensor in tensors)
            self.masks.update(zip(names, largest(tensors, size - round(sparsity * share * size)), strict=True))

    def mask(self, name):
        return self.masks[name]

    def weight(self, name):
        return self.latent(name) * self.masks[name]

    def threshold(self, name):
        return None


class TopKGradientAnnealing(Annealed, Hard):
    """All latents live on; pruned ones hear a fading gradient."""

    def __init__(self, thetas, pools, *, start=0, end=0, every=1, **annealing):
        super().__init__(thetas, pools, start=start, end=end, every=every)
        self.annealing(**annealing)

    def shown(self, name, theta):
        mask = self.masks[name]
        return HardMask.apply(theta, mask, self.alpha_now(), self.silent(theta, mask))

    def after_step(self, epoch, batch, batches):
        super().after_step(epoch, batch, batches)
        if self.step % self.every == 0:
            self.choose(ratio(epoch, batch, batches, self.start, self.end))


class GMP(Hard):
    """Pruned weights become zero and stay so."""

    def shown(self, name, theta):
        return theta * self.masks[name]

    def after_step(self, epoch, batch, batches):
        super().after_step(epoch, batch, batches)
        for name in self.names:
            self.thetas[name].data.mul_(self.masks[name])
        at_end = (epoch + 1, batch) == (self.end, batches)
        if epoch < self.end and (self.step % self.every == 0 or at_end):
            self.choose(ratio(epoch, batch, batches, self.start, self.end))
        for name in self.names:
            self.thetas[name].data.mul_(self.masks[name])
