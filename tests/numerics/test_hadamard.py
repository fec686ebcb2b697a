"""The rotation of activations: orthonormal, its own inverse but for the signs, and the matrix that its page defines."""

import pytest
import torch

from lowp.numerics.hadamard import group_of, rotated, unrotated


def sylvester(size):
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while len(matrix) < size:
        matrix = torch.cat((torch.cat((matrix, matrix), 1), torch.cat((matrix, -matrix), 1)))
    return matrix / size**0.5


@pytest.mark.parametrize("columns", [1, 7, 16, 96, 768])
def test_it_is_the_matrix_that_the_page_defines(columns, device):
    x = torch.randn(3, 5, columns, device=device)
    signs = 1.0 - 2.0 * torch.randint(0, 2, (columns,), device=device)
    size = group_of(columns)
    whole = torch.block_diag(*[sylvester(size)] * (columns // size)).to(device)
    expected = (x * signs).double() @ whole
    assert torch.allclose(rotated(x, signs.to(torch.int8)).double(), expected, atol=1e-5)
    assert torch.allclose(unrotated(rotated(x, signs), signs), x, atol=1e-5)
    assert rotated(x.bfloat16(), signs).dtype == torch.bfloat16
    assert torch.allclose(rotated(x, signs).norm(dim=-1), x.norm(dim=-1), rtol=1e-5)


def test_an_outlier_is_spread():
    x = torch.zeros(1, 256)
    x[0, 3] = 16.0
    assert torch.equal(rotated(x, torch.ones(256)).abs(), torch.ones(1, 256))
