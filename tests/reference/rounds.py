"""Many trainings, one after the other, as a loop of plain ones: new optimizers and schedulers each time."""

import copy

import torch
import torch.nn.functional as F

from tests.reference.training import Hard


class Masks(Hard):
    """Chosen between the trainings, among the weights that are left."""

    def __init__(self, thetas, pools):
        super().__init__(thetas, pools, start=0, end=-1)

    def prune(self, share):
        """Each pool keeps ``(1 - sparsity) ** share`` of its weights."""
        for names, sparsity in self.pools:
            size = sum(self.thetas[name].numel() for name in names)
            kept = size - round((1 - (1 - sparsity) ** share) * size)
            left = torch.cat([self.thetas[name].detach()[self.masks[name]].abs() for name in names])
            smallest = left.sort(descending=True).values[kept - 1]
            for name in names:
                self.masks[name] = self.masks[name] & (self.thetas[name].detach().abs() >= smallest)
            assert sum(int(self.masks[name].sum()) for name in names) == kept  # there are no ties

    def apply(self):
        for name in self.names:
            self.thetas[name].data.mul_(self.masks[name])


def train_in_rounds(net, method, batches, *, configure, schedule, interval, rounds, epochs, rewind, first):
    """Train, prune, rewind and train again.

    Args:
        configure: Makes an optimizer from the parameters.
        schedule: Makes a scheduler from an optimizer that has its first learning rates.

    Returns:
        Number of steps, and the optimizer and scheduler of the last round.
    """
    thetas, kept, steps = dict(net.named_parameters()), None, 0
    optimizer = configure(thetas)
    scheduler = schedule(optimizer)
    for turn in range(rounds):
        if turn:
            method.prune(turn / (rounds - 1))
            if rewind == "weights":
                net.load_state_dict(kept)
                optimizer = configure(thetas)
            elif rewind == "learning_rate":
                for group in optimizer.param_groups:
                    group["lr"] = group.pop("initial_lr")
            if rewind is not None:
                optimizer.step()  # without gradients
                scheduler = wind(schedule(optimizer), first * (len(batches) if interval == "step" else 1))
        method.apply()
        for epoch in range(first if turn else 0, epochs):
            if (turn, epoch) == (0, first):
                kept = copy.deepcopy(net.state_dict())
            steps += train_epoch(net, method, batches, optimizer, scheduler, interval)
    return steps, optimizer, scheduler


def wind(scheduler, steps):
    for _ in range(steps):
        scheduler.step()
    return scheduler


def train_epoch(net, method, batches, optimizer, scheduler, interval):
    for x, y in batches:
        F.cross_entropy(net(x), y).backward()
        for name in method.names:
            method.thetas[name].grad.mul_(method.masks[name])
        optimizer.step()
        optimizer.zero_grad()
        method.apply()
        if interval == "step":
            scheduler.step()
    if interval == "epoch":
        scheduler.step()
    return len(batches)
