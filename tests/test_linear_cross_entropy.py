"""Chunked linear cross-entropy, by Triton and by torch, against fp64 and the plain loss."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from kernel_cases import (
    assert_as_exact,
    error,
    kernel_device,
    plain_linear_cross_entropy,
    with_gradients,
)

from nanochat.common import UserError
from nanochat.kernels import linear_cross_entropy as module
from nanochat.kernels.linear_cross_entropy import (
    check_linear_cross_entropy,
    linear_cross_entropy,
)

both = pytest.mark.parametrize("implementation", ["triton", "torch"])
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])

# (rows, width, vocabulary, padded vocabulary, rows of a chunk); few rows, a narrow model or few
# chunks where the interpreter would take minutes
CASES = [
    (1, 64, 64, 64, 1), (1000, 64, 64, 64, 999), (127, 768, 65, 128, 127), (129, 64, 65, 128, 4000),
    (127, 1536, 193, 256, 7), (128, 64, 193, 256, 128), (17, 96, 8191, 8192, 7),
    (17, 64, 32700, 32768, 7),
]


@pytest.fixture
def device():
    return kernel_device()


def problem(n_rows, width, vocab_size, padded, dtype, device, amplitude=3.0, ignored=0.0):
    """Return x, fp32 weight and targets with logits of about `amplitude`.

    The first and the last column are targets.
    """
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n_rows, width, generator=generator)
    weight = torch.randn(padded, width, generator=generator) * amplitude / width**0.5
    targets = torch.randint(0, vocab_size, (n_rows,), generator=generator)
    targets[0], targets[-1] = 0, vocab_size - 1
    targets[torch.rand(n_rows, generator=generator) < ignored] = -1
    x, weight = x.to(device, dtype), weight.to(device)
    return x.requires_grad_(), weight.requires_grad_(), targets.to(device)


def run(function, x, weight, *arguments, **options):
    return with_gradients(lambda x, weight: function(x, weight, *arguments, **options), (x, weight))


def sliced_in_fp64(x, weight, targets, vocab_size):
    """The definition, with the padded columns sliced off."""
    logits = 15 * torch.tanh(x @ weight[:vocab_size].T / 15)
    return F.cross_entropy(logits, targets, ignore_index=-1)


def truth(x, weight, *arguments):
    x, weight = x.detach().double(), weight.detach().to(x.dtype).double()
    return run(sliced_in_fp64, x.requires_grad_(), weight.requires_grad_(), *arguments)


def assert_exact(problem, vocab_size, **options):
    ours = run(linear_cross_entropy, *problem, vocab_size, **options)
    plain = run(plain_linear_cross_entropy, *problem, vocab_size)
    assert_as_exact(ours, plain, truth(*problem, vocab_size))
    return ours


# --- numbers --------------------------------------------------------------------------------------

@both
@dtypes
@pytest.mark.parametrize(("n_rows", "width", "vocab_size", "padded", "rows"), CASES)
def test_is_as_exact_as_the_plain_loss(device, implementation, dtype, n_rows, width, vocab_size,
                                       padded, rows):
    case = problem(n_rows, width, vocab_size, padded, dtype, device, ignored=0.1)
    loss, dx, dweight = assert_exact(case, vocab_size, implementation=implementation,
                                     chunk_bytes=rows * padded * dtype.itemsize)
    assert loss.dtype == dweight.dtype == torch.float32 and dx.dtype == dtype
    assert not dweight[vocab_size:].any()


@both
@dtypes
@pytest.mark.parametrize("amplitude", [0.0, 30.0, 1e4])
def test_any_amplitude_is_as_exact_as_the_plain_loss(device, implementation, dtype, amplitude):
    case = problem(127, 96, 193, 256, dtype, device, amplitude=amplitude)
    assert_exact(case, 193, implementation=implementation)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(1000, 1536, 32700, 32768), (4096, 768, 8191, 8192)])
def test_is_as_exact_at_training_widths_on_a_gpu(shape):
    case = problem(*shape, torch.bfloat16, torch.device("cuda"), ignored=0.1)
    assert_exact(case, shape[2], chunk_bytes=1024 * shape[3] * 2)


@both
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 4e-3)])
@pytest.mark.parametrize(("n_rows", "chunks"), [(33, (7, 32, 33, 1000)), (300, (128, 300))])
def test_chunk_size_changes_only_rounding_and_repeats_are_bitwise_equal(
        device, implementation, dtype, tolerance, n_rows, chunks):
    case, results = problem(n_rows, 64, 193, 256, dtype, device), []
    for rows in chunks:
        options = {"implementation": implementation, "chunk_bytes": rows * 256 * dtype.itemsize}
        first, second = (run(linear_cross_entropy, *case, 193, **options) for _ in range(2))
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
        results.append(first)
    for result in results[1:]:
        assert all(error(a, b) < tolerance for a, b in zip(result, results[0], strict=True))


@both
@pytest.mark.parametrize("ignored", [0.0, 0.3, 1.0])
def test_ignored_targets_and_losses_per_token_match_the_plain_loss(device, implementation, ignored):
    case = x, weight, targets = problem(129, 64, 193, 256, torch.float32, device, ignored=ignored)
    ours = run(linear_cross_entropy, *case, 193, implementation=implementation)
    torch.testing.assert_close(ours, run(plain_linear_cross_entropy, *case, 193), equal_nan=True)
    assert ours[0].isnan().item() == (ignored == 1.0)
    assert not ours[1][targets == -1].any()
    shape = (3, 43)
    losses = linear_cross_entropy(x.view(*shape, 64), weight, targets.view(shape), 193,
                                  reduction="none", implementation=implementation)
    assert losses.shape == shape and not losses.requires_grad
    expected = plain_linear_cross_entropy(*case, 193, reduction="none")
    torch.testing.assert_close(losses.view(-1), expected)
    assert not losses.view(-1)[targets == -1].any()


@both
@pytest.mark.parametrize("target", [-2, 193, 255, 256, 2**40])
def test_a_target_out_of_range_makes_only_its_loss_nan(device, implementation, target):
    case = *_, targets = problem(9, 64, 193, 256, torch.float32, device)
    losses = partial(linear_cross_entropy, *case, 193, reduction="none",
                     implementation=implementation)
    clean = losses()
    targets[4] = target
    others = torch.arange(9, device=device) != 4
    assert losses()[4].isnan() and torch.equal(losses()[others], clean[others])
    loss, dx, _ = run(linear_cross_entropy, *case, 193, implementation=implementation)
    assert loss.isnan() and dx[4].isnan().all() and dx[others].isfinite().all()


# --- autograd, dtypes, strides --------------------------------------------------------------------

@both
def test_a_weight_in_the_compute_dtype_gets_its_gradient_in_that_dtype(device, implementation):
    x, weight, targets = problem(40, 64, 65, 128, torch.bfloat16, device)
    options = {"implementation": implementation}
    expected = run(linear_cross_entropy, x, weight, targets, 65, **options)
    cast = weight.detach().bfloat16().requires_grad_()
    found = run(linear_cross_entropy, x, cast, targets, 65, **options)
    assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])
    assert torch.equal(found[2], expected[2].bfloat16())


@both
def test_ops_pass_opcheck(device, implementation):
    x, weight, targets = problem(10, 64, 65, 128, torch.float32, device)
    options = 65, implementation, 4096
    torch.library.opcheck(module._loss_and_gradients, (x, weight, targets, *options))
    torch.library.opcheck(module._losses, (x.detach(), weight.detach(), targets, *options))


@pytest.mark.parametrize(("implementation", "backend"), [
    ("triton", "aot_eager"), ("torch", "inductor")])
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method`:DeprecationWarning")  # of inductor
def test_compiles_to_one_graph_with_the_same_results(device, implementation, backend):
    case = problem(40, 64, 65, 128, torch.bfloat16, device)

    def loss(x, weight, targets):
        return 3 * linear_cross_entropy(2 * x, weight, targets, 65, implementation=implementation)

    compiled = torch.compile(loss, fullgraph=True, backend=backend)
    torch.testing.assert_close(run(compiled, *case), run(loss, *case))
    with torch.no_grad():
        evaluated = compiled(*case)
    assert not evaluated.requires_grad
    torch.testing.assert_close(evaluated, loss(*case), rtol=1e-3, atol=0)  # not the hardware's tanh


# --- the plain loss, chunks, refusals, memory -----------------------------------------------------

def test_the_plain_loss_masks_padding_and_bad_targets(device):
    case = x, weight, _ = problem(7, 64, 65, 128, torch.float32, device)
    plain = run(plain_linear_cross_entropy, *case, 65)
    torch.testing.assert_close(plain, tuple(t.float() for t in truth(*case, 65)))
    targets = torch.tensor([-2, 65, 127, 128, -1, 0, 64], device=device)  # from 65 on: padding
    losses = plain_linear_cross_entropy(x, weight, targets, 65, reduction="none")
    assert losses.isnan().tolist() == [True] * 4 + [False] * 3
    assert losses[4] == 0 and (losses[5:] > 0).all()


def test_unsuitable_dtypes_are_refused():
    check_linear_cross_entropy(torch.device("cpu"), torch.bfloat16)
    with pytest.raises(UserError, match="--chunked-ce cannot run"):
        check_linear_cross_entropy(torch.device("cpu"), torch.float16)


@pytest.mark.gpu
def test_transient_memory_stays_within_a_gigabyte_and_the_gradients():
    case = problem(65_536, 768, 32700, 32768, torch.bfloat16, torch.device("cuda"))
    linear_cross_entropy(*case, 32700)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    linear_cross_entropy(*case, 32700)
    gradients = case[0].nbytes + case[1].nbytes
    assert torch.cuda.max_memory_allocated() - before <= (1 << 30) + gradients
