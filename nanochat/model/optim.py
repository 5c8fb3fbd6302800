"""Muon for the blocks' matrices, AdamW for the rest, the state of both sharded over ranks.

Every step reduces gradients, updates and gathers group by group, so that communication of one group
runs beside the arithmetic of another. With one rank the same code runs without the collectives.
"""

import torch
import torch.distributed as dist

from nanochat.ranks import Ranks

# Coefficients a, b, c of aX + (bA + cA^2)X, A = XX^T, one row an iteration (Polar Express, arXiv:2505.16932).
POLAR_EXPRESS = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)
SMALL_NUMEL = 1024  # smaller tensors are updated by every rank, uncompiled
TINY = 1e-10

# torch 2.13 warns about the names that 2.11 knows alone
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


def parameter_groups(model, *, embedding_lr=0.3, unembedding_lr=0.008, matrix_lr=0.02, scalar_lr=0.5,
                     weight_decay=0.28, batch_lr_scale=1.0, decay_scale=1.0):
    """The optimizer's groups for a GPT; every lr is multiplied by `batch_lr_scale`, Muon's decay by `decay_scale`.

    The lrs of head and embeddings also scale as (width/768)^-0.5. One Muon group for each matrix shape.
    """
    width_scale = (model.config.n_embd / 768) ** -0.5
    blocks, rest = {}, {}
    for name, parameter in model.named_parameters():
        (blocks if name.startswith("transformer.h.") else rest)[name] = parameter

    def adamw(names, lr, betas, decay):
        return {"kind": "adamw", "params": [rest.pop(name) for name in names], "lr": lr * batch_lr_scale,
                "betas": betas, "eps": 1e-10, "weight_decay": decay}

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
    for shape in sorted({tuple(parameter.shape) for parameter in blocks.values()}):
        same_shape = [parameter for parameter in blocks.values() if tuple(parameter.shape) == shape]
        groups.append({"kind": "muon", "params": same_shape, "lr": matrix_lr * batch_lr_scale, "momentum": 0.95,
                       "beta2": 0.9, "weight_decay": weight_decay * decay_scale})
    for group in groups:
        group["initial_lr"] = group["lr"]
        group["initial_weight_decay"] = group["weight_decay"]
    return groups


class MuonAdamW(torch.optim.Optimizer):
    """The optimizer. `matmul_dtype` is that of Muon's orthogonalisation; `compiled` fuses the updates.

    Gradients are averaged over ranks by `step`; backward must not reduce them. Each rank keeps the
    state of its share of the parameters alone, so a state dict belongs to one rank of one world size.
    """

    def __init__(self, groups, ranks=None, matmul_dtype=torch.float32, compiled=False):
        self.ranks, self.matmul_dtype = ranks or Ranks(), matmul_dtype
        self._fused = {}
        if compiled:  # AdamW sees flat tensors of many lengths, Muon a handful of matrix shapes
            self._fused = {adamw_update: torch.compile(adamw_update, dynamic=True, fullgraph=True),
                           muon_direction: torch.compile(muon_direction, dynamic=False, fullgraph=True),
                           muon_update: torch.compile(muon_update, dynamic=False, fullgraph=True)}
        super().__init__(groups, defaults={})

    def schedule(self, lr_multiplier, muon_momentum, muon_decay_multiplier):
        """Set this step's learning rates, Muon's momentum and Muon's decay (as a factor of the initial one)."""
        for group in self.param_groups:
            group["lr"] = group["initial_lr"] * lr_multiplier
            if group["kind"] == "muon":
                group["momentum"] = muon_momentum
                group["weight_decay"] = group["initial_weight_decay"] * muon_decay_multiplier

    @torch.no_grad()
    def step(self):
        """One update from the parameters' `.grad` (which stay as they are)."""
        start = {"adamw": self._reduce_adamw, "muon": self._reduce_muon}
        finish = {"adamw": self._update_adamw, "muon": self._update_muon}
        reduced = [start[group["kind"]](group) for group in self.param_groups]
        gathered = [finish[group["kind"]](group, shards)
                    for group, shards in zip(self.param_groups, reduced, strict=True)]
        for finalize in gathered:
            finalize()

    def _reduce_adamw(self, group):
        return [_mean_over_ranks(p.grad, self.ranks, self._is_sharded(p)) for p in group["params"]]

    def _update_adamw(self, group, reduced):
        gathers = []
        for p, grad in zip(group["params"], reduced, strict=True):
            share = _own_rows(p.data, self.ranks) if self._is_sharded(p) else p.data
            state = self.state[p]
            if not state:
                state.update(step=0, exp_avg=torch.zeros_like(share), exp_avg_sq=torch.zeros_like(share))
            state["step"] += 1
            beta1, beta2 = group["betas"]
            numbers = [torch.tensor(float(x)) for x in (
                group["lr"], beta1, beta2, group["eps"], group["weight_decay"],
                1 - beta1 ** state["step"], 1 - beta2 ** state["step"])]
            update = self._kernel(adamw_update, share.numel())
            update(share.view(-1), grad().view(-1), state["exp_avg"].view(-1),
                   state["exp_avg_sq"].view(-1), *numbers)
            if self._is_sharded(p):
                gathers.append(_all_gather(p.data, share, async_op=True))
        return lambda: [gather.wait() for gather in gathers]

    def _is_sharded(self, p):
        return self.ranks.world_size > 1 and p.numel() >= SMALL_NUMEL and p.size(0) % self.ranks.world_size == 0

    def _reduce_muon(self, group):
        return _mean_over_ranks(self._padded_stack([p.grad for p in group["params"]]), self.ranks, sharded=True)

    def _update_muon(self, group, reduced):
        params = group["params"]
        stack = _own_rows(self._padded_stack([p.data for p in params]), self.ranks)
        state = self.state[params[0]]
        rows, cols = stack.shape[-2:]
        if not state:
            state["momentum"] = torch.zeros_like(stack)
            state["second_moment"] = stack.new_zeros((len(stack), rows, 1) if rows >= cols else (len(stack), 1, cols))
        lr, momentum, beta2, decay = (torch.tensor(float(x)) for x in (
            group["lr"] * max(1.0, rows / cols) ** 0.5, group["momentum"], group["beta2"], group["weight_decay"]))
        direction = self._kernel(muon_direction, rows * cols)(
            reduced(), state["momentum"], momentum, self.matmul_dtype)
        # between the two compiled parts: the matmuls, whose additions the BLAS calls already fuse
        new = self._kernel(muon_update, rows * cols)(
            stack, polar_express(direction), state["second_moment"], lr, beta2, decay)
        if self.ranks.world_size == 1:
            torch._foreach_copy_([p.data for p in params], list(new))
            return lambda: None
        everyone = new.new_empty(len(new) * self.ranks.world_size, rows, cols)
        gather = _all_gather(everyone, new.contiguous(), async_op=True)

        def finalize():
            gather.wait()
            torch._foreach_copy_([p.data for p in params], list(everyone[: len(params)]))

        return finalize

    def _kernel(self, function, numel):
        """`function` compiled, unless the tensor is too small to gain by it (inductor 2.13 fails on 1-row stacks)."""
        return self._fused.get(function, function) if numel >= SMALL_NUMEL else function

    def _padded_stack(self, tensors):
        """(K, rows, cols), with zero matrices added so that the ranks share K evenly."""
        missing = -len(tensors) % self.ranks.world_size
        return torch.stack([*tensors, *[torch.zeros_like(tensors[0])] * missing])


def _mean_over_ranks(grad, ranks, sharded):
    """Start the reduction of a gradient; returns a function that waits for it and gives the mean, this rank's share
    alone if `sharded`."""
    if ranks.world_size == 1:
        return lambda: grad
    share = torch.empty_like(_own_rows(grad, ranks)) if sharded else grad
    work = _reduce_scatter(share, grad, async_op=True) if sharded else dist.all_reduce(grad, async_op=True)

    def wait():
        work.wait()
        return share / ranks.world_size

    return wait


def _own_rows(tensor, ranks):
    share = len(tensor) // ranks.world_size
    return tensor[ranks.rank * share : (ranks.rank + 1) * share]


def adamw_update(p, grad, exp_avg, exp_avg_sq, lr, beta1, beta2, eps, weight_decay, bias1, bias2):
    """AdamW in place on flat tensors of one dtype: decoupled decay, then the bias-corrected step.

    The other arguments are 0-dim fp32 CPU tensors, so that new values do not recompile; the arithmetic
    is fp32 whatever the storage. bias1, bias2 are 1 - beta^step. Source: arXiv:1711.05101.
    """
    g, w = grad.float(), p.float()
    m = torch.lerp(exp_avg.float(), g, 1 - beta1)
    v = torch.lerp(exp_avg_sq.float(), g * g, 1 - beta2)
    w = w * (1 - lr * weight_decay) - lr * (m / bias1) / ((v / bias2).sqrt() + eps)
    exp_avg.copy_(m)
    exp_avg_sq.copy_(v)
    p.copy_(w)


def muon_direction(grad, momentum_buffer, momentum, dtype):
    """What Muon orthogonalises, in `dtype`: of each matrix, with gradient g, buffer b and momentum m,

        b <- m b + (1 - m) g,    n = (1 - m) g + m b                  Nesterov momentum
        r_i = n_i sqrt(mean_j |n_j|^2) / |n_i|                        row i: every row has the rows' rms norm
        r / (1.01 |r|_F + 1e-6)                                       spectral norm below 1

    grad and momentum_buffer (updated in place) are (K, rows, cols), momentum a 0-dim fp32 tensor.
    """
    momentum_buffer.copy_(torch.lerp(momentum_buffer, grad, 1 - momentum))
    nesterov = torch.lerp(grad, momentum_buffer, momentum)
    row_power = nesterov.square().sum(dim=-1, keepdim=True)  # (K, rows, 1): every norm below follows from it
    row_scale = (row_power.mean(dim=-2, keepdim=True) / row_power.clamp_min(TINY**2)).sqrt()
    frobenius_norm = (row_power * row_scale.square()).sum(dim=-2, keepdim=True).sqrt()
    return (nesterov * (row_scale / (1.01 * frobenius_norm + 1e-6))).to(dtype)


def muon_update(p, update, second_moment, lr, beta2, weight_decay):
    """New values of p (K, rows, cols) fp32 by orthogonalised updates u; lr, beta2, weight_decay 0-dim fp32 CPU tensors:

        u <- u sqrt(min(rows, cols)) / |u|_F                          an orthogonal matrix's Frobenius norm
        s_i <- beta2 s_i + (1 - beta2) mean(u_i^2)                    second_moment of row i (of columns if wide),
        u_i <- u_i / sqrt(s_i), then all scaled to the norm before    (K, rows, 1) or (K, 1, cols), in place
        p - lr (u + weight_decay p [u p >= 0])                        decay where u and p agree in sign

    Source: NorMuon, arXiv:2510.05491.
    """
    rows, cols = p.shape[-2:]
    lines, within = (-2, -1) if rows >= cols else (-1, -2)
    update = update.float()
    power = update.square().mean(dim=within, keepdim=True)  # of each row (column if wide)
    to_norm = (min(rows, cols) / p[0].numel() / power.mean(dim=lines, keepdim=True).clamp_min(TINY**2)).sqrt()
    power = power * to_norm.square()
    second_moment.copy_(torch.lerp(second_moment, power, 1 - beta2))
    line_scale = second_moment.clamp_min(TINY).rsqrt()
    after = (power * line_scale.square()).mean(dim=lines, keepdim=True)
    keep_norm = (power.mean(dim=lines, keepdim=True) / after.clamp_min(TINY**2)).sqrt()
    update = update * (to_norm * line_scale * keep_norm)
    agree = (update * p >= 0).to(p.dtype)
    return p - lr * (update + weight_decay * p * agree)


def polar_express(x):
    """Approximate the orthogonal polar factor of each matrix of x (K, rows, cols) of spectral norm below 1.

    Five iterations of odd quintic polynomials in x's dtype, on the smaller side. Source: arXiv:2505.16932.
    """
    tall = x.size(-2) > x.size(-1)
    for a, b, c in POLAR_EXPRESS:
        gram = x.mT @ x if tall else x @ x.mT
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, x, polynomial, beta=a) if tall else torch.baddbmm(x, polynomial, x, beta=a)
    return x
