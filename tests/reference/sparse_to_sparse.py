"""Methods that drop and grow, as the equations have them: full sorts, plain numbers, one layer at a time."""

import math

import torch

from tests.reference.training import Method, largest


def erdos_renyi(shapes, sparsity, kernel=True):
    """Sparsities of layers: densities in proportion to neurons per weight, the densest cut at 1 one by one."""
    sizes = [math.prod(shape) for shape in shapes]
    raw = [sum(shape if kernel else shape[:2]) / math.prod(shape if kernel else shape[:2]) for shape in shapes]
    dense = set()
    while True:
        kept = (1 - sparsity) * sum(sizes) - sum(sizes[i] for i in dense)
        scale = kept / sum(raw[i] * sizes[i] for i in range(len(sizes)) if i not in dense)
        densities = [1.0 if i in dense else scale * raw[i] for i in range(len(sizes))]
        if max(densities) <= 1:
            return [1 - density for density in densities]
        dense.add(densities.index(max(densities)))


def best(scores, candidates, k):
    """The k largest scores among candidates, one entry at a time."""
    scores, flat = scores.flatten().tolist(), candidates.flatten().tolist()
    order = sorted((i for i in range(len(flat)) if flat[i]), key=lambda i: -scores[i])
    chosen = torch.zeros(len(flat), dtype=torch.bool)
    chosen[order[:k]] = True
    return chosen.view(candidates.shape)


class Masked(Method):
    """w = m theta with a gradient m g; keeps the dense g, summed over the batches of a step, for those who ask."""

    reset = True

    def __init__(self, thetas, sparsities, *, start=0, end, every, seed=0):
        super().__init__(thetas, [([name], sparsity) for name, sparsity in sparsities.items()])
        self.sparsities, self.start, self.end, self.every = sparsities, start, end, every
        self.generator = torch.Generator().manual_seed(seed)
        self.dense, self.events = {}, []
        self.masks = {name: self.first_mask(name) for name in self.names}
        for name in self.names:
            self.thetas[name].data.mul_(self.masks[name])

    def first_mask(self, name):
        """At random."""
        size = self.thetas[name].numel()
        return best(self.draw(name), self.everything(name), size - round(self.sparsities[name] * size))

    def everything(self, name):
        return torch.ones_like(self.thetas[name], dtype=torch.bool)

    def draw(self, name):
        # An entry that is not zero already comes first; adding 1 also rounds.
        return torch.rand(self.thetas[name].shape, generator=self.generator) + 1

    def shown(self, name, theta):
        shown = theta * self.masks[name]
        shown.register_hook(lambda grad: self.hear(name, grad))
        return shown

    def hear(self, name, grad):
        self.dense[name] = self.dense.get(name, 0) + grad

    def progress(self, epoch, batch, batches):
        way = ((epoch - self.start) * batches + batch) / ((self.end - self.start) * batches)
        return min(1.0, max(0.0, way))

    def before_step(self, host, epoch, batch, batches):
        self.host = host

    def after_step(self, epoch, batch, batches):
        super().after_step(epoch, batch, batches)
        for name in self.names:
            self.thetas[name].data.mul_(self.masks[name])
        if self.step % self.every == 0:
            self.elapsed = epoch + batch / batches
            self.update(self.progress(epoch, batch, batches))
        self.dense = {}
        for name in self.names:
            self.thetas[name].data.mul_(self.masks[name])

    def begin_anew(self, name, grown):
        """Grown weights start from zero, and so does what the optimizer knows of them."""
        self.thetas[name].data[grown] = 0
        for slot in self.host.state[self.thetas[name]].values() if self.reset else ():
            if isinstance(slot, torch.Tensor) and slot.shape == grown.shape:
                slot[grown] = 0

    def mask(self, name):
        return self.masks[name]

    def weight(self, name):
        return self.latent(name) * self.masks[name]

    def threshold(self, name):
        return None


class DropAndGrow(Masked):
    """Per layer: floor(fraction n) of the smallest make room for as many others, perhaps the same."""

    def __init__(self, thetas, sparsities, *, fraction=0.3, cosine=True, **settings):
        super().__init__(thetas, sparsities, **settings)
        self.fraction, self.cosine = fraction, cosine

    def update(self, progress):
        if not 0 < progress < 1:
            return
        fraction = self.fraction * ((1 + math.cos(math.pi * progress)) / 2 if self.cosine else 1)
        for name in self.names:
            before = self.masks[name]
            moved = math.floor(int(before.sum()) * fraction)
            kept = best(self.thetas[name].abs(), before, int(before.sum()) - moved)
            self.masks[name] = kept | best(self.scores(name), ~kept, moved)
            self.begin_anew(name, self.masks[name] & ~before)
        self.events.append((self.step, moved))


class SET(DropAndGrow):
    def scores(self, name):
        return torch.rand(self.thetas[name].shape, generator=self.generator)


class RigL(DropAndGrow):
    """An update takes the place of the optimizer's step."""

    def scores(self, name):
        return self.dense[name].abs()

    def before_step(self, host, epoch, batch, batches):
        super().before_step(host, epoch, batch, batches)
        if (self.step + 1) % self.every == 0 and 0 < self.progress(epoch, batch, batches) < 1:
            host.zero_grad(set_to_none=True)


class GraNet(Masked):
    """Global pruning along a cubic ramp; then, per layer, ceil(rho n) dropped and grown by the gradient."""

    def __init__(self, thetas, sparsities, *, initial=0.0, epochs, fraction=0.5, final, **settings):
        super().__init__(thetas, sparsities, **settings)
        self.initial, self.epochs, self.fraction, self.final = initial, epochs, fraction, final

    def update(self, progress):
        if progress == 0:
            return
        size = sum(self.thetas[name].numel() for name in self.names)
        sparsity = self.initial + (1 - (1 - progress) ** 3) * (self.final - self.initial)
        scores = [self.thetas[name].abs() + self.masks[name] for name in self.names]  # the pruned ones, zero, are last
        pruned = largest(scores, size - round(sparsity * size))
        rho = 0.005 + (self.fraction - 0.005) * (1 + math.cos(math.pi * self.elapsed / self.epochs)) / 2
        for name, after in zip(self.names, pruned, strict=True):
            moved = math.ceil(rho * int(after.sum()))
            kept = best(self.thetas[name].abs(), after, int(after.sum()) - moved)
            self.masks[name] = kept | best(self.dense[name].abs(), ~kept, moved)
            self.begin_anew(name, self.masks[name] & ~after)


class MEST(Masked):
    """Prune to s + r and grow to s (EM), or prune to s and grow to s - r (EM&S)."""

    reset = False

    def __init__(self, thetas, sparsities, *, mutation, soft, weight=0.0, **settings):
        super().__init__(thetas, sparsities, end=list(mutation)[-1], **settings)
        self.mutation, self.soft, self.weight_of_gradient = mutation, soft, weight

    def first_mask(self, name):
        """The largest initial weights."""
        size = self.thetas[name].numel()
        return largest([self.thetas[name]], size - round(self.sparsities[name] * size))[0]

    def after_step(self, epoch, batch, batches):
        self.ratio = [ratio for since, ratio in self.mutation.items() if epoch >= since][-1]
        super().after_step(epoch, batch, batches)
        if (epoch + 1, batch) == (self.end, batches):
            for name in self.names:
                self.mutate(name, 0.0, 0)
                self.thetas[name].data.mul_(self.masks[name])

    def update(self, progress):
        if progress < 1:
            for name in self.names:
                self.mutate(name, self.ratio, self.weight_of_gradient)

    def mutate(self, name, share, weight):
        theta, mask = self.thetas[name], self.masks[name]
        size = theta.numel()
        budget, moved = size - round(self.sparsities[name] * size), round(share * size)
        scores = theta.abs() + (weight * (self.dense[name] * mask).abs() if weight else 0)
        kept = best(scores, mask, budget if self.soft else budget - moved)
        if moved:
            luck = torch.rand(theta.shape, generator=self.generator)
            grown = best(luck, ~kept, budget + (moved if self.soft else 0) - int(kept.sum()))
            self.masks[name] = kept | grown
            self.begin_anew(name, grown)
        else:
            self.masks[name] = kept


class SNFS(DropAndGrow):
    """Dense gradients for the optimizer; layers get what was dropped in proportion to their mean momentum."""

    def shown(self, name, theta):
        return theta + (theta * self.masks[name] - theta).detach()

    def momentum(self, name):
        slots = self.host.state[self.thetas[name]]
        if "exp_avg" in slots:
            return (slots["exp_avg"] / (slots["exp_avg_sq"].sqrt() + 1e-8)).abs()
        return slots["momentum_buffer"].abs()

    def update(self, progress):
        if not 0 < progress < 1:
            return
        fraction = self.fraction * (1 + math.cos(math.pi * progress)) / 2
        before = {name: int(self.masks[name].sum()) for name in self.names}
        means = {name: float(self.momentum(name)[self.masks[name]].mean()) for name in self.names}
        kept = {}
        for name in self.names:
            sparsity = 1 - before[name] / self.masks[name].numel()
            growing = means[name] > sum(means.values()) / len(means)
            own = min(sparsity, fraction) if sparsity < 0.2 and growing else fraction
            moved = math.ceil(own * before[name])
            kept[name] = best(self.thetas[name].abs(), self.masks[name], before[name] - moved)
        room = {name: int((~kept[name]).sum()) for name in self.names}
        dropped = sum(before.values()) - sum(int(mask.sum()) for mask in kept.values())
        grown = self.share_out(dropped, means, room)
        for name in self.names:
            mask = kept[name] | best(self.momentum(name), ~kept[name], grown[name])
            self.thetas[name].data[mask & ~self.masks[name]] = 0
            self.masks[name] = mask

    @staticmethod
    def share_out(total, means, room):
        """Fill up, one after the other, whoever would get more than fits; round the others by largest remainder."""
        shares, open_ = {}, set(means)
        while open_:
            left = total - sum(shares.values())
            wanted = {name: left * means[name] / sum(means[n] for n in open_) for name in open_}
            full = {name for name in open_ if wanted[name] > room[name]}
            if not full:
                break
            shares.update({name: room[name] for name in full})
            open_ -= full
        shares.update({name: math.floor(wanted[name]) for name in open_})
        for name in sorted(open_, key=lambda n: shares[n] - wanted[n])[: total - sum(shares.values())]:
            shares[name] += 1
        return shares
