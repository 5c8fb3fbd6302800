"""The embedding whose gradient is a library's sorted sum: on a CPU in fp32, where both ways are exact but for order."""

import pytest
import torch
import torch.nn.functional as F

from nanochat.model import embedding
from nanochat.model.embedding import _Embedding, _embedding_gradient

V, D = 11, 6


def gradient(function, ids, weight, upstream):
    weight = weight.clone().requires_grad_()
    out = function(ids, weight)
    out.backward(upstream)
    return out.detach(), weight.grad


@pytest.mark.parametrize("compiled", [False, True])
def test_values_and_gradients_are_those_of_the_plain_lookup(compiled):
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(V - 2, (3, 50), generator=generator)  # most rows many times, two never
    weight, upstream = (torch.randn(*shape, generator=generator) for shape in ((V, D), (3, 50, D)))
    function = torch.compile(_Embedding.apply, fullgraph=True) if compiled else _Embedding.apply
    out, grad = gradient(function, ids, weight, upstream)
    expected, expected_grad = gradient(lambda ids, weight: F.embedding(ids, weight), ids, weight, upstream)
    assert torch.equal(out, expected)
    torch.testing.assert_close(grad, expected_grad)
    assert not grad[-2:].any()


def test_the_gradients_op_is_well_made():
    torch.library.opcheck(_embedding_gradient, (torch.randn(2, 5, D), torch.randint(V, (2, 5)), V))


def test_only_a_gpu_takes_it(monkeypatch):
    monkeypatch.setattr(embedding, "_Embedding", None)
    weight = torch.randn(V, D)
    assert torch.equal(embedding.embedding(torch.tensor([3]), weight), weight[3:4])
