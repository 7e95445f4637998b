"""muon.py: equal to torch.optim.Muon one matrix at a time, and several matrices in one parameter."""

import copy

import pytest
import torch

from muon import Muon, orthogonalize

SHAPES = [(8, 8), (24, 8), (8, 24), (8, 8), (24, 8)]


def parameters(shapes=SHAPES):
    """Random matrices, the same at each call."""
    generator = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]


def take_steps(optimizer, params, seed=1, count=3):
    """A few steps with random gradients, of sizes that differ between parameters."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        for i, p in enumerate(params):
            p.grad = torch.randn(p.shape, generator=generator) * 10**i
        optimizer.step()


@pytest.mark.parametrize("shape", [(3, 16, 16), (2, 16, 40), (2, 40, 16)])
def test_singular_values_become_about_one(shape):
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 1e-3
    orthogonal = orthogonalize(matrices).float()
    values = torch.linalg.svdvals(orthogonal)
    assert orthogonal.shape == shape and values.min() > 0.3 and values.max() < 1.3 and 0.7 < values.mean() < 1.2
    u, _, v = torch.linalg.svd(matrices, full_matrices=False)
    direction = torch.nn.functional.cosine_similarity(orthogonal.flatten(1), (u @ v).flatten(1))
    assert (direction > 0.95).all()


def test_zeros_stay_zeros():
    assert torch.equal(orthogonalize(torch.zeros(1, 4, 4)), torch.zeros(1, 4, 4, dtype=torch.bfloat16))


def test_updates_equal_torchs():
    ours, torchs = parameters(), parameters()
    take_steps(Muon(ours, lr=0.1, weight_decay=0.2, parts=[1] * len(SHAPES)), ours)
    take_steps(torch.optim.Muon(torchs, lr=0.1, weight_decay=0.2), torchs)
    for a, b, initial in zip(ours, torchs, parameters()):
        assert (a - b).norm() < 0.02 * (b - initial).norm()  # rounding of bfloat16 differs in batched products


def test_parts_are_treated_as_matrices_of_their_own():
    whole, parts = parameters([(24, 8)])[0], parameters([(24, 8)])[0].detach().chunk(3)
    parts = [torch.nn.Parameter(part.clone()) for part in parts]
    gradient = torch.randn(24, 8)
    whole.grad = gradient
    for part, part_gradient in zip(parts, gradient.chunk(3)):
        part.grad = part_gradient.clone()
    for params, counts in (([whole], [3]), (parts, [1, 1, 1])):
        Muon(params, lr=0.1, weight_decay=0.2, parts=counts).step()
    assert torch.equal(whole, torch.cat(parts))


def test_a_checkpoint_of_torchs_muon_can_be_resumed():
    """Runs of earlier versions of this program have one."""
    ours, torchs = parameters(), parameters()
    theirs = torch.optim.Muon(torchs, lr=0.1, weight_decay=0.2)
    take_steps(theirs, torchs)
    with torch.no_grad():
        for a, b in zip(ours, torchs):
            a.copy_(b)
    optimizer = Muon(ours, lr=0.3, weight_decay=0.0, parts=[1] * len(SHAPES))
    optimizer.load_state_dict(copy.deepcopy(theirs.state_dict()))
    before = [p.detach().clone() for p in ours]
    for o, params in ((optimizer, ours), (theirs, torchs)):
        take_steps(o, params, seed=2)
    for a, b, initial in zip(ours, torchs, before):
        assert (a - b).norm() < 0.02 * (b - initial).norm()
