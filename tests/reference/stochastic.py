"""Methods whose masks are soft or noisy, as the equations have them, differentiated by autograd. Slow and plain."""

import math

import torch
from torch import nn

from tests.reference.training import Hard, ratio


def likeliest(probabilities, thetas, k):
    """Masks of the k largest probabilities, and among equal ones of the largest magnitudes, by sorting pairs."""
    flat, sizes = torch.cat([p.flatten() for p in probabilities]), [p.numel() for p in probabilities]
    pairs = list(zip(flat.tolist(), torch.cat([t.flatten() for t in thetas]).abs().tolist(), strict=True))
    order = sorted(range(len(pairs)), key=lambda i: pairs[i], reverse=True)
    kept = torch.zeros(len(flat), dtype=torch.bool)
    kept[order[:k]] = True
    return [part.view_as(p) for part, p in zip(kept.split(sizes), probabilities, strict=True)]


def project_onto_budget(probabilities, k):
    """In place; the shift by bisection alone."""
    low, high = 0.0, max(float(p.max()) for p in probabilities)
    if sum(float(p.clamp(0, 1).sum()) for p in probabilities) > k:
        for _ in range(200):
            middle = (low + high) / 2
            kept = sum(float((p - middle).clamp(0, 1).sum()) for p in probabilities)
            low, high = (middle, high) if kept > k else (low, middle)
    for p in probabilities:
        p.copy_((p - low).clamp(0, 1))


class Noise:
    """Uniform numbers, from a seed per weight that changes with every step."""

    def __init__(self, thetas, names, seed=0):
        self.thetas, self.names, self.source = thetas, names, torch.Generator().manual_seed(seed)
        self.shake()

    def shake(self):
        self.seeds = {name: int(torch.randint(1 << 62, (), generator=self.source)) for name in self.names}

    def uniform(self, name):
        generator = torch.Generator().manual_seed(self.seeds[name])
        u = torch.rand(self.thetas[name].shape, generator=generator)
        return u.clamp(2**-25, 1 - 2**-24).to(self.thetas[name].dtype)


class ProbMask(Hard):
    """A sigmoid of logit and noise, Adam for the probabilities, and their projection."""

    def __init__(self, thetas, pools, *, start, end, freeze, score_lr):
        super().__init__(thetas, pools, start=start, end=end)
        self.freeze, self.score_lr, self.fixed = freeze, score_lr, False
        self.p = {name: nn.Parameter(torch.full_like(thetas[name].detach(), 1 - 2**-21)) for name in self.names}
        self.adam = torch.optim.Adam(self.p.values(), lr=score_lr)
        self.noise = Noise(thetas, self.names)

    def shown(self, name, theta):
        if self.fixed:
            return theta * self.masks[name]
        p, u = self.p[name], self.noise.uniform(name)
        noise = -torch.log(1 / u - 1)
        temperature = 1 / ((1 - 0.03) * (1 - self.epoch / self.freeze) + 0.03)
        logit = torch.log(p + 1e-20) - torch.log(1 - p + 1e-20)
        return theta * torch.sigmoid((logit + noise) * temperature)

    def before_step(self, host, epoch, batch, batches):
        if not self.fixed:
            self.adam.param_groups[0]["lr"] = 0.5 * (1 + math.cos(math.pi * epoch / self.freeze)) * self.score_lr
            self.adam.step()
            self.adam.zero_grad()

    def after_step(self, epoch, batch, batches):
        super().after_step(epoch, batch, batches)
        if self.fixed:
            for name in self.names:
                self.thetas[name].data.mul_(self.masks[name])
            return
        self.choose(ratio(epoch, batch, batches, self.start, self.end))
        self.noise.shake()

    @torch.no_grad()
    def choose(self, share):
        for names, sparsity in self.pools:
            if sparsity * share == 0:
                for name in names:
                    self.p[name].clamp_(0, 1)
                continue
            probabilities, thetas = [self.p[name] for name in names], [self.thetas[name] for name in names]
            size = sum(theta.numel() for theta in thetas)
            k = size - round(sparsity * share * size)
            project_onto_budget(probabilities, k)
            self.masks.update(zip(names, likeliest(probabilities, thetas, k), strict=True))

    def after_batch(self, epoch):
        if epoch == self.freeze and not self.fixed:
            self.choose(1.0)
            self.fixed = True
            for name in self.names:
                self.thetas[name].data.mul_(self.masks[name])


class SoftMask(torch.autograd.Function):
    """The soft mask, with the derivative of an optimal transport plan by its values: diagonal and rank one."""

    @staticmethod
    def forward(ctx, values, k, beta):
        low, high = float(values.min()) - 100 / beta, float(values.max()) + 100 / beta
        for _ in range(300):
            middle = (low + high) / 2
            low, high = (middle, high) if float(torch.sigmoid(beta * (values - middle)).sum()) > k else (low, middle)
        mask = torch.sigmoid(beta * (values - low))
        ctx.save_for_backward(mask)
        ctx.beta = beta
        return mask

    @staticmethod
    def backward(ctx, grad):
        (mask,) = ctx.saved_tensors
        slope = mask * (1 - mask)
        jacobian = ctx.beta * (torch.diag(slope) - torch.outer(slope, slope) / slope.sum())
        return jacobian @ grad, None, None


class Spartan(Hard):
    """The soft mask is a function of the weights; the hard one is passed straight through."""

    def __init__(self, thetas, pools, *, end, finetune, first, last):
        self.finetune, self.first, self.last, self.softs = finetune, first, last, {}
        super().__init__(thetas, pools, start=0, end=end)
        self.plan = None

    def shown(self, name, theta):
        if name not in self.softs:
            return theta
        if self.plan is None:  # one for all weights of a batch
            self.solve()
        weight = self.plan[name] * theta
        if self.fixed:
            return weight * self.masks[name]
        return weight + (weight * self.masks[name] - weight).detach()

    def solve(self):
        self.plan = dict(self.softs) if self.fixed else {}
        for names, k in [] if self.fixed else self.kept:
            flat = torch.cat([self.thetas[name].flatten() for name in names]).abs()
            parts = SoftMask.apply(flat, k, self.beta).split([self.thetas[name].numel() for name in names])
            self.plan.update({n: part.view_as(self.thetas[n]) for n, part in zip(names, parts, strict=True)})

    def after_step(self, epoch, batch, batches):
        super().after_step(epoch, batch, batches)
        position = epoch + batch / batches
        if position > self.finetune + 1e-9:
            return
        self.beta = self.first + position / self.finetune * (self.last - self.first)
        self.choose(min(1.0, position / self.end))
        self.fixed, self.plan = False, None
        self.kept = []
        for names, sparsity in self.pools:
            size = sum(self.thetas[name].numel() for name in names)
            self.kept.append((names, size - round(sparsity * min(1.0, position / self.end) * size)))
        with torch.no_grad():
            self.solve()
        self.softs, self.plan = self.plan, None
        self.fixed = position >= self.finetune - 1e-9

    def after_batch(self, epoch):
        self.plan = None  # the graph has been used

    def weight(self, name):
        return self.latent(name) * self.softs[name] * self.masks[name]


class VariationalDropout(Hard):
    """Weights with Gaussian noise whose variance is learned by Adam; the divergence joins the loss."""

    def __init__(self, thetas, names, *, kl_weight, start, end, init, rate, batches, bound=8.0, accumulate=1):
        self.log_variance = {name: nn.Parameter(torch.full_like(thetas[name].detach(), init)) for name in names}
        self.kl_weight, self.rate, self.bound = kl_weight, rate, bound
        self.window, self.batches, self.count, self.accumulate = (start, end), batches, 0, accumulate
        super().__init__(thetas, [(names, None)], start=start, end=end)
        self.adam = torch.optim.Adam([{"params": [self.log_variance[name]]} for name in names])
        self.noise = Noise(thetas, names)
        self.choose(0.0)

    def rates(self, name):
        return torch.clamp(self.log_variance[name] - torch.log(self.thetas[name] ** 2), -self.bound, self.bound)

    def shown(self, name, theta):
        # As the authors have it: the variance is that of the clipped rate.
        variance = torch.exp(self.rates(name)) * theta**2
        epsilon = math.sqrt(2) * torch.erfinv(2 * self.noise.uniform(name) - 1)
        return theta + torch.sqrt(variance) * epsilon

    def penalty(self):
        """Once for each step."""
        self.count += 1
        if self.count % self.accumulate:
            return 0.0
        start, end = self.window
        weight = min(1.0, max(0.0, (self.count / self.batches - start) / (end - start))) * self.kl_weight
        return self.accumulate * weight * sum(divergence(self.rates(name)) for name in self.names)

    def before_step(self, host, epoch, batch, batches):
        groups = {id(p): group for group in host.param_groups for p in group["params"]}
        for name, own in zip(self.names, self.adam.param_groups, strict=True):
            own["lr"] = groups[id(self.thetas[name])]["lr"] if self.rate is None else self.rate
        self.adam.step()
        self.adam.zero_grad()

    def after_step(self, epoch, batch, batches):
        super().after_step(epoch, batch, batches)
        self.choose(0.0)
        self.noise.shake()

    def choose(self, share):
        self.masks = {name: (self.rates(name) < 3).detach() for name in self.log_variance}


def divergence(log_alpha):
    """Equation (14) of the paper, negated."""
    k1, k2, k3 = 0.63576, 1.8732, 1.48695
    return -(k1 * torch.sigmoid(k2 + k3 * log_alpha) - 0.5 * torch.log(1 + torch.exp(-log_alpha)) - k1).sum()
