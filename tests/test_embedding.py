"""The lookup whose gradient every row sums by itself, against the sum in fp64."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import kernel_device

from nanochat.kernels.embedding import _Embedding, _embedding_gradient, by_id, lookup

V, D = 11, 6


@pytest.fixture
def device():
    return kernel_device()


def gradient(ids, table, upstream):
    table = table.clone().requires_grad_()
    out = _Embedding.apply(table, ids, *by_id(ids, len(table)))
    assert torch.equal(out, F.embedding(ids, table))
    return torch.autograd.grad(out, table, upstream)[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [D, 1040])  # the second in two blocks
def test_the_gradient_is_the_sum_in_fp32_rounded_once(device, dtype, width):
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(V - 2, (3, 50), generator=generator).to(device)  # most rows many times, two never
    table, upstream = (torch.randn(*shape, generator=generator).to(device, dtype)
                       for shape in ((V, width), (3, 50, width)))
    exact = torch.zeros(V, width, dtype=torch.float64, device=device)
    exact.index_add_(0, ids.flatten(), upstream.flatten(0, 1).double())
    grad = gradient(ids, table, upstream)
    assert grad.dtype == dtype and not grad[-2:].any()
    torch.testing.assert_close(grad.double(), exact, rtol=2**-8 if dtype == torch.bfloat16 else 1e-6, atol=1e-5)
    assert torch.equal(grad, gradient(ids, table, upstream))


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, V - 1), max_size=40))
def test_positions_by_id(ids):
    positions, starts = by_id(torch.tensor(ids, dtype=torch.int64), V)
    for row in range(V):
        assert positions[starts[row] : starts[row + 1]].tolist() == [i for i, one in enumerate(ids) if one == row]


def test_the_op_is_well_made(device):
    ids = torch.randint(V, (2, 5), device=device)
    torch.library.opcheck(_embedding_gradient, (torch.randn(2, 5, D, device=device), *by_id(ids, V)))


def test_a_gradient_of_strided_and_expanded_rows(device):
    ids = torch.tensor([[3, 3, 1]], device=device)
    upstream = torch.ones(1, 1, 1, device=device).expand(1, 3, D)
    assert gradient(ids, torch.randn(V, D, device=device), upstream).sum(1).tolist() == [0, D, 0, 2 * D] + [0] * (V - 4)


def test_a_cpu_and_inference_take_the_plain_lookup():
    table = torch.randn(V, D, requires_grad=True)
    assert lookup(torch.tensor([3]), V)(table).grad_fn.name() == "EmbeddingBackward0"
