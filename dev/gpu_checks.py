"""Whether the kernels, fp8, attention, the compiled model and the optimizer are right on a GPU.

dev/gpu_day.py runs these checks; in a dry run on a CPU the Triton kernels run in the interpreter.
"""

import os
import tempfile
from functools import partial
from pathlib import Path

import torch

from dev.bench.measure import percentiles, time_interleaved
from dev.bench.variants import sliced_loss, triton_chunks
from nanochat import plan
from nanochat.attention import causal_attention
from nanochat.common import runs_dir
from nanochat.device import device_name, keep_freed_memory
from nanochat.fp8 import E4M3, E5M2, train_in_fp8
from nanochat.gpt import GPT, GPTConfig
from nanochat.kernels.embedding import lookup
from nanochat.kernels.linear_cross_entropy import SOFTCAP, linear_cross_entropy
from nanochat.optim import MuonAdamW, parameter_groups
from nanochat.runlog import read_run
from nanochat.tokenizer import SPECIAL_TOKENS, Tokenizer
from scripts.base_train import main as train

TANH_ERROR = 2.0**-11  # relative error of the hardware's tanh
BF16_ERROR = 2.0**-8  # largest relative error of one rounding
NOT_ON_CPU = "not run on a CPU"


class Lab:
    """The device of the measurements, and sizes for it: a GPU, or in a dry run a CPU."""

    def __init__(self, dry_run):
        self.dry_run, self.dtype = dry_run, torch.bfloat16
        self.device = torch.device("cpu" if dry_run else "cuda")
        keep_freed_memory(self.device)
        name = "" if dry_run else device_name(self.device).lower()
        self.gpu = next((gpu for key, gpu in plan.GPUS.items() if key in name), plan.GPUS["h200"])

    def pick(self, full, tiny):
        """Return the size for a GPU, or that for a dry run."""
        return tiny if self.dry_run else full

    def compiled(self, function):
        backend = self.pick("inductor", "eager")
        return torch.compile(function, fullgraph=True, dynamic=False, backend=backend)

    def normal(self, *shape, scale=1.0, seed=0):
        generator = torch.Generator(self.device).manual_seed(seed)
        values = scale * torch.randn(shape, device=self.device, generator=generator)
        return values.to(self.dtype).requires_grad_()

    def zipf(self, *shape, vocab_size=32768):
        """Return token ids; of 32,768, the most frequent one has 4 % of the positions."""
        weights = 1 / (torch.arange(vocab_size, device=self.device) + 2.7)
        n_tokens = torch.Size(shape).numel()
        return torch.multinomial(weights, n_tokens, replacement=True).view(shape)

    def synchronize(self):
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def median_ms(self, functions):
        """Return {name: median milliseconds} of functions that are timed in turn."""
        times = time_interleaved(functions, self.pick(15, 1), self.device, self.pick(3, 1))
        return {name: percentiles(values)[0] for name, values in times.items()}


# --- correctness ----------------------------------------------------------------------------------

def error(value, truth):
    """Return the relative error in the Frobenius norm."""
    value, truth = value.detach().double(), truth.detach().double()
    return ((value - truth).norm() / truth.norm()).item()


def in_one_line(reason):
    return f"failed: {type(reason).__name__}: {' '.join(str(reason).split())[:300]}"


def verdict(name, found, limit):
    """Return the row of a check: an error and whether it is within the limit (NaN is not)."""
    result = "ok" if found <= limit else "WRONG"
    return name, found, "relative error", f"{result}, limit {limit:.2g}"


def correctness(lab):
    checks = {
        "loss, V 32768": partial(_check_loss, lab, lab.pick((1000, 768, 32768), (9, 32, 64))),
        "loss, V 50257": partial(_check_loss, lab, lab.pick((1000, 768, 50257), (9, 32, 50))),
        "loss, N V > 2^31": partial(_check_huge_loss, lab),
        "embedding": partial(_check_embedding, lab), "fp8 linear": partial(_check_fp8, lab),
        "window 512": partial(_check_window, lab),
        "optimizer step": partial(_check_optimizer, lab),
        **{f"compiled d2, {name}": partial(_check_model, lab, flags, fp8) for name, flags, fp8 in (
            ("no flags", {}, False), ("fp8", {}, True), ("chunked", {"chunked_ce": True}, False))},
    }
    for name, check in checks.items():
        try:
            for detail, *others in check():
                yield (f"{name}: {detail}", *others)
        except Exception as reason:  # the other checks are worth as much
            yield name, "", "", in_one_line(reason)


def tanh_floors(x, weight, targets, vocab_size):
    """Return limits of the relative errors of (loss, dx, dW) that an error of tanh can cause.

    With t = tanh(a / c)(1 + d), |d| <= e = 2^-11, p = softmax(c t) and y the target, to first order

        |change of the loss| <= e (sum_j p_j c|t_j| + c|t_y|)
        |change of d loss / d a_j| <= e (p_j (c|t_j| + sum_k p_k c|t_k|)(1 - t_j^2)
                                         + 2 |p_j - [j = y]| t_j^2)

    The last term is the cancellation in 1 - t^2 at large logits. A change D of the logits'
    gradient changes dx = D W by at most |D|_F |W|_2, and dW = D^T x alike. Every target is valid.
    """
    x, weight = x.detach().double(), weight.detach()[:vocab_size].to(x.dtype).double()
    t = torch.tanh(x @ weight.T / SOFTCAP)
    p = torch.softmax(SOFTCAP * t, dim=1)
    size, rows = SOFTCAP * t.abs(), torch.arange(len(x), device=x.device)
    mean_size = (p * size).sum(1, keepdim=True)
    in_loss = TANH_ERROR * (mean_size[:, 0] + size[rows, targets]).mean()
    loss = -torch.log(p[rows, targets]).mean()
    residual = p.clone()
    residual[rows, targets] -= 1
    slope = 1 - t * t
    bound = TANH_ERROR * (p * (size + mean_size) * slope + 2 * residual.abs() * t * t)
    gradient = residual * slope
    limits = [(in_loss / loss).item()]
    for other, product in ((weight, gradient @ weight), (x, gradient.T @ x)):
        largest_gain = torch.linalg.eigvalsh(other.T @ other)[-1].sqrt()
        limits.append((bound.norm() * largest_gain / product.norm()).item())
    return limits


def loss_case(lab, n_rows, width, vocab_size):
    padded = GPTConfig(vocab_size=vocab_size).padded_vocab_size
    x, weight = lab.normal(n_rows, width), lab.normal(padded, width, scale=3 * width**-0.5, seed=1)
    return x, weight, lab.zipf(n_rows, vocab_size=vocab_size)


def with_gradients(loss, x, weight, *others):
    value = loss(x, weight, *others)
    return value, *torch.autograd.grad(value, (x, weight))


def _check_loss(lab, shape):
    """Compare the rows kernel with fp64; the plain loss in bf16 is the measure."""
    x, weight, targets = loss_case(lab, *shape)
    case, others = (x, weight), (targets, shape[2])
    exact = [tensor.detach().double().requires_grad_() for tensor in case]
    results = [with_gradients(loss, *tensors, *others) for loss, tensors in (
        (triton_chunks, case), (sliced_loss, case), (sliced_loss, exact))]
    names, floors = ("loss", "dx", "dW"), tanh_floors(*case, *others)
    for name, ours, theirs, truth, floor in zip(names, *results, floors, strict=True):
        yield verdict(name, error(ours, truth), 1.5 * error(theirs, truth) + floor + 1e-6)


def _check_huge_loss(lab):
    """One chunk with more than 2^31 logits; its last rows are compared with fp64."""
    n_rows, width, vocab_size = lab.pick((65_600, 128, 32768), (40, 32, 64))
    last = slice(n_rows - 16, n_rows)
    x, weight, targets = loss_case(lab, n_rows, width, vocab_size)
    others = {"implementation": "triton", "chunk_bytes": 2 * n_rows * vocab_size}
    loss = linear_cross_entropy(x, weight, targets, vocab_size, **others)
    dx = torch.autograd.grad(loss, x)[0][last] * (n_rows / 16)
    some = x.detach()[last].requires_grad_()
    exact = [tensor.detach().double().requires_grad_() for tensor in (some, weight)]
    (_, plain, _), (_, truth, _) = (
        with_gradients(sliced_loss, *pair, targets[last], vocab_size)
        for pair in ((some, weight), exact))
    floor = tanh_floors(some, weight, targets[last], vocab_size)[1]
    yield verdict("dx", error(dx, truth), 1.5 * error(plain, truth) + floor)


def _check_embedding(lab):
    if lab.dry_run:
        yield "gradient", "", "", NOT_ON_CPU
        return
    ids, table, upstream = lab.zipf(16, 2048), lab.normal(32768, 1536), lab.normal(16, 2048, 1536)
    grads = [torch.autograd.grad(lookup(ids, 32768)(table), table, upstream)[0] for _ in range(2)]
    exact = torch.zeros_like(table, dtype=torch.float64)
    exact.index_add_(0, ids.flatten(), upstream.detach().flatten(0, 1).double())
    yield verdict("gradient", error(grads[0], exact), BF16_ERROR)
    yield verdict("gradient, second time", error(grads[1], grads[0]), 0.0)


def _check_fp8(lab):
    """Compare with fp64 products of operands rounded on the CPU."""
    width, n_tokens = lab.pick((768, 4096), (128, 32))
    model = GPT(GPTConfig(64, 256, 1, width // 64, width // 64, width), lab.dtype)
    model.init_weights(0)
    model.to(lab.device)
    optimizer = MuonAdamW(parameter_groups(model), matmul_dtype=lab.dtype,
                          casts=model.keep_casts())
    train_in_fp8(model, optimizer, compiled=False)
    layer = model.transformer.h[0].mlp.c_fc
    x, upstream = lab.normal(n_tokens, width), lab.normal(n_tokens, 4 * width, scale=1e-6, seed=1)
    out = layer(x)
    results = out, *torch.autograd.grad(out, (x, layer.cast), upstream)

    def rounded(tensor, dtype):
        values = tensor.detach().double().cpu()
        scale = values.abs().max() / torch.finfo(dtype).max
        return (values / scale).float().to(dtype).double().to(lab.device) * scale.item()

    x8, w8, g8 = rounded(x, E4M3), rounded(layer.cast, E4M3), rounded(upstream, E5M2)
    x, w, g = (tensor.detach().double() for tensor in (x, layer.cast, upstream))
    exact, full = ((a @ b.T, c @ b, c.T @ a) for a, b, c in ((x8, w8, g8), (x, w, g)))
    for name, ours, truth, unrounded in zip(("y", "dx", "dW"), results, exact, full, strict=True):
        yield verdict(name, error(ours, truth), BF16_ERROR)
        yield f"{name} against unrounded operands", error(ours, unrounded), "relative error", ""


def _check_window(lab):
    rows, length, heads, window = lab.pick((2, 2048, 4, 512), (1, 64, 2, 16))
    tensors = [lab.normal(rows, length, heads, 64, seed=seed) for seed in range(4)]

    def attend(backend, q, k, v, upstream):
        out = causal_attention(q, k, v, window, backend)
        return out, *torch.autograd.grad(out, (q, k, v), upstream)

    exact = [tensor.detach().double().requires_grad_() for tensor in tensors]
    results = [attend("blockwise", *exact), attend("sdpa", *tensors),
               attend(lab.pick("varlen", "blockwise"), *tensors)]
    for name, truth, masked, windowed in zip("oqkv", *results, strict=True):
        limit = 1.5 * error(masked, truth) + BF16_ERROR / 4
        yield verdict(name if name == "o" else f"d{name}", error(windowed, truth), limit)


def _small_model(lab, dtype, **flags):
    length, width = lab.pick((2048, 256), (32, 128))
    config = GPTConfig(length, 1024, 2, width // 64, width // 64, width, "SL")
    model = GPT(config, dtype, **flags)
    model.init_weights(0)
    return model.to(lab.device)


def _check_model(lab, flags, fp8):
    """Compare compiled and eager bf16 with eager fp32; the eager one is the measure."""
    tokens = lab.zipf(2, lab.pick(2048, 32) + 1, vocab_size=1024)
    results = []
    for dtype, compiled, options in ((torch.float32, False, {}), (lab.dtype, False, {}),
                                     (lab.dtype, True, flags)):
        model = _small_model(lab, dtype, **options)
        optimizer = MuonAdamW(parameter_groups(model), casts=model.keep_casts())
        if fp8 and dtype == lab.dtype:
            train_in_fp8(model, optimizer, compiled=False)
        forward = lab.compiled(model) if compiled else model
        loss = forward(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())
        loss.backward()
        trained = [optimizer.casts.get(p, p) for p in model.parameters()]
        results.append((loss, torch.cat([p.grad.flatten().float() for p in trained])))
    for name, truth, eager, ours in zip(("loss", "gradients"), *results, strict=True):
        yield verdict(name, error(ours, truth), 1.5 * error(eager, truth) + 2 * TANH_ERROR)


def _check_optimizer(lab):
    """Compare the change of all weights, compiled and eager in bf16, with that in eager fp32."""
    changes = []
    for dtype, compiled in ((torch.float32, False), (lab.dtype, False), (lab.dtype, True)):
        model = _small_model(lab, dtype)
        model.load_state_dict(_small_model(lab, lab.dtype).state_dict())
        optimizer = MuonAdamW(parameter_groups(model), matmul_dtype=dtype,
                              compiled=compiled and not lab.dry_run, casts=model.keep_casts())
        before = [p.detach().double() for p in model.parameters()]
        for seed, p in enumerate(model.parameters()):
            trained = optimizer.casts.get(p, p)
            trained.grad = lab.normal(*p.shape, seed=seed).detach().to(trained.dtype)
        optimizer.step()
        pairs = zip(model.parameters(), before, strict=True)
        changes.append(torch.cat([(p.detach() - old).flatten() for p, old in pairs]))
    limit = 1.5 * error(changes[1], changes[0]) + BF16_ERROR
    yield verdict("change of the weights", error(changes[2], changes[0]), limit)


def trainer(lab):
    """Run scripts.base_train on made text, save, and resume: losses must repeat."""
    with tempfile.TemporaryDirectory() as name:
        os.environ["NANOCHAT_BASE_DIR"] = f"{name}/cache"
        text = Path(name) / "text"
        text.mkdir()
        special = {token: 256 + i for i, token in enumerate(SPECIAL_TOKENS)}
        Tokenizer({bytes([i]): i for i in range(256)}, special).save(name)
        for number, ids in enumerate(lab.zipf(lab.pick(500, 20), 100, vocab_size=5000).tolist()):
            document = " ".join(f"word{i}" for i in ids)
            (text / f"{number}.txt").write_text(document, encoding="utf-8")
        width, length, batch = lab.pick((128, 512, 4096), (32, 32, 128))
        flags = ["--dataset", text, "--tokenizer-dir", name, "--depth", 2, "--head-dim", width,
                 "--aspect-ratio", width // 2, "--max-seq-len", length, "--device-batch-size", 2,
                 "--total-batch-size", batch, "--num-iterations", 6, "--save-every", 3,
                 "--eval-every", 3, "--eval-tokens", batch, "--core-metric-every", -1,
                 "--sample-every", -1, "--device-type", lab.device.type, "--run-id", "gpu-day",
                 *["--no-compile"] * lab.dry_run]
        results = []
        for more in ([], ["--resume-from-step", 3]):
            if train([str(word) for word in (*flags, *more)]):
                raise RuntimeError("base_train failed")
            events = read_run(runs_dir() / "gpu-day").of("train")
            results.append({event["step"]: event["loss"] for event in events}[6])
    yield "loss of step 6", results[0], "nats", ""
    yield verdict("step 6, resumed at step 3", abs(results[1] / results[0] - 1), 1e-3)
