"""Muon for the matrices of the blocks, AdamW for the other parameters; state sharded over ranks.

Communication of one part overlaps with the update of another. One rank uses no collectives.
"""

from collections import defaultdict
from typing import NamedTuple

import torch
import torch.distributed as dist

from nanochat.distributed import Ranks

SMALL_NUMEL = 1024  # smaller AdamW parameters are not sharded: every rank updates them
TINY = 1e-10

# Coefficients (a, b, c) of aX + (bA + cA^2)X with A = XX^T, one row per iteration
# (Polar Express, arXiv:2505.16932).
POLAR_EXPRESS = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)

# torch 2.13 deprecates the names that are the only ones in 2.11
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


def parameter_groups(model, *, embedding_lr=0.3, unembedding_lr=0.008, matrix_lr=0.02,
                     scalar_lr=0.5, weight_decay=0.28, batch_lr_scale=1.0, decay_scale=1.0):
    """Return the optimizer's groups for a GPT; Muon has one group per matrix shape.

    batch_lr_scale multiplies every learning rate, decay_scale the weight decay of Muon.
    """
    width_scale = (model.config.n_embd / 768) ** -0.5
    smear_and_backout = [model.smear_gate.weight, model.smear_lambda, model.backout_lambda]
    groups = [{"kind": "adamw", "params": list(params), "lr": lr * batch_lr_scale, "betas": betas,
               "eps": 1e-10, "weight_decay": decay} for params, lr, betas, decay in (
        (model.lm_head.parameters(), unembedding_lr * width_scale, (0.8, 0.96), 0.01),
        (model.transformer.wte.parameters(), embedding_lr * width_scale, (0.8, 0.995), 0.001),
        (model.value_embeds.parameters(), 0.5 * embedding_lr * width_scale, (0.8, 0.995), 0.01),
        ([model.resid_lambdas], 0.01 * scalar_lr, (0.8, 0.95), 0.05),
        ([model.x0_lambdas], scalar_lr, (0.96, 0.95), 0.0),
        (smear_and_backout, 0.2, (0.8, 0.95), 0.0),
    )]
    by_shape = defaultdict(list)
    for p in model.transformer.h.parameters():
        by_shape[tuple(p.shape)].append(p)
    for _, params in sorted(by_shape.items()):
        groups.append({"kind": "muon", "params": params, "lr": matrix_lr * batch_lr_scale,
                       "momentum": 0.95, "beta2": 0.9, "weight_decay": weight_decay * decay_scale})
    for group in groups:
        group["initial_lr"] = group["lr"]
        group["initial_weight_decay"] = group["weight_decay"]
    return groups


class Part(NamedTuple):
    """Weights that are updated together: an AdamW parameter, or Muon's matrices of one shape."""

    group: dict
    params: list  # the optimizer state is that of the first
    weights: torch.Tensor  # of Muon (K, rows, cols), padded with zeros to a multiple of the ranks
    casts: torch.Tensor | None  # copies of the weights in the compute dtype
    is_muon: bool

    def is_sharded(self, world_size):
        """Return whether each rank holds the state of a share of the rows or matrices."""
        n_rows = len(self.weights)
        is_large = self.weights.numel() >= SMALL_NUMEL
        return self.is_muon or (world_size > 1 and is_large and n_rows % world_size == 0)

    def rows_of(self, rank, world_size):
        """Return (first, end) of the rows or matrices whose state a rank of several holds."""
        n_rows = len(self.params) if self.is_muon else len(self.weights)
        if not self.is_sharded(world_size):
            return 0, n_rows
        share = -(-n_rows // world_size)
        return rank * share, (rank + 1) * share


class MuonAdamW(torch.optim.Optimizer):
    """Muon and AdamW; each rank holds the state of its share of the parameters.

    matmul_dtype: dtype of Muon's orthogonalisation. casts: {weight: copy} from GPT.keep_casts; such
    a weight has the gradient of its copy, and `step` writes both. `step` averages gradients over
    ranks. Muon's weights become views of one tensor per shape: move the model to its device first.
    """

    def __init__(self, groups, ranks=None, matmul_dtype=torch.float32, compiled=False, casts=None):
        self.ranks = ranks or Ranks()
        self.matmul_dtype = matmul_dtype
        self.casts = casts or {}
        self._communicates = self.ranks.world_size > 1
        self._compiled = {}
        if compiled:
            for function in (muon_direction, muon_update, adamw_updates):
                self._compiled[function] = torch.compile(function, dynamic=False, fullgraph=True)
        super().__init__(groups, defaults={})
        self._parts = [part for group in self.param_groups for part in self._parts_of(group)]

    def _parts_of(self, group):
        params, casts = group["params"], None
        if group["kind"] == "adamw":
            return [Part(group, [p], p.data, self.casts.get(p), False) for p in params]
        if self.casts:
            casts = self._one_storage([self.casts[p] for p in params])
        return [Part(group, params, self._one_storage(params), casts, True)]

    def schedule(self, lr_multiplier, muon_momentum, muon_decay_multiplier):
        """Set the learning rates, Muon's momentum and Muon's weight decay of the next step."""
        for group in self.param_groups:
            group["lr"] = group["initial_lr"] * lr_multiplier
            if group["kind"] == "muon":
                group["momentum"] = muon_momentum
                group["weight_decay"] = group["initial_weight_decay"] * muon_decay_multiplier

    @torch.no_grad()
    def accumulate(self):
        """Add the copies' gradients to fp32 ones, after each of several backward passes."""
        for weight, cast in self.casts.items():
            if weight.grad is None:
                weight.grad = cast.grad.to(weight.dtype)
            else:
                weight.grad += cast.grad
            cast.grad = None

    @torch.no_grad()
    def step(self):
        """Update the weights from the gradients, which are kept."""
        world_size = self.ranks.world_size
        sharded = [part for part in self._parts if part.is_sharded(world_size)]
        replicated = [part for part in self._parts if not part.is_sharded(world_size)]
        means = [self._start_mean(self._gradient(part)) for part in sharded]
        joint_means = self._joint_means([self._gradient(part) for part in replicated])
        gathers = []
        for part, mean in zip(sharded, means, strict=True):
            if part.is_muon:
                self._update_muon(part, mean())
            else:
                self._update_adamw([part], [mean()])
            gathers += self._start_gather(part.weights if part.casts is None else part.casts)
        self._update_adamw(replicated, joint_means)
        for gather in gathers:
            gather.wait()

    @torch.no_grad()
    def warm_up(self):
        """Compile the updates; change no weights or state. Call `schedule` before the next step."""
        state, communicates = self.state, self._communicates
        self.state, self._communicates = defaultdict(dict), False
        self.schedule(0.0, 0.0, 0.0)
        self.step()
        self.state, self._communicates = state, communicates

    def zero_grad(self, set_to_none=True):
        super().zero_grad(set_to_none)
        for cast in self.casts.values():
            cast.grad = None

    # --- saved state and complete weights ---

    def load_state_dict(self, state_dict):
        """Load the state; keep this optimizer's own learning rates, momenta and decays."""
        own_groups = self.param_groups
        super().load_state_dict(state_dict)
        self.param_groups = own_groups

    @torch.no_grad()
    def load_shards(self, shards, n_shards):
        """Load optimizer state saved by `n_shards` ranks, reading one shard at a time."""
        state = defaultdict(dict)
        for rank, shard in enumerate(shards):
            index = 0  # state dicts number the parameters
            for part in self._parts:
                rows = part.rows_of(self.ranks.rank, self.ranks.world_size)
                saved_rows = part.rows_of(rank, n_shards)
                for name, value in shard["state"].get(index, {}).items():
                    _copy_overlap(state[index], name, value, rows, saved_rows)
                index += len(part.params)
        self.load_state_dict({"state": state, "param_groups": shard["param_groups"]})

    @torch.no_grad()
    def write_casts(self):
        """Recompute the copies; call it after changing weights by other means than `step`."""
        for weight, cast in self.casts.items():
            cast.copy_(weight)

    @torch.no_grad()
    def complete_weights(self):
        """Gather the fp32 weights of which `step` gathers only copies; call it on every rank."""
        for part in self._parts:
            if part.casts is not None and part.is_sharded(self.ranks.world_size):
                for gather in self._start_gather(part.weights):
                    gather.wait()

    # --- parts of a step ---

    def _gradient(self, part):
        grads = [self.casts[p].grad if p.grad is None else p.grad for p in part.params]
        return self._padded_stack(grads) if part.is_muon else grads[0]

    def _start_mean(self, grad):
        """Start to average a gradient; return a function that waits and returns own rows."""
        own = self._own_rows(grad)
        if not self._communicates:
            return lambda: own
        mean = torch.empty_like(own)
        averages = dist.get_backend() == "nccl"  # gloo cannot average
        op = dist.ReduceOp.AVG if averages else dist.ReduceOp.SUM
        work = _reduce_scatter(mean, grad, op=op, async_op=True)

        def wait():
            work.wait()
            return mean if averages else mean / self.ranks.world_size

        return wait

    def _joint_means(self, grads):
        """Return the complete means of several small gradients, from one fp32 collective."""
        if self.ranks.world_size == 1:
            return grads
        flat = torch.cat([grad.flatten().float() for grad in grads])
        if self._communicates:
            dist.all_reduce(flat)
            flat /= self.ranks.world_size
        parts = flat.split([grad.numel() for grad in grads])
        return [part.view_as(grad) for part, grad in zip(parts, grads, strict=True)]

    def _start_gather(self, tensor):
        """Start to exchange the updated rows of a tensor; return what to wait for."""
        if not self._communicates:
            return []
        return [_all_gather(tensor, self._own_rows(tensor), async_op=True)]

    def _own_rows(self, tensor):
        """Return this rank's share of the rows of a tensor, or None for None."""
        return tensor if tensor is None else tensor.chunk(self.ranks.world_size)[self.ranks.rank]

    def _update_adamw(self, parts, grads):
        """grads: this rank's rows of the mean gradients."""
        tensors, numbers = [], []
        for part, grad in zip(parts, grads, strict=True):
            group, weights, casts = part.group, part.weights, part.casts
            if part.is_sharded(self.ranks.world_size):
                weights, casts = self._own_rows(weights), self._own_rows(casts)
            state = self.state[part.params[0]]
            if not state:
                state["step"] = 0
                state["exp_avg"] = torch.zeros_like(weights)
                state["exp_avg_sq"] = torch.zeros_like(weights)
            state["step"] += 1
            beta1, beta2 = group["betas"]
            tensors.append((weights, casts, grad, state["exp_avg"], state["exp_avg_sq"]))
            numbers.append(_scalars(
                group["lr"], beta1, beta2, group["eps"], group["weight_decay"],
                1 - beta1 ** state["step"], 1 - beta2 ** state["step"]))
        self._compiled.get(adamw_updates, adamw_updates)(tensors, numbers)

    def _update_muon(self, part, grad):
        """grad: this rank's matrices of the stack of mean gradients."""
        weights, casts = self._own_rows(part.weights), self._own_rows(part.casts)
        group, state = part.group, self.state[part.params[0]]
        n, rows, cols = weights.shape
        if not state:
            state["momentum"] = torch.zeros_like(weights)
            lines = (n, rows, 1) if rows >= cols else (n, 1, cols)
            state["second_moment"] = weights.new_zeros(lines)
        lr = group["lr"] * max(1.0, rows / cols) ** 0.5
        lr, momentum, beta2, decay = _scalars(
            lr, group["momentum"], group["beta2"], group["weight_decay"])
        # inductor 2.13 fails on matrices of one row; on a CPU small matrices gain nothing
        worthwhile = rows > 1 and (weights.is_cuda or rows * cols >= SMALL_NUMEL)
        compiled = self._compiled if worthwhile else {}
        make_direction = compiled.get(muon_direction, muon_direction)
        direction = make_direction(grad, state["momentum"], momentum, self.matmul_dtype)
        direction = polar_express(direction)  # not compiled: the BLAS calls fuse the additions
        update = compiled.get(muon_update, muon_update)
        update(weights, casts, direction, state["second_moment"], lr, beta2, decay)

    def _one_storage(self, tensors):
        """Return the stack of tensors, which become views of it."""
        stack = self._padded_stack([tensor.data for tensor in tensors])
        for tensor, matrix in zip(tensors, stack, strict=False):
            tensor.data = matrix
        return stack

    def _padded_stack(self, tensors):
        """Return (K, rows, cols), padded with zero matrices to a multiple of the ranks."""
        missing = range(-len(tensors) % self.ranks.world_size)
        return torch.stack([*tensors, *(torch.zeros_like(tensors[0]) for _ in missing)])


def _copy_overlap(state, name, saved, rows, saved_rows):
    """Copy to state[name], which has the rows `rows`, those that `saved` has of `saved_rows`."""
    if not torch.is_tensor(saved):  # AdamW's step count
        state[name] = saved
        return
    (first, end), (saved_first, saved_end) = rows, saved_rows
    if name not in state:
        state[name] = saved.new_zeros((end - first, *saved.shape[1:]))
    low, high = max(first, saved_first), min(end, saved_end)
    if low < high:
        state[name][low - first : high - first] = saved[low - saved_first : high - saved_first]


def _scalars(*numbers):
    """Return 0-dim fp32 CPU tensors: their values can change without recompilation."""
    return [torch.tensor(float(number)) for number in numbers]


# --- the arithmetic of the updates ----------------------------------------------------------------

def adamw_updates(tensors, numbers):
    """Apply AdamW (arXiv:1711.05101) in place to several parameters, in one graph of the compiler.

    tensors: (parameter, its copy or None, gradient, exp_avg, exp_avg_sq) of each. numbers: 0-dim
    tensors, the last 1 - beta^step. The arithmetic is fp32 for every storage dtype.
    """
    for (p, cast, grad, exp_avg, exp_avg_sq), values in zip(tensors, numbers, strict=True):
        lr, beta1, beta2, eps, weight_decay, bias1, bias2 = values
        g, w = grad.float(), p.float()
        m = torch.lerp(exp_avg.float(), g, 1 - beta1)
        v = torch.lerp(exp_avg_sq.float(), g * g, 1 - beta2)
        w = w * (1 - lr * weight_decay) - lr * (m / bias1) / ((v / bias2).sqrt() + eps)
        exp_avg.copy_(m)
        exp_avg_sq.copy_(v)
        p.copy_(w)
        if cast is not None:
            cast.copy_(w)


def muon_direction(grad, momentum_buffer, momentum, dtype):
    """Return the input of Muon's orthogonalisation in `dtype`; update the momentum buffer in place.

    For each matrix with gradient g, buffer b and momentum m:

        b <- m b + (1 - m) g,    n = (1 - m) g + m b       Nesterov momentum
        r_i = n_i sqrt(mean_j |n_j|^2) / |n_i|             give every row the rms norm of all rows
        result r / (1.01 |r|_F + 1e-6)                     spectral norm below 1

    grad and the fp32 buffer are (K, rows, cols), momentum is a 0-dim fp32 tensor.
    """
    grad = grad.float()
    momentum_buffer.copy_(torch.lerp(momentum_buffer, grad, 1 - momentum))
    nesterov = torch.lerp(grad, momentum_buffer, momentum)
    row_power = nesterov.square().sum(dim=-1, keepdim=True)  # (K, rows, 1); gives all norms below
    mean_power = row_power.mean(dim=-2, keepdim=True)
    row_scale = (mean_power / row_power.clamp_min(TINY**2)).sqrt()
    frobenius_norm = (row_power * row_scale.square()).sum(dim=-2, keepdim=True).sqrt()
    return (nesterov * (row_scale / (1.01 * frobenius_norm + 1e-6))).to(dtype)


def muon_update(p, cast, update, second_moment, lr, beta2, weight_decay):
    """Update p (K, rows, cols) fp32 and `cast`, its copy or None, from orthogonalised updates u.

        u <- u sqrt(min(rows, cols)) / |u|_F               norm of an orthogonal matrix
        s_i <- beta2 s_i + (1 - beta2) mean(u_i^2)         second moment of row i (column if wide)
        u_i <- u_i / sqrt(s_i), rescaled to the old norm   NorMuon, arXiv:2510.05491
        p <- p - lr (u + weight_decay p [u p >= 0])        decay only where u and p agree in sign

    second_moment, (K, rows, 1) or (K, 1, cols), is updated in place; the numbers are 0-dim tensors.
    """
    rows, cols = p.shape[-2:]
    lines, within = (-2, -1) if rows >= cols else (-1, -2)
    update = update.float()
    power = update.square().mean(dim=within, keepdim=True)  # of each row, or column if wide
    mean_power = power.mean(dim=lines, keepdim=True).clamp_min(TINY**2)
    to_norm = (min(rows, cols) / p[0].numel() / mean_power).sqrt()
    power = power * to_norm.square()
    second_moment.copy_(torch.lerp(second_moment, power, 1 - beta2))
    line_scale = second_moment.clamp_min(TINY).rsqrt()
    after = (power * line_scale.square()).mean(dim=lines, keepdim=True)
    keep_norm = (power.mean(dim=lines, keepdim=True) / after.clamp_min(TINY**2)).sqrt()
    update = update * (to_norm * line_scale * keep_norm)
    agree = (update * p >= 0).to(p.dtype)
    new = p - lr * (update + weight_decay * p * agree)
    p.copy_(new)
    if cast is not None:
        cast.copy_(new)


def polar_express(x):
    """Approximate the orthogonal polar factor of each matrix of x (K, rows, cols), norm below 1.

    Iterates polynomials (arXiv:2505.16932) in x's dtype on the smaller side. The BLAS calls sum in
    fp32: rounding the products to bf16 first quadruples the error.
    """
    tall = x.size(-2) > x.size(-1)
    for a, b, c in POLAR_EXPRESS:
        gram = x.mT @ x if tall else x @ x.mT
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        left, right = (x, polynomial) if tall else (polynomial, x)
        x = torch.baddbmm(x, left, right, beta=a)
    return x


def polar_express_flops(rows, cols):
    """Return the FLOPs of `polar_express` for one matrix: three products per iteration."""
    small, large = sorted((rows, cols))
    return len(POLAR_EXPRESS) * (4 * small * small * large + 2 * small**3)
