"""Chunked linear cross-entropy, Triton and torch, against fp64 and against the unfused loss."""

import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from kernel_cases import assert_as_exact, error, kernel_device

from nanochat.common import UserError
from nanochat.kernels import linear_cross_entropy as module
from nanochat.kernels.linear_cross_entropy import (
    MAX_SOFTCAP,
    check_linear_cross_entropy,
    chunk_rows,
    linear_cross_entropy,
)
from nanochat.gpt import plain_linear_cross_entropy

both = pytest.mark.parametrize("implementation", ["triton", "torch"])
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])

# (rows, width, vocabulary, padded vocabulary, rows of a chunk): every value of each, every pair of rows and small
# vocabulary. Few rows, a narrow model or few chunks where the interpreter would take minutes.
CASES = [
    (1, 64, 64, 64, 1), (127, 96, 64, 64, 128), (128, 768, 64, 64, 127), (129, 1536, 64, 64, 128),
    (1000, 64, 64, 64, 999),
    (1, 96, 65, 128, 7), (127, 768, 65, 128, 127), (128, 1536, 65, 128, 128), (129, 64, 65, 128, 4000),
    (1000, 96, 65, 128, 128),
    (1, 768, 193, 256, 128), (127, 1536, 193, 256, 7), (128, 64, 193, 256, 128), (129, 96, 193, 256, 128),
    (1000, 768, 193, 256, 1000),
    (1, 1536, 8191, 8192, 1), (127, 96, 8191, 8192, 128), (129, 64, 8191, 8192, 7),
    (1, 768, 32700, 32768, 7), (17, 64, 32700, 32768, 7),
]


@pytest.fixture
def device():
    return kernel_device()


def problem(n_rows, width, vocab_size, padded, dtype, device, amplitude=3.0, ignored=0.0, seed=0):
    """x, fp32 master weight, targets; logits of about `amplitude`; the first and last columns are targets."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n_rows, width, generator=generator)
    weight = torch.randn(padded, width, generator=generator) * amplitude / width**0.5
    targets = torch.randint(0, vocab_size, (n_rows,), generator=generator)
    targets[0], targets[-1] = 0, vocab_size - 1
    targets[torch.rand(n_rows, generator=generator) < ignored] = -1
    return x.to(device, dtype).requires_grad_(), weight.to(device).requires_grad_(), targets.to(device)


def with_gradients(loss_function, x, weight, *arguments, **options):
    loss = loss_function(x, weight, *arguments, **options)
    return (loss, *torch.autograd.grad(loss, (x, weight)))


def sliced_in_fp64(x, weight, targets, vocab_size, softcap=15.0, reduction="mean"):
    """The definition: padded columns sliced off, everything in fp64 from the operands the matmul sees."""
    logits = softcap * torch.tanh(x @ weight[:vocab_size].T / softcap)
    return F.cross_entropy(logits, targets, ignore_index=-1, reduction=reduction)


def truth(x, weight, *arguments, **options):
    operands = (x.detach().double().requires_grad_(), weight.detach().to(x.dtype).double().requires_grad_())
    return with_gradients(sliced_in_fp64, *operands, *arguments, **options)


@both
@dtypes
@pytest.mark.parametrize(("n_rows", "width", "vocab_size", "padded", "rows"), CASES)
def test_matches_fp64_as_well_as_the_unfused_loss(device, implementation, dtype, n_rows, width, vocab_size, padded,
                                                  rows):
    x, weight, targets = problem(n_rows, width, vocab_size, padded, dtype, device, ignored=0.1)
    ours = with_gradients(linear_cross_entropy, x, weight, targets, vocab_size, implementation=implementation,
                          chunk_bytes=rows * padded * x.element_size())
    assert_as_exact(ours, with_gradients(plain_linear_cross_entropy, x, weight, targets, vocab_size),
                    truth(x, weight, targets, vocab_size))
    assert ours[0].dtype == torch.float32 and ours[1].dtype == dtype and ours[2].dtype == torch.float32
    assert not ours[2][vocab_size:].any()


@pytest.mark.parametrize("shape", [(1000, 1536, 32700, 32768), (4096, 768, 8191, 8192)])
@pytest.mark.gpu
def test_matches_fp64_at_training_widths(shape):
    test_matches_fp64_as_well_as_the_unfused_loss(torch.device("cuda"), "triton", torch.bfloat16, *shape, 1024)


@pytest.mark.gpu
def test_a_chunk_of_more_than_2_to_the_31_elements():
    x, weight, targets = problem(70_000, 64, 32700, 32768, torch.bfloat16, torch.device("cuda"))
    last = slice(-64, None)
    losses = linear_cross_entropy(x, weight, targets, 32700, reduction="none", chunk_bytes=6 << 30)
    expected = plain_linear_cross_entropy(x[last], weight, targets[last], 32700, reduction="none").detach()
    torch.testing.assert_close(losses[last], expected, rtol=1e-3, atol=1e-3)


@pytest.mark.gpu
def test_transient_memory_stays_within_a_gigabyte_and_the_gradients():
    x, weight, targets = problem(65_536, 768, 32700, 32768, torch.bfloat16, torch.device("cuda"))
    gradients = x.numel() * x.element_size() + weight.numel() * weight.element_size()
    linear_cross_entropy(x, weight, targets, 32700)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    linear_cross_entropy(x, weight, targets, 32700)
    assert torch.cuda.max_memory_allocated() - before <= (1 << 30) + gradients


@both
@dtypes
@pytest.mark.parametrize(("n_rows", "chunks"), [(33, (1, 7, 32, 33, 1000)), (300, (128, 300))])
def test_chunk_size_does_not_change_the_result_and_reruns_are_bit_equal(device, implementation, dtype, n_rows, chunks):
    x, weight, targets = problem(n_rows, 64, 193, 256, dtype, device)
    results = []
    for rows in chunks:
        runs = [with_gradients(linear_cross_entropy, x, weight, targets, 193, implementation=implementation,
                               chunk_bytes=rows * 256 * x.element_size()) for _ in range(2)]
        assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
        results.append(runs[0])
    for loss, dx, dweight in results:
        assert error(loss, results[-1][0]) < 2e-7
        tolerance = 1e-6 if dtype == torch.float32 else 4e-3
        assert error(dx, results[-1][1]) < tolerance and error(dweight, results[-1][2]) < tolerance


@both
@pytest.mark.parametrize("ignored", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_reductions_and_ignored_targets_match_the_unfused_loss(device, implementation, ignored, reduction):
    x, weight, targets = problem(129, 64, 193, 256, torch.float32, device, ignored=ignored)
    options = {"reduction": reduction}
    if reduction == "none":
        ours = linear_cross_entropy(x.view(3, 43, 64), weight, targets.view(3, 43), 193, implementation=implementation,
                                    **options)
        assert ours.shape == (3, 43) and not (targets.view(3, 43) == -1)[ours != 0].any()
        torch.testing.assert_close(ours.view(-1), plain_linear_cross_entropy(x, weight, targets, 193, **options))
        return
    ours = with_gradients(linear_cross_entropy, x, weight, targets, 193, implementation=implementation, **options)
    plain = with_gradients(plain_linear_cross_entropy, x, weight, targets, 193, **options)
    torch.testing.assert_close(ours, plain, equal_nan=True)
    assert torch.isnan(ours[0]).item() == (ignored == 1.0 and reduction == "mean")
    assert not ours[1][targets == -1].any()


@both
@dtypes
@pytest.mark.parametrize("amplitude", [0.0, 1.0, 30.0, 1e4])
def test_any_logit_amplitude_is_as_exact_as_the_unfused_loss(device, implementation, dtype, amplitude):
    x, weight, targets = problem(127, 96, 193, 256, dtype, device, amplitude=amplitude)
    ours = with_gradients(linear_cross_entropy, x, weight, targets, 193, implementation=implementation)
    assert_as_exact(ours, with_gradients(plain_linear_cross_entropy, x, weight, targets, 193),
                    truth(x, weight, targets, 193))


@both
def test_gradient_of_a_confident_token_keeps_its_precision_in_bf16(device, implementation):
    """p - 1 has to be rounded once: rounding p first loses a fifth of it at p = 0.99."""
    x = torch.ones(1, 64, dtype=torch.bfloat16, device=device, requires_grad=True)
    weight = torch.zeros(64, 64, device=device)
    weight[3] = 10.0 / 64
    weight.requires_grad_()
    ours = with_gradients(linear_cross_entropy, x, weight, torch.tensor([3], device=device), 64,
                          implementation=implementation)
    exact = truth(x, weight, torch.tensor([3], device=device), 64)
    assert 0.01 < exact[0] < 0.02
    assert error(ours[2][3], exact[2][3]) < 2**-8


@both
@pytest.mark.parametrize("target", [-2, -100, 193, 255, 256, 2**40])
def test_a_target_out_of_range_makes_its_loss_nan_and_no_other(device, implementation, target):
    x, weight, targets = problem(9, 64, 193, 256, torch.float32, device)
    clean = linear_cross_entropy(x, weight, targets, 193, reduction="none", implementation=implementation)
    targets[4] = target
    losses = linear_cross_entropy(x, weight, targets, 193, reduction="none", implementation=implementation)
    others = torch.arange(9, device=device) != 4
    assert torch.isnan(losses[4]) and torch.equal(losses[others], clean[others])
    loss, dx, _ = with_gradients(linear_cross_entropy, x, weight, targets, 193, implementation=implementation)
    assert torch.isnan(loss) and torch.isnan(dx[4]).all() and torch.isfinite(dx[others]).all()


@both
@dtypes
@pytest.mark.parametrize("poison", [float("inf"), float("nan")])
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, in the interpreter
def test_a_poisoned_row_does_not_reach_other_rows(device, implementation, dtype, poison):
    x, weight, targets = problem(9, 64, 193, 256, dtype, device)
    weight.requires_grad_(False)
    results = []
    for value in (0.0, poison):
        row = x.detach().clone()
        row[4] = value
        row.requires_grad_()
        loss = linear_cross_entropy(row, weight, targets, 193, reduction="sum", implementation=implementation)
        losses = linear_cross_entropy(row, weight, targets, 193, reduction="none", implementation=implementation)
        results.append((losses, *torch.autograd.grad(loss, row)))
    others = torch.arange(9, device=device) != 4
    for clean, poisoned in zip(*results, strict=True):
        assert torch.equal(clean[others], poisoned[others])
    assert torch.isnan(results[1][0][4])


@both
def test_an_ignored_row_is_zero_whatever_it_holds(device, implementation):
    x, weight, targets = problem(9, 64, 193, 256, torch.float32, device)
    weight.requires_grad_(False)
    with torch.no_grad():
        x[4] = float("nan")
    targets[4] = -1
    loss = linear_cross_entropy(x, weight, targets, 193, implementation=implementation)
    (dx,) = torch.autograd.grad(loss, x)
    assert torch.isfinite(loss) and torch.isfinite(dx).all() and not dx[4].any()


@both
@dtypes
def test_upstream_gradient_multiplies_and_backward_twice_gives_equal_gradients(device, implementation, dtype):
    x, weight, targets = problem(40, 64, 65, 128, dtype, device)
    loss = linear_cross_entropy(x, weight, targets, 65, implementation=implementation)
    once = torch.autograd.grad(loss, (x, weight), retain_graph=True)
    twice = torch.autograd.grad(loss, (x, weight), retain_graph=True)
    # an expanded upstream gradient, of value 3 * 0.25
    tripled = torch.autograd.grad((loss.expand(3) * 0.25).sum(), (x, weight))
    for a, b, c in zip(once, twice, tripled, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a * 0.75, c)


@both
def test_frozen_inputs_get_no_gradient_and_change_no_other(device, implementation):
    x, weight, targets = problem(40, 64, 65, 128, torch.float32, device)
    options = {"implementation": implementation}
    _, dx, dweight = with_gradients(linear_cross_entropy, x, weight, targets, 65, **options)
    loss = linear_cross_entropy(x, weight.detach(), targets, 65, **options)
    assert torch.equal(torch.autograd.grad(loss, x)[0], dx)
    loss = linear_cross_entropy(x.detach(), weight, targets, 65, **options)
    assert torch.equal(torch.autograd.grad(loss, weight)[0], dweight)


@both
def test_without_gradients_the_loss_is_the_same_and_none_are_made(device, implementation, monkeypatch):
    x, weight, targets = problem(40, 64, 65, 128, torch.bfloat16, device)
    trained = linear_cross_entropy(x, weight, targets, 65, implementation=implementation)
    monkeypatch.setattr(module, "_add_product", None)
    with torch.no_grad():
        evaluated = linear_cross_entropy(x, weight, targets, 65, implementation=implementation)
    frozen = linear_cross_entropy(x.detach(), weight.detach(), targets, 65, implementation=implementation)
    assert not evaluated.requires_grad and not frozen.requires_grad
    # on a GPU training takes the hardware's tanh, evaluation the exact one
    torch.testing.assert_close(evaluated, trained, rtol=1e-6 if device.type == "cpu" else 1e-3, atol=0)
    assert torch.equal(evaluated, frozen)


@both
def test_sliced_and_transposed_inputs_give_what_contiguous_ones_give(device, implementation):
    x, weight, targets = problem(40, 64, 65, 128, torch.float32, device)
    expected = with_gradients(linear_cross_entropy, x, weight, targets, 65, implementation=implementation)
    wide = torch.cat((x.detach(), x.detach()), dim=1).requires_grad_()
    transposed = weight.detach().T.contiguous().requires_grad_()
    loss = linear_cross_entropy(wide[:, 64:], transposed.T, targets.repeat_interleave(2)[::2], 65,
                                implementation=implementation)
    dwide, dtransposed = torch.autograd.grad(loss, (wide, transposed))
    torch.testing.assert_close((loss, dwide[:, 64:], dtransposed.T), expected, rtol=1e-5, atol=1e-7)
    assert not dwide[:, :64].any()


@both
def test_weight_in_the_compute_dtype_gets_its_gradient_in_that_dtype(device, implementation):
    x, weight, targets = problem(40, 64, 65, 128, torch.bfloat16, device)
    expected = with_gradients(linear_cross_entropy, x, weight, targets, 65, implementation=implementation)
    cast = weight.detach().bfloat16().requires_grad_()
    loss, dx, dweight = with_gradients(linear_cross_entropy, x, cast, targets, 65, implementation=implementation)
    assert torch.equal(loss, expected[0]) and torch.equal(dx, expected[1])
    assert torch.equal(dweight, expected[2].bfloat16())


@both
def test_accumulated_micro_batches_add_up_to_the_whole_batch(device, implementation):
    x, weight, targets = problem(64, 64, 65, 128, torch.float32, device)
    _, dx, dweight = with_gradients(linear_cross_entropy, x, weight, targets, 65, implementation=implementation)
    for rows in (slice(0, 32), slice(32, 64)):
        (linear_cross_entropy(x[rows], weight, targets[rows], 65, implementation=implementation) / 2).backward()
    torch.testing.assert_close((x.grad, weight.grad), (dx, dweight), rtol=1e-5, atol=1e-8)


@both
def test_ops_pass_opcheck(device, implementation):
    x, weight, targets = problem(10, 64, 65, 128, torch.float32, device)
    for mean, need_dx, need_dweight in ((True, True, True), (False, True, False)):
        torch.library.opcheck(module._loss_and_gradients, (x, weight.detach().requires_grad_(need_dweight), targets, 65,
                                                           15.0, mean, implementation, 4096, need_dx, need_dweight))
    torch.library.opcheck(module._losses, (x.detach(), weight.detach(), targets, 65, 15.0, implementation, 4096))


@both
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method`:DeprecationWarning")  # raised while inductor is imported
def test_compiles_whole_and_gives_what_eager_gives(device, implementation, backend):
    x, weight, targets = problem(40, 64, 65, 128, torch.bfloat16, device)

    def loss_function(x, weight, targets):
        return 3 * linear_cross_entropy(2 * x, weight, targets, 65, implementation=implementation)

    compiled = torch.compile(loss_function, fullgraph=True, backend=backend)
    torch.testing.assert_close(with_gradients(compiled, x, weight, targets),
                               with_gradients(loss_function, x, weight, targets))
    with torch.no_grad():
        torch.testing.assert_close(compiled(x, weight, targets), loss_function(x, weight, targets))


def test_plain_loss_masks_the_padding_as_slicing_would(device):
    x, weight, targets = problem(40, 64, 65, 128, torch.float32, device)
    plain = with_gradients(plain_linear_cross_entropy, x, weight, targets, 65)
    torch.testing.assert_close(plain, tuple(t.float() for t in truth(x, weight, targets, 65)))


def test_plain_loss_of_a_target_out_of_range_is_nan_and_of_an_ignored_one_zero(device):
    x, weight, _ = problem(7, 64, 65, 128, torch.float32, device)
    targets = torch.tensor([-2, 65, 127, 128, -1, 0, 64], device=device)  # 65 to 127 are the padding's columns
    losses = plain_linear_cross_entropy(x, weight, targets, 65, reduction="none")
    assert torch.isnan(losses).tolist() == [True] * 4 + [False] * 3
    assert losses[4] == 0 and (losses[5:] > 0).all()


@given(st.integers(1, 10**6), st.integers(1, 10**6), st.integers(1, 10**10))
def test_chunks_fit_the_budget_and_cover_the_rows_evenly(n_rows, row_bytes, budget):
    if budget < row_bytes:
        with pytest.raises(UserError, match="chunk budget"):
            chunk_rows(n_rows, row_bytes, budget)
        return
    rows = chunk_rows(n_rows, row_bytes, budget)
    assert 1 <= rows <= n_rows or rows % 128 == 0
    assert rows * row_bytes <= budget
    if budget >= 128 * row_bytes and rows < n_rows:
        assert rows % 128 == 0
    fewest = -(-n_rows // (budget // row_bytes))
    assert -(-n_rows // rows) <= 2 * fewest  # rounding to tiles of 128 costs less than twice the chunks


@pytest.mark.parametrize(("changes", "words"), [
    ({"dtype": torch.float16}, "bfloat16 or float32"),
    ({"chunk_bytes": 1000}, "smaller than one row"),
    ({"softcap": 100.0}, "softcap"),
])
def test_unsuitable_models_are_refused_in_one_line(device, changes, words):
    arguments = {"device": device, "dtype": torch.bfloat16, "padded_vocab_size": 8192, **changes}
    check_linear_cross_entropy(device, torch.bfloat16, 8192)
    with pytest.raises(UserError, match=words) as caught:
        check_linear_cross_entropy(**arguments)
    assert "\n" not in str(caught.value)


@both
def test_the_largest_softcap_with_every_logit_at_its_bottom(device, implementation):
    x, weight = torch.full((3, 64), -100.0, device=device), torch.ones(128, 64, device=device)
    targets = torch.tensor([0, 5, 99], device=device)
    losses = linear_cross_entropy(x, weight, targets, 100, MAX_SOFTCAP, "none", implementation)
    torch.testing.assert_close(losses.cpu(), torch.full((3,), math.log(100)))
    torch.testing.assert_close(plain_linear_cross_entropy(x, weight, targets, 100, MAX_SOFTCAP, "none"), losses)


_ROOT = Path(__file__).parents[1]
_PEAK = """
import sys, torch
from nanochat.kernels.linear_cross_entropy import linear_cross_entropy
from nanochat.gpt import plain_linear_cross_entropy
from dev.bench.measure import cpu_peak_bytes
x = torch.randn(2048, 64, dtype=torch.bfloat16, requires_grad=True)
weight, targets = torch.randn(16384, 64, requires_grad=True), torch.randint(0, 16000, (2048,))
for run in (lambda: linear_cross_entropy(x, weight, targets, 16000, implementation="torch"),
            lambda: plain_linear_cross_entropy(x, weight, targets, 16000)):
    print(cpu_peak_bytes(lambda: run().backward()))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read from Linux's /proc")
def test_torch_form_takes_less_than_a_fifth_of_the_unfused_loss_memory():
    run = subprocess.run([sys.executable, "-c", _PEAK], capture_output=True, text=True, check=True, cwd=_ROOT)
    chunked, plain = (int(line) for line in run.stdout.split())
    assert chunked <= plain / 5
