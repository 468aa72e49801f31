"""Runs that were never trained, as large and as odd as a test wants them."""

import numpy as np

from lightning_sparse.reports.runs import Run, RunFile, read_run


def make_run(path, names, *, epochs=12, seed=0, method="ST3", size=(24, 12), masks=True, metrics=None) -> Run:
    """Record random masks of a growing sparsity, and read them back; the first layer loses outputs."""
    rng = np.random.default_rng(seed)
    weights = [{"name": name, "shape": list(size), "outputs": size[0]} for name in names]
    scores = [rng.random(size).ravel() for _ in names]
    file = RunFile(path, {"methods": [{"name": method, "arguments": {"sparsity": 0.9}}], "weights": weights})
    file.open(0)
    numel = size[0] * size[1]
    for epoch in range(epochs + 1):
        goal = 0.9 * min(1.0, 2 * epoch / epochs)
        moved = [score + 0.05 * rng.random(numel) for score in scores]
        kept = [score >= goal * (0.9 + 0.1 * i / len(names)) for i, score in enumerate(moved)]
        kept[0][: size[1] * epoch // 4] = False
        sparsity = 1 - np.mean([mask.mean() for mask in kept])
        logged = {"sparsity/total": sparsity, "sparsity/target": goal, "flops/inference_ratio": 1 - sparsity}
        if epoch:
            logged |= {"val_accuracy": 0.9 - 1 / (epoch + 2) - 0.01 * seed, "val_loss": 2 / (epoch + 1)}
            logged |= {name: value / epoch for name, value in (metrics or {}).items()}
        record = {
            "epoch": epoch,
            "step": 10 * epoch,
            "metrics": logged,
            "zeros": [int((~mask).sum()) for mask in kept],
            "dead": [int((~mask.reshape(size).any(1)).sum()) for mask in kept],
            "thresholds": [goal * (i + 1) / len(names) for i in range(len(names))],
            "training": [1 - (1 - mask.mean()) / 2 if epoch else None for mask in kept],
        }
        if epoch == 1:
            record["flops"] = {name: (i + 1) * numel for i, name in enumerate(names)} | {"": numel}
        file.append(record, kept if masks else None)
    return read_run(path)
