"""Methods that rewire at random, as the equations have them: one entry at a time, plain numbers."""

import torch

from tests.reference.sparse_to_sparse import SNFS, Masked, best


class DSR(Masked):
    """Drop what lies below H, grow as many at random in proportion to what is left in each layer, adapt H."""

    reset = False

    def __init__(self, thetas, sparsities, *, fraction=0.1, threshold=1e-3, **settings):
        super().__init__(thetas, sparsities, **settings)
        self.fraction, self.threshold_now = fraction, threshold

    def update(self, progress):
        if not 0 < progress < 1:
            return
        total = sum(int(mask.sum()) for mask in self.masks.values())
        kept = {}
        for name in self.names:
            magnitudes, before = self.thetas[name].abs(), self.masks[name]
            kept[name] = before & (magnitudes >= self.threshold_now)
            if before.any() and not kept[name].any():
                kept[name] = best(magnitudes, before, 1)
        left = {name: int(mask.sum()) for name, mask in kept.items()}
        dropped = total - sum(left.values())
        grown = SNFS.share_out(dropped, left, {name: kept[name].numel() - left[name] for name in self.names})
        for name in self.names:
            luck = torch.rand(kept[name].shape, generator=self.generator) + (~self.masks[name]).float()
            new = best(luck, ~kept[name], grown[name])
            self.masks[name] = kept[name] | new
            self.begin_anew(name, new)
        self.events.append((self.step, self.threshold_now, dropped))
        if dropped > 1.1 * self.fraction * total:
            self.threshold_now /= 2
        elif dropped < 0.9 * self.fraction * total:
            self.threshold_now *= 2


class DeepRewiring(Masked):
    """theta = abs(w) of a connection decays, walks and is cut below zero, step by step; as many are made."""

    def __init__(self, thetas, sparsities, *, l1, noise, **settings):
        self.signs, self.l1, self.noise, self.cuts = {}, l1, noise, []
        super().__init__(thetas, sparsities, every=1, **settings)

    def first_mask(self, name):
        luck, weight = torch.rand(self.thetas[name].shape, generator=self.generator), self.thetas[name].detach()
        drawn = torch.where(luck < 0.5, 1.0, -1.0).to(weight.dtype)
        self.signs[name] = torch.where(weight == 0, drawn, weight.sign())
        return super().first_mask(name)

    def update(self, progress):
        if not 0 < progress < 1:
            return
        rates = {id(p): group["lr"] for group in self.host.param_groups for p in group["params"]}
        for name in self.names:
            weight, sign = self.thetas[name].data, self.signs[name]
            nu = torch.randn(weight.shape, generator=self.generator) if self.noise else 0.0
            moved = sign * weight - rates[id(self.thetas[name])] * (self.l1 - self.noise * sign * nu)
            weight.copy_(torch.where(self.masks[name], sign * moved, 0.0))
        self.cuts.append(0)
        for name in self.names:
            theta = self.signs[name] * self.thetas[name].detach()
            cut = self.masks[name] & (theta < 0)
            if cut.any():
                kept = self.masks[name] & ~cut
                grown = best(torch.rand(theta.shape, generator=self.generator), ~kept, int(cut.sum()))
                self.masks[name] = kept | grown
                self.begin_anew(name, grown)
                self.cuts[-1] += int(cut.sum())
