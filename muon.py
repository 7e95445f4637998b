"""Muon: momentum whose direction is orthogonalized (Jordan et al. 2024, kellerjordan.github.io/posts/muon)."""

import torch

# The quintic polynomial of each iteration moves singular values towards 1: s → a s + b s³ + c s⁵.
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
ITERATIONS = 5
# Elements of a batch on a CPU. One product of many small matrices is up to 3.5 times as fast as many products, but of
# larger ones it is slower once they do not fit in the cache (docs/speed.md).
CPU_BATCH_ELEMENTS = 2**20


class Muon(torch.optim.Optimizer):
    """The update of a matrix is its momentum with all singular values set to about 1, times the learning rate.

    As torch.optim.Muon, except for two things. Matrices of one shape are orthogonalized in batched products, which is
    faster if they are small. And a parameter may consist of several matrices, stacked by rows: the queries, keys and
    values of attention are three.
    """

    def __init__(self, params, lr, weight_decay, parts, momentum=0.95):
        """`params`: a list of matrices. `parts`: the number of matrices that each of them consists of, a list."""
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})
        self.parts = parts

    @torch.no_grad()
    def step(self):
        """Update the parameters from their gradients."""
        group, = self.param_groups
        by_shape = {}  # shape → pairs of weight and momentum, (rows, columns) each
        for p, parts in zip(group["params"], self.parts):
            state = self.state[p]
            if not state:
                state["momentum_buffer"] = torch.zeros_like(p)
            momentum = state["momentum_buffer"]
            momentum.lerp_(p.grad, 1 - group["momentum"])
            nesterov = p.grad.lerp(momentum, group["momentum"])
            for pair in zip(p.chunk(parts), nesterov.chunk(parts)):
                by_shape.setdefault(pair[0].shape, []).append(pair)
        for (rows, columns), pairs in by_shape.items():
            weights, updates = zip(*pairs)
            batch_size = len(pairs)
            if weights[0].device.type == "cpu":
                batch_size = max(1, CPU_BATCH_ELEMENTS // (rows * columns))
            batches = [orthogonalize(batch) for batch in torch.stack(updates).split(batch_size)]
            updates = torch.cat(batches).to(weights[0].dtype).unbind()
            torch._foreach_mul_(weights, 1 - group["lr"] * group["weight_decay"])
            torch._foreach_add_(weights, updates, alpha=-group["lr"] * max(1, rows / columns) ** 0.5)


def orthogonalize(matrices):
    """Set the singular values of matrices (N, rows, columns) to about 1 (0.7 to 1.2), by a Newton-Schulz iteration.

    In bfloat16, which is precise enough for a direction.
    """
    x = matrices.bfloat16()
    if transposed := x.size(1) > x.size(2):  # the products are of the smaller side
        x = x.mT
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp_min(1e-7)
    a, b, c = COEFFICIENTS
    for _ in range(ITERATIONS):
        gram = x @ x.mT  # (N, rows, rows)
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if transposed else x
