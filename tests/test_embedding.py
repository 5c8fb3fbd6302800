"""The lookup with a gradient kernel, against the sum in fp64."""

import collections

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import kernel_device

from nanochat.kernels.embedding import TILE, _Embedding, _embedding_gradient, by_id
from nanochat.kernels.runtime import INTERPRETED

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
    ids = torch.randint(V - 2, (3, 50), generator=generator)  # two rows never occur
    ids[1:][torch.rand(2, 50, generator=generator) < 0.8] = 4  # a hot row of several tiles
    assert (ids == 4).sum() > 2 * TILE
    ids = ids.to(device)
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
    _, positions, starts = by_id(torch.tensor(ids, dtype=torch.int64), V)
    for row in range(V):
        expected = [i for i, one in enumerate(ids) if one == row]
        assert positions[starts[row] : starts[row + 1]].tolist() == expected


@pytest.mark.skipif(not INTERPRETED, reason="the interpreter counts the loads of a program")
def test_the_hottest_token_takes_few_serial_iterations(monkeypatch):
    """Zipf's law with 4 % of 32,768 positions for the commonest token, which took 164."""
    from triton.runtime.interpreter import interpreter_builder

    weights = 1 / (torch.arange(32768) + 2.7)
    ids = torch.multinomial(weights, 32768, replacement=True,
                            generator=torch.Generator().manual_seed(0))
    assert 0.035 < (ids == 0).float().mean() < 0.045
    ids_in_order, positions, starts = by_id(ids, 32768)
    iterations, load = collections.Counter(), interpreter_builder.create_masked_load

    def counted(pointers, *arguments):
        if pointers.dtype.element_ty.is_floating():
            iterations[interpreter_builder.grid_idx] += 1
        return load(pointers, *arguments)

    monkeypatch.setattr(interpreter_builder, "create_masked_load", counted)
    grad = torch.ones(32768, D)
    hottest = _embedding_gradient(grad, ids_in_order, positions, starts[:5])
    assert hottest[:, 0].tolist() == starts[:5].diff().tolist()
    assert 8 < max(iterations.values()) <= 16  # of both launches
