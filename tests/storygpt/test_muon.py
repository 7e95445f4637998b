"""muon.py: singular values, the rows of updates, several matrices in one parameter."""

import copy

import pytest
import torch

from storygpt.muon import COEFFICIENTS, Muon, normalize_rows, orthogonalize

SHAPES = [(8, 8), (24, 8), (8, 24), (8, 8), (24, 8)]


def parameters(shapes=SHAPES):
    """Random matrices, the same at each call."""
    generator = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]


def set_gradients(params, seed):
    """Random gradients, of sizes that differ between parameters."""
    generator = torch.Generator().manual_seed(seed)
    for i, p in enumerate(params):
        p.grad = torch.randn(p.shape, generator=generator) * 10**i


@pytest.mark.parametrize("shape", [(3, 16, 16), (2, 16, 40), (2, 40, 16)])
def test_singular_values_become_about_one_and_vectors_stay(shape):
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 1e-3
    u, s, v = torch.linalg.svd(matrices, full_matrices=False)
    s = s / s.norm(dim=1, keepdim=True) / 1.02
    for a, b, c in COEFFICIENTS:
        s = a * s + b * s**3 + c * s**5
    assert s.min() > 0.15 and s.max() < 2 and 0.7 < s.mean() < 1.2
    orthogonal = orthogonalize(matrices).float()
    expected = u @ torch.diag_embed(s) @ v
    assert orthogonal.shape == shape and (orthogonal - expected).norm() < 0.05 * expected.norm()


def test_a_matrix_of_rank_one_does_not_diverge_and_zeros_stay_zeros():
    """The singular value is as large as the norm, by which it is divided."""
    for scale in (1e-6, 1.0, 1e6):
        matrix = scale * torch.outer(torch.linspace(-1, 1, 50), torch.linspace(1, 2, 30))[None]
        assert torch.linalg.svdvals(orthogonalize(matrix).float()).max() < 2
    assert not orthogonalize(torch.zeros(1, 4, 4)).any()


def test_rows_of_updates_have_equal_mean_squares_on_average():
    sizes = torch.tensor([1.0, 2.0, 3.0, 0.0])[:, None]
    mean_squares = [torch.zeros(4, 1), torch.zeros(4, 1)]
    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        updates = torch.randn(2, 4, 50, generator=generator) * sizes
        normalized = normalize_rows(updates, mean_squares, beta2=0.95)
    torch.testing.assert_close(mean_squares[0], sizes.square(), rtol=0.2, atol=0)
    torch.testing.assert_close(normalized.norm(dim=(1, 2)), updates.norm(dim=(1, 2)))
    rows = normalized.square().mean(2)
    assert (rows[:, 3] == 0).all() and rows[:, :3].max() < 2.5 * rows[:, :3].min()


def test_steps_equal_a_plain_computation():
    """Nesterov momentum, weight decay, a rate that is higher for matrices with more rows than columns, and parts."""
    params, plain = parameters(), [p.detach() for p in parameters()]
    parts = [1, 3, 1, 1, 1]
    optimizer = Muon(params, lr=0.1, weight_decay=0.2, parts=parts)
    momentum, mean_squares = [torch.zeros_like(p) for p in plain], [torch.zeros(len(p), 1) for p in plain]
    for seed in (1, 2, 3):
        set_gradients(params, seed)
        optimizer.step()
        for p, w, m, squares, count in zip(params, plain, momentum, mean_squares, parts):
            m.mul_(0.9).add_(p.grad, alpha=0.1)
            matrices = (0.1 * p.grad + 0.9 * m).chunk(count)
            updates = [normalize_rows(orthogonalize(matrix[None]).float(), [part], beta2=0.95)[0]
                       for matrix, part in zip(matrices, squares.chunk(count))]
            rate = 0.1 * max(1, len(matrices[0]) / w.size(1)) ** 0.5
            w.mul_(1 - 0.1 * 0.2).sub_(rate * torch.cat(updates))
            assert (p - w).norm() < 0.01 * w.norm()  # rounding of bfloat16 differs in batched products


def test_a_matrix_without_a_gradient_stays_and_the_others_are_as_without_it():
    """A frozen parameter, or one that the step did not use; also after its optimizer was saved and loaded."""
    params, others = parameters(), parameters()
    for frozen in (1, 3):
        params[frozen].requires_grad_(False)
    optimizer = Muon(params, lr=0.1, weight_decay=0.2, parts=[1, 3, 1, 2, 3])
    plain = Muon([others[i] for i in (0, 2, 4)], lr=0.1, weight_decay=0.2, parts=[1, 1, 3])
    for seed in (1, 2):
        set_gradients(others, seed)
        for i in (0, 2, 4):
            params[i].grad = others[i].grad
        optimizer.step()
        plain.step()
        optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for i, (p, other, start) in enumerate(zip(params, others, parameters())):
        torch.testing.assert_close(p, other)
        assert torch.equal(p, start) == (i in (1, 3)) and (p in optimizer.state) == (i not in (1, 3))


def test_groups_have_their_own_learning_rates():
    params, others = parameters(), parameters()
    groups = [{"params": params[:1], "lr": 0.0}, {"params": params[1:]}]
    optimizer, plain = (Muon(ps, lr=0.1, weight_decay=0.2, parts=[1, 3, 1, 2, 3]) for ps in (groups, others))
    for ps, o in ((params, optimizer), (others, plain)):
        set_gradients(ps, 1)
        o.step()
    assert torch.equal(params[0], parameters()[0])
    torch.testing.assert_close(params[1:], others[1:])
