"""The lookup with a gradient kernel, against the sum in fp64."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import kernel_device

from nanochat.kernels.embedding import _Embedding, _embedding_gradient, by_id

V, D = 11, 6


def gradient(ids, table, upstream):
    table = table.clone().requires_grad_()
    out = _Embedding.apply(table, ids, *by_id(ids, len(table)))
    assert torch.equal(out, F.embedding(ids, table))
    return torch.autograd.grad(out, table, upstream)[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [D, 520])  # the second in three blocks
def test_the_gradient_is_the_fp32_sum_rounded_once(dtype, width):
    device, generator = kernel_device(), torch.Generator().manual_seed(0)
    ids = torch.randint(V - 2, (3, 50), generator=generator).to(device)  # two rows never occur
    table, upstream = (torch.randn(*shape, generator=generator).to(device, dtype)
                       for shape in ((V, width), (3, 50, width)))
    exact = torch.zeros(V, width, dtype=torch.float64, device=device)
    exact.index_add_(0, ids.flatten(), upstream.flatten(0, 1).double())
    grad = gradient(ids, table, upstream)
    assert grad.dtype == dtype and not grad[-2:].any()
    rtol = 2**-8 if dtype == torch.bfloat16 else 1e-6
    torch.testing.assert_close(grad.double(), exact, rtol=rtol, atol=1e-5)
    assert torch.equal(grad, gradient(ids, table, upstream))
    torch.library.opcheck(_embedding_gradient, (upstream, *by_id(ids, V)))


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, V - 1), max_size=40))
def test_positions_by_id(ids):
    positions, starts = by_id(torch.tensor(ids, dtype=torch.int64), V)
    for row in range(V):
        expected = [i for i, one in enumerate(ids) if one == row]
        assert positions[starts[row] : starts[row + 1]].tolist() == expected
