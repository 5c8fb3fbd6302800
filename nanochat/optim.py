"""Muon for the matrices of the blocks, AdamW for the other parameters; state sharded over ranks.

A step reduces gradients, updates weights and gathers them group by group, so that the communication
of one group overlaps with the arithmetic of another. With one rank there are no collectives.
"""

from collections import defaultdict

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

    batch_lr_scale multiplies every learning rate, decay_scale the weight decay of Muon. The
    learning rates of the head and the embeddings are also multiplied by (width/768)^-0.5.
    """
    width_scale = (model.config.n_embd / 768) ** -0.5
    blocks, rest = {}, {}
    for name, parameter in model.named_parameters():
        (blocks if name.startswith("transformer.h.") else rest)[name] = parameter

    def adamw(names, lr, betas, decay):
        parameters = [rest.pop(name) for name in names]
        return {"kind": "adamw", "params": parameters, "lr": lr * batch_lr_scale, "betas": betas,
                "eps": 1e-10, "weight_decay": decay}

    value_names = [name for name in rest if name.startswith("value_embeds.")]
    groups = [
        adamw(["lm_head.weight"], unembedding_lr * width_scale, (0.8, 0.96), 0.01),
        adamw(["transformer.wte.weight"], embedding_lr * width_scale, (0.8, 0.995), 0.001),
        adamw(value_names, 0.5 * embedding_lr * width_scale, (0.8, 0.995), 0.01),
        adamw(["resid_lambdas"], 0.01 * scalar_lr, (0.8, 0.95), 0.05),
        adamw(["x0_lambdas"], scalar_lr, (0.96, 0.95), 0.0),
        adamw(["smear_gate.weight", "smear_lambda", "backout_lambda"], 0.2, (0.8, 0.95), 0.0),
    ]
    assert not rest, f"parameters without a group: {', '.join(rest)}"
    by_shape = defaultdict(list)
    for parameter in blocks.values():
        by_shape[tuple(parameter.shape)].append(parameter)
    for _, parameters in sorted(by_shape.items()):
        groups.append({"kind": "muon", "params": parameters, "lr": matrix_lr * batch_lr_scale,
                       "momentum": 0.95, "beta2": 0.9, "weight_decay": weight_decay * decay_scale})
    for group in groups:
        group["initial_lr"] = group["lr"]
        group["initial_weight_decay"] = group["weight_decay"]
    return groups


class MuonAdamW(torch.optim.Optimizer):
    """Muon and AdamW; each rank holds the state of its share of the parameters.

    matmul_dtype: dtype of Muon's orthogonalisation. compiled: compile the updates. casts: {weight:
    copy} from GPT.keep_casts; such a weight has the gradient of its copy, and `step` writes both.
    `step` averages gradients over ranks, so backward must not. A state dict has the state of one
    rank; `load_shards` reads those of any number of ranks. Muon's weights become views of one
    tensor per shape, so move the model to its device first.
    """

    def __init__(self, groups, ranks=None, matmul_dtype=torch.float32, compiled=False, casts=None):
        self.ranks = ranks or Ranks()
        self.matmul_dtype = matmul_dtype
        self.casts = casts or {}
        self._compiled = {}
        if compiled:
            for function in (muon_direction, muon_update, adamw_updates):
                self._compiled[function] = torch.compile(function, dynamic=False, fullgraph=True)
        super().__init__(groups, defaults={})
        self._stacks = {group["params"][0]: self._stacked(group["params"])
                        for group in self.param_groups if group["kind"] == "muon"}

    def schedule(self, lr_multiplier, muon_momentum, muon_decay_multiplier):
        """Set the learning rates, Muon's momentum and Muon's weight decay of the next step."""
        for group in self.param_groups:
            group["lr"] = group["initial_lr"] * lr_multiplier
            if group["kind"] == "muon":
                group["momentum"] = muon_momentum
                group["weight_decay"] = group["initial_weight_decay"] * muon_decay_multiplier

    @torch.no_grad()
    def accumulate(self):
        """Add the gradients of the copies to fp32 gradients of their weights.

        Call it after every backward pass if a step has several: sums in the copies would be
        rounded.
        """
        for weight, cast in self.casts.items():
            if weight.grad is None:
                weight.grad = cast.grad.to(weight.dtype)
            else:
                weight.grad += cast.grad
            cast.grad = None

    @torch.no_grad()
    def step(self):
        """Update the weights from the gradients, which are kept."""
        self._update()

    @torch.no_grad()
    def warm_up(self):
        """Compile the updates without collectives and without changing weights or state."""
        state, rates = self.state, [group["lr"] for group in self.param_groups]
        self.state = defaultdict(dict)
        for group in self.param_groups:
            group["lr"] = 0.0
        self._update(local=True)
        self.state = state
        for group, rate in zip(self.param_groups, rates, strict=True):
            group["lr"] = rate

    def _update(self, local=False):
        """Update all parameters. local: without collectives, from this rank's gradients only."""
        muon = [group for group in self.param_groups if group["kind"] == "muon"]
        adamw = [(p, group) for group in self.param_groups if group["kind"] == "adamw"
                 for p in group["params"]]
        sharded = [(p, group) for p, group in adamw if self._is_sharded(p)]
        replicated = [(p, group) for p, group in adamw if not self._is_sharded(p)]
        stacks = [self._padded_stack([self._grad(p) for p in group["params"]]) for group in muon]

        means = [self._mean_of_rows(self._grad(p), local) for p, _ in sharded]
        stack_means = [self._mean_of_rows(stack, local) for stack in stacks]
        joint_means = self._joint_means([self._grad(p) for p, _ in replicated], local)
        gathers = []
        for (p, group), mean in zip(sharded, means, strict=True):
            self._update_adamw([(p, group, mean())])
            gathers += self._gather(p.data, self.casts.get(p), local)
        for group, mean in zip(muon, stack_means, strict=True):
            self._update_muon(group, mean())
            gathers += self._gather(*self._stacks[group["params"][0]], local)
        updates = zip(replicated, joint_means, strict=True)
        self._update_adamw([(*pair, mean) for pair, mean in updates])
        for gather in gathers:
            gather.wait()

    def zero_grad(self, set_to_none=True):
        super().zero_grad(set_to_none)
        for cast in self.casts.values():
            cast.grad = None

    # --- saved state and complete weights ---

    def load_state_dict(self, state_dict):
        """Load the state; keep this optimizer's own learning rates, momenta and decays."""
        own = [dict(group) for group in self.param_groups]
        super().load_state_dict(state_dict)
        for group, options in zip(self.param_groups, own, strict=True):
            group.update(options)

    @torch.no_grad()
    def load_shards(self, shards, n_shards):
        """Load optimizer state saved by `n_shards` ranks, reading one shard at a time."""
        state = defaultdict(dict)
        for rank, shard in enumerate(shards):
            saved_groups = shard["param_groups"]
            for group, saved_group in zip(self.param_groups, saved_groups, strict=True):
                for p, index in zip(group["params"], saved_group["params"], strict=True):
                    rows = self._own_range(p, group, self.ranks.rank, self.ranks.world_size)
                    saved_rows = self._own_range(p, group, rank, n_shards)
                    for name, value in shard["state"].get(index, {}).items():
                        _copy_overlap(state[index], name, value, rows, saved_rows)
        self.load_state_dict({"state": state, "param_groups": saved_groups})

    def _own_range(self, p, group, rank, world_size):
        """Return (first, end) of the rows of p whose state a rank holds; matrices for Muon."""
        if group["kind"] == "muon":
            share = -(-len(group["params"]) // world_size)
        elif self._is_sharded(p, world_size):
            share = len(p) // world_size
        else:
            return 0, len(p)
        return rank * share, (rank + 1) * share

    @torch.no_grad()
    def write_casts(self):
        """Recompute the copies; call it after changing weights by other means than `step`."""
        for weight, cast in self.casts.items():
            cast.copy_(weight)

    @torch.no_grad()
    def complete_weights(self):
        """Gather the fp32 weights that have copies; call it on every rank before reading them.

        `step` gathers only the copies, because the model uses only those.
        """
        stacks = [weights for weights, casts in self._stacks.values() if casts is not None]
        tables = [p.data for p in self.casts if self._is_sharded(p)]
        for weights in stacks + tables:
            for gather in self._gather(weights, None):
                gather.wait()

    # --- parts of a step ---

    def _is_sharded(self, p, world_size=None):
        """Return whether an AdamW parameter is split among the ranks."""
        world_size = world_size or self.ranks.world_size
        return world_size > 1 and p.numel() >= SMALL_NUMEL and p.size(0) % world_size == 0

    def _grad(self, p):
        return self.casts[p].grad if p.grad is None else p.grad

    def _mean_of_rows(self, grad, local):
        """Start to average a gradient; return a function that waits and returns own rows."""
        own = self._own_rows(grad)
        if self.ranks.world_size == 1 or local:
            return lambda: own
        mean = torch.empty_like(own)
        averages = dist.get_backend() == "nccl"  # gloo cannot average
        op = dist.ReduceOp.AVG if averages else dist.ReduceOp.SUM
        work = _reduce_scatter(mean, grad, op=op, async_op=True)

        def wait():
            work.wait()
            return mean if averages else mean / self.ranks.world_size

        return wait

    def _joint_means(self, grads, local):
        """Return the complete means of several small gradients, from one fp32 collective."""
        if self.ranks.world_size == 1:
            return grads
        flat = torch.cat([grad.flatten().float() for grad in grads])
        if not local:
            dist.all_reduce(flat)
            flat /= self.ranks.world_size
        parts = flat.split([grad.numel() for grad in grads])
        return [part.view_as(grad) for part, grad in zip(parts, grads, strict=True)]

    def _gather(self, weights, casts, local=False):
        """Start to exchange updated rows of the copies, or of the weights without copies."""
        if self.ranks.world_size == 1 or local:
            return []
        tensor = weights if casts is None else casts
        return [_all_gather(tensor, self._own_rows(tensor), async_op=True)]

    def _own_rows(self, tensor):
        """Return this rank's share of the rows of a tensor, or None for None."""
        if tensor is None:
            return None
        share = len(tensor) // self.ranks.world_size
        return tensor[self.ranks.rank * share : (self.ranks.rank + 1) * share]

    def _update_adamw(self, updates):
        """updates: [(parameter, group, this rank's rows of the mean gradient)]."""
        tensors, numbers = [], []
        for p, group, grad in updates:
            weights, cast = p.data, self.casts.get(p)
            if self._is_sharded(p):
                weights, cast = self._own_rows(weights), self._own_rows(cast)
            state = self.state[p]
            if not state:
                state["step"] = 0
                state["exp_avg"] = torch.zeros_like(weights)
                state["exp_avg_sq"] = torch.zeros_like(weights)
            state["step"] += 1
            beta1, beta2 = group["betas"]
            tensors.append((weights, cast, grad, state["exp_avg"], state["exp_avg_sq"]))
            numbers.append(_scalars(
                group["lr"], beta1, beta2, group["eps"], group["weight_decay"],
                1 - beta1 ** state["step"], 1 - beta2 ** state["step"]))
        self._compiled.get(adamw_updates, adamw_updates)(tensors, numbers)

    def _update_muon(self, group, grad):
        """grad: this rank's matrices of the stack of mean gradients."""
        first = group["params"][0]
        weights, casts = (self._own_rows(stack) for stack in self._stacks[first])
        state = self.state[first]
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
        update = compiled.get(muon_update, muon_update)
        direction = make_direction(grad, state["momentum"], momentum, self.matmul_dtype)
        direction = polar_express(direction)  # not compiled: the BLAS calls fuse the additions
        update(weights, casts, direction, state["second_moment"], lr, beta2, decay)

    def _stacked(self, params):
        """Return the (K, rows, cols) stacks of parameters and of their copies (or None)."""
        copies = [self.casts[p] for p in params] if self.casts else None
        return self._one_storage(params), copies and self._one_storage(copies)

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
    """Copy to state[name], the rows `rows`, the part of them in `saved`, the rows `saved_rows`."""
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
    """Apply `adamw_update` to several parameters in one graph of the compiler."""
    for each, values in zip(tensors, numbers, strict=True):
        adamw_update(*each, *values)


def adamw_update(p, cast, grad, exp_avg, exp_avg_sq, lr, beta1, beta2, eps, weight_decay,
                 bias1, bias2):
    """Apply AdamW (arXiv:1711.05101) in place; all tensors have one shape. cast: p's copy or None.

    The numbers are 0-dim fp32 CPU tensors; bias1 and bias2 are 1 - beta^step. The arithmetic is
    fp32 for every storage dtype.
    """
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
    """Approximate the orthogonal polar factor of each matrix of x (K, rows, cols).

    Spectral norms must be below 1. Iterates odd quintic polynomials (arXiv:2505.16932) in x's dtype
    on the smaller side. The BLAS calls sum in fp32: rounding the products to bf16 first, or adding
    the first term to the polynomial's diagonal, quadruples the error.
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
