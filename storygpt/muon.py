"""Muon: momentum whose direction is orthogonalized (Jordan et al. 2024, kellerjordan.github.io/posts/muon).

With the normalization of NorMuon (Li et al. 2025, arXiv 2510.05491): the rows of an update, one for each output of the
layer, are brought to about the same size.
"""

import torch

from storygpt.system.hardware import pick_dtype

# The polynomial of each iteration moves singular values towards 1: s → a s + b s³ + c s⁵. These are the first three of
# Polar Express (Amsel et al. 2025, arXiv 2505.16932). Five of Jordan's iterations are closer to 1 but no better in
# training (docs/recipes.md), and take half as long again as these.
COEFFICIENTS = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
)
# Elements of a batch on a CPU. One product of many small matrices is up to 3.5 times as fast as many products, but of
# larger ones it is slower once they do not fit in the cache (docs/speed.md).
CPU_BATCH_ELEMENTS = 2**20


class Muon(torch.optim.Optimizer):
    """The update of a matrix is its momentum with all singular values set to about 1, times the learning rate.

    As torch.optim.Muon, except for three things. Each row of the update is divided by the root of its mean square, an
    average over the steps, and the norm of the whole is kept. Matrices of one shape are orthogonalized in batched
    products, which is faster if they are small. And a parameter may consist of several matrices, stacked by rows: the
    queries, keys and values of attention are three.
    """

    def __init__(self, params, lr, weight_decay, parts, momentum=0.9, beta2=0.95):
        """`params`: matrices or groups of them. `parts`: the number of matrices that each of them consists of, a list.

        `beta2` is that of the rows' mean squares.
        """
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})
        params = [p for group in self.param_groups for p in group["params"]]
        self.parts, self.beta2 = dict(zip(params, parts, strict=True)), beta2

    @torch.no_grad()
    def step(self):
        """Update the parameters from their gradients."""
        for group in self.param_groups:
            self.update(group)

    def update(self, group):
        """Update the parameters of a group."""
        by_shape = {}  # shape → weight, momentum, both (rows, columns), and mean squares (rows, 1) of each matrix
        for p in group["params"]:
            if p.grad is None:  # frozen, or not used in this step
                continue
            state = self.state[p]
            if not state:
                state.update(momentum_buffer=torch.zeros_like(p), mean_squares=p.new_zeros(len(p), 1))
            momentum = state["momentum_buffer"]
            momentum.lerp_(p.grad, 1 - group["momentum"])
            nesterov = p.grad.lerp(momentum, group["momentum"])
            parts = self.parts.get(p, 1)
            for matrix in zip(p.chunk(parts), nesterov.chunk(parts), state["mean_squares"].chunk(parts)):
                by_shape.setdefault(matrix[0].shape, []).append(matrix)
        for (rows, columns), matrices in by_shape.items():
            weights, updates, mean_squares = zip(*matrices)
            batch_size = len(weights)
            if weights[0].device.type == "cpu":
                batch_size = max(1, CPU_BATCH_ELEMENTS // (rows * columns))
            batches = [orthogonalize(batch) for batch in torch.stack(updates).split(batch_size)]
            updates = normalize_rows(torch.cat(batches).to(weights[0].dtype), mean_squares, self.beta2)
            torch._foreach_mul_(weights, 1 - group["lr"] * group["weight_decay"])
            torch._foreach_add_(weights, updates.unbind(), alpha=-group["lr"] * max(1, rows / columns) ** 0.5)


def normalize_rows(updates, mean_squares, beta2):
    """Divide the rows of updates (N, rows, columns) by the roots of their mean squares; keeps the norm of each update.

    `mean_squares`, N tensors (rows, 1), are averages over the steps, updated first.
    """
    torch._foreach_lerp_(mean_squares, updates.square().mean(2, keepdim=True).unbind(), 1 - beta2)
    normalized = updates / torch.stack(mean_squares).sqrt().clamp_min(1e-10)
    norms, new_norms = (x.norm(dim=(1, 2), keepdim=True) for x in (updates, normalized))
    return normalized * (norms / new_norms.clamp_min(1e-10))


def orthogonalize(matrices):
    """Bring the singular values of matrices (N, rows, columns) near 1 (mostly 0.2 to 1.9), by Newton-Schulz iterations.

    In bfloat16, which is precise enough for a direction, or in float32 on a CPU that computes bfloat16 in software: on
    an EPYC without AVX-512 that is three times as fast.
    """
    device = matrices.device
    x = matrices.to(pick_dtype("auto", device) if device.type == "cpu" else torch.bfloat16)
    if transposed := x.size(1) > x.size(2):  # the products are of the smaller side
        x = x.mT
    x = x / (1.02 * x.norm(dim=(1, 2), keepdim=True)).clamp_min(1e-7)  # 1.02: a value of 1.05 would diverge
    for a, b, c in COEFFICIENTS:
        gram = x @ x.mT  # (N, rows, rows)
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if transposed else x
