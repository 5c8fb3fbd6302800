"""Muon for the blocks' matrices, AdamW for the rest, the state of both sharded over ranks.

Every step reduces gradients, updates and gathers group by group, so that communication of one group
runs beside the arithmetic of another. With one rank the same code runs without the collectives.
"""

from collections import defaultdict

import torch
import torch.distributed as dist

from nanochat.distributed import Ranks
from nanochat.updates import adamw_updates, muon_direction, muon_update, polar_express

SMALL_NUMEL = 1024  # smaller tensors are updated by every rank

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
    """The optimizer. `matmul_dtype` is that of Muon's orthogonalisation; `compiled` fuses the updates. `casts` are
    GPT.keep_casts', {weight: copy}: a copied weight's gradient is its copy's, and `step` writes both.

    Gradients are averaged over ranks by `step`; backward must not reduce them. Each rank keeps the
    state of its share of the parameters alone: a state dict is one rank's, `load_shards` takes those of any number of
    ranks. Muon's weights become views of one tensor a shape: a model goes to its device before.
    """

    def __init__(self, groups, ranks=None, matmul_dtype=torch.float32, compiled=False, casts=None):
        self.ranks, self.matmul_dtype, self.casts = ranks or Ranks(), matmul_dtype, casts or {}
        self._fused = {}
        if compiled:
            self._fused = {function: torch.compile(function, dynamic=False, fullgraph=True)
                           for function in (muon_direction, muon_update)}
            self._fused[adamw_updates] = torch.compile(adamw_updates, dynamic=False, fullgraph=True,
                                                       options={"combo_kernels": True})
        super().__init__(groups, defaults={})
        self._stacks = {group["params"][0]: self._stacked(group["params"])
                        for group in self.param_groups if group["kind"] == "muon"}

    def schedule(self, lr_multiplier, muon_momentum, muon_decay_multiplier):
        """Set this step's learning rates, Muon's momentum and Muon's decay (as a factor of the initial one)."""
        for group in self.param_groups:
            group["lr"] = group["initial_lr"] * lr_multiplier
            if group["kind"] == "muon":
                group["momentum"] = muon_momentum
                group["weight_decay"] = group["initial_weight_decay"] * muon_decay_multiplier

    @torch.no_grad()
    def accumulate(self):
        """Add the copies' gradients to fp32 ones of their weights. Where a step has several micro-batches, call it
        after the backward pass of each: the copies' own sum would be of their dtype's precision."""
        for weight, cast in self.casts.items():
            weight.grad = cast.grad.to(weight.dtype) if weight.grad is None else weight.grad.add_(cast.grad)
            cast.grad = None

    @torch.no_grad()
    def step(self):
        """One update from the gradients, which stay as they are."""
        muon, sharded, replicated = self._parts()
        reduced = [_mean_over_ranks(self._grad(p), self.ranks, sharded=True) for p, _ in sharded]
        reduced_stacks = [_mean_over_ranks(self._padded_stack([self._grad(p) for p in group["params"]]), self.ranks,
                                           sharded=True) for group in muon]
        means = _joint_means_over_ranks([self._grad(p) for p, _ in replicated], self.ranks)
        gathers = []
        for (p, group), mean in zip(sharded, reduced, strict=True):
            self._update_adamw([(p, group, mean())])
            gathers.append(self._gather(p.data, self.casts.get(p)))
        for group, mean in zip(muon, reduced_stacks, strict=True):
            self._update_muon(group, mean())
            if self.ranks.world_size > 1:
                gathers.append(self._gather(*self._stacks[group["params"][0]]))
        self._update_adamw([(p, group, mean) for (p, group), mean in zip(replicated, means(), strict=True)])
        for gather in gathers:
            gather.wait()

    @torch.no_grad()
    def warm_up(self):
        """Compile the updates, with the gradients that are there: at learning rates of 0, their state thrown away,
        nothing changes. No rank waits for another."""
        state, rates = self.state, [group["lr"] for group in self.param_groups]
        self.state = defaultdict(dict)
        for group in self.param_groups:
            group["lr"] = 0.0
        muon, sharded, replicated = self._parts()
        for p, group in sharded:
            self._update_adamw([(p, group, _own_rows(self._grad(p), self.ranks))])
        for group in muon:
            stack = self._padded_stack([self._grad(p) for p in group["params"]])
            self._update_muon(group, _own_rows(stack, self.ranks))
        several = self.ranks.world_size > 1  # then joint means are fp32
        self._update_adamw([(p, group, self._grad(p).float() if several else self._grad(p)) for p, group in replicated])
        self.state = state
        for group, rate in zip(self.param_groups, rates, strict=True):
            group["lr"] = rate

    def zero_grad(self, set_to_none=True):
        super().zero_grad(set_to_none)
        for cast in self.casts.values():
            cast.grad = None

    def load_state_dict(self, state_dict):
        """Take over the state of a `state_dict`; learning rates and the like stay as they were given."""
        given = [{name: value for name, value in group.items() if name != "params"} for group in self.param_groups]
        super().load_state_dict(state_dict)
        for group, options in zip(self.param_groups, given, strict=True):
            group.update(options)

    @torch.no_grad()
    def load_shards(self, shards, n_shards):
        """Take over the state dicts of `n_shards` ranks, by rank: `shards` is gone through once, so that no more than
        one need be in memory. A table that one number of ranks divides and the other does not was or will be whole."""
        state = {}
        for rank, shard in enumerate(shards):
            saved_groups = shard["param_groups"]
            for group, saved_group in zip(self.param_groups, saved_groups, strict=True):
                for p, index in zip(group["params"], saved_group["params"], strict=True):
                    for name, value in shard["state"].get(index, {}).items():
                        self._take_rows(state.setdefault(index, {}), name, value, (p, group), (rank, n_shards))
        self.load_state_dict({"state": state, "param_groups": saved_groups})

    def _take_rows(self, state, name, saved, parameter, saved_by):
        """Copy what of a saved value this rank keeps into its `state` of the parameter."""
        if not torch.is_tensor(saved):  # AdamW's count of steps
            state[name] = saved
            return
        first, end = self._own_range(*parameter, self.ranks.rank, self.ranks.world_size)
        saved_first, saved_end = self._own_range(*parameter, *saved_by)
        if name not in state:
            state[name] = saved.new_zeros((end - first, *saved.shape[1:]))
        low, high = max(first, saved_first), min(end, saved_end)
        if low < high:
            state[name][low - first : high - first] = saved[low - saved_first : high - saved_first]

    def _own_range(self, p, group, rank, world_size):
        """(first, end) of the rows of p that a rank keeps the state of; of Muon's, matrices of p's stack."""
        if group["kind"] == "muon":
            share = -(-len(group["params"]) // world_size)
        elif self._is_sharded(p, world_size):
            share = len(p) // world_size
        else:
            return 0, len(p)
        return rank * share, (rank + 1) * share

    @torch.no_grad()
    def write_casts(self):
        """Make the copies anew: for whoever changes weights otherwise than by `step`, as a resume does."""
        for weight, cast in self.casts.items():
            cast.copy_(weight)

    @torch.no_grad()
    def complete_weights(self):
        """Give this rank the others' shares of the copied weights: `step` sends their copies alone, which are what the
        model uses. Every rank calls it before the weights are read."""
        if self.ranks.world_size > 1:
            whole = [*self._stacks.values(), *((p.data, cast) for p, cast in self.casts.items() if self._is_sharded(p))]
            for gather in [self._gather(weights, None) for weights, casts in whole if casts is not None]:
                gather.wait()

    def _parts(self):
        """(Muon's groups, AdamW's sharded (parameter, group) pairs, its others), in the order of a step."""
        muon = [group for group in self.param_groups if group["kind"] == "muon"]
        adamw = [(p, group) for group in self.param_groups if group["kind"] == "adamw" for p in group["params"]]
        return (muon, [(p, group) for p, group in adamw if self._is_sharded(p)],
                [(p, group) for p, group in adamw if not self._is_sharded(p)])

    def _grad(self, p):
        return self.casts[p].grad if p.grad is None else p.grad

    def _is_sharded(self, p, world_size=None):
        """Of AdamW's."""
        world_size = world_size or self.ranks.world_size
        return world_size > 1 and p.numel() >= SMALL_NUMEL and p.size(0) % world_size == 0

    def _gather(self, weights, casts):
        """Start to give all ranks the rows that each has updated: of the copy, where there is one."""
        whole = weights if casts is None else casts
        return _all_gather(whole, _own_rows(whole, self.ranks), async_op=True)

    def _update_adamw(self, updates):
        """updates: (parameter, group, this rank's share of the mean gradient) of each."""
        tensors, numbers = [], []
        for p, group, grad in updates:
            share, cast = ((x if x is None or not self._is_sharded(p) else _own_rows(x, self.ranks))
                           for x in (p.data, self.casts.get(p)))
            state = self.state[p]
            if not state:
                state.update(step=0, exp_avg=torch.zeros_like(share), exp_avg_sq=torch.zeros_like(share))
            state["step"] += 1
            beta1, beta2 = group["betas"]
            tensors.append((share, cast, grad, state["exp_avg"], state["exp_avg_sq"]))
            numbers.append(_scalars(group["lr"], beta1, beta2, group["eps"], group["weight_decay"],
                                    1 - beta1 ** state["step"], 1 - beta2 ** state["step"]))
        self._fused.get(adamw_updates, adamw_updates)(tensors, numbers)

    def _update_muon(self, group, grad):
        weights, casts = (x if x is None else _own_rows(x, self.ranks) for x in self._stacks[group["params"][0]])
        state = self.state[group["params"][0]]
        n, rows, cols = weights.shape
        if not state:
            state["momentum"] = torch.zeros_like(weights)
            state["second_moment"] = weights.new_zeros((n, rows, 1) if rows >= cols else (n, 1, cols))
        lr, momentum, beta2, decay = _scalars(
            group["lr"] * max(1.0, rows / cols) ** 0.5, group["momentum"], group["beta2"], group["weight_decay"])
        # inductor 2.13 fails on matrices of one row, and small ones gain nothing by it on a CPU
        fused = self._fused if rows > 1 and (weights.is_cuda or rows * cols >= SMALL_NUMEL) else {}
        direction = fused.get(muon_direction, muon_direction)(grad, state["momentum"], momentum, self.matmul_dtype)
        # between the two compiled parts: the matmuls, whose additions the BLAS calls already fuse
        fused.get(muon_update, muon_update)(weights, casts, polar_express(direction), state["second_moment"], lr,
                                            beta2, decay)

    def _stacked(self, params):
        """(weights, copies or None), each (K, rows, cols); the parameters and their copies become views of them."""
        return self._one_storage(params), self._one_storage([self.casts[p] for p in params]) if self.casts else None

    def _one_storage(self, tensors):
        stack = self._padded_stack([tensor.data for tensor in tensors])
        for tensor, matrix in zip(tensors, stack, strict=False):
            tensor.data = matrix
        return stack

    def _padded_stack(self, tensors):
        """(K, rows, cols), with zero matrices added so that the ranks share K evenly."""
        missing = -len(tensors) % self.ranks.world_size
        return torch.stack([*tensors, *(torch.zeros_like(tensors[0]) for _ in range(missing))])


def _scalars(*numbers):
    """As the updates take them: 0-dim tensors, fp32, on the CPU."""
    return [torch.tensor(float(number)) for number in numbers]


def _mean_over_ranks(grad, ranks, sharded):
    """Start the reduction of a gradient; returns a function that waits for it and gives the mean, this rank's share
    alone if `sharded`."""
    if ranks.world_size == 1:
        return lambda: grad
    averages = dist.get_backend() == "nccl"  # gloo cannot
    op = dist.ReduceOp.AVG if averages else dist.ReduceOp.SUM
    share = torch.empty_like(_own_rows(grad, ranks)) if sharded else grad
    work = _reduce_scatter(share, grad, op=op, async_op=True) if sharded else dist.all_reduce(grad, op, async_op=True)

    def wait():
        work.wait()
        return share if averages else share / ranks.world_size

    return wait


def _joint_means_over_ranks(grads, ranks):
    """The same for several gradients in one collective, in fp32, each of them whole on every rank."""
    if ranks.world_size == 1:
        return lambda: grads
    mean = _mean_over_ranks(torch.cat([grad.flatten().float() for grad in grads]), ranks, sharded=False)
    sizes = [grad.numel() for grad in grads]
    return lambda: [flat.view_as(grad) for flat, grad in zip(mean().split(sizes), grads, strict=True)]


def _own_rows(tensor, ranks):
    share = len(tensor) // ranks.world_size
    return tensor[ranks.rank * share : (ranks.rank + 1) * share]
