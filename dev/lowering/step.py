"""The training step of one case, lowered and counted; import after fake_h100.pretend."""

import collections
import dataclasses
from pathlib import Path
from unittest import mock

import torch
import torch.nn.functional as F

from dev.lowering.count import Counter
from nanochat.attention import choose_backend
from nanochat.common import git_commit
from nanochat.fp8 import train_in_fp8
from nanochat.gpt import GPT, GPTConfig
from nanochat.optim import MuonAdamW, parameter_groups
from nanochat.schedule import model_shape

PHASES = ("forward", "backward", "optimizer")


def sdpa(q, k, v, attn_mask=None, is_causal=False, enable_gqa=False):
    """Call the kernels that F.scaled_dot_product_attention would choose on a real device."""
    if attn_mask is None:
        return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, is_causal)[0]
    bias = torch.where(attn_mask, 0.0, -torch.inf).to(q.dtype).expand(q.size(0), q.size(1), -1, -1)
    return torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, bias, True, 0.0, False)[
        0
    ]


def lowered(case, vocab_size, fp8=False, **flags):
    """Return (GPTConfig, Counter after one step) of a dev.lowering Case; flags: those of GPT."""
    torch._dynamo.reset()
    shape = model_shape(case.depth, 64, 128)
    config = GPTConfig(
        case.seq_len,
        vocab_size,
        shape.n_layer,
        shape.n_head,
        shape.n_head,
        shape.n_embd,
        case.window_pattern,
    )
    counter = Counter()
    with (
        counter,
        mock.patch.object(torch, "compile", counter.compile),
        mock.patch.object(F, "scaled_dot_product_attention", sdpa),
        torch._dynamo.config.patch(recompile_limit=64),
    ):
        with torch.device("cuda", 0):
            model = GPT(config, torch.bfloat16, **flags)
            ids = torch.zeros(case.rows, case.seq_len, dtype=torch.int64)
        compiled = torch.compile(model, dynamic=False, fullgraph=True)
        optimizer = MuonAdamW(
            parameter_groups(model),
            matmul_dtype=torch.bfloat16,
            compiled=True,
            casts=model.keep_casts(),
        )
        if fp8:
            train_in_fp8(model, optimizer, compiled=True)
        for counted in (False, True):  # the first compiles, and makes the optimizer's state
            forward, backward, update = (phase if counted else None for phase in PHASES)
            with counter.during(forward):
                loss = compiled(ids, ids)
            with counter.during(backward):
                loss.backward()
            with counter.during(update):
                optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    return config, counter


def lowered_rows(case, vocab_size, flags, largest=0, code=""):
    """Print and return one CSV row per phase of a case."""
    config, counter = lowered(case, vocab_size, **flags)
    heads = config.n_head, config.n_kv_head, config.head_dim
    chosen = collections.Counter(
        choose_backend(torch.device("cuda", 0), torch.bfloat16, heads, case.seq_len, window)
        for window in config.windows
    )
    attention = " ".join(f"{name} {n}" for name, n in sorted(chosen.items()))
    rows = []
    for phase in PHASES:
        work = counter.work[phase]
        n_by_v = work.buffers.count((case.rows * case.seq_len, vocab_size))
        dense = sum(shape[-2:] == (case.seq_len, case.seq_len) for shape in work.buffers)
        rows.append(
            {
                **dataclasses.asdict(case),
                "phase": phase,
                "attention": attention,
                "graphs": len(counter.graphs),
                "triton_launches": work.triton,
                "own_launches": work.own,
                "extern_calls": work.extern,
                "eager_launches": work.eager,
                **{
                    f"{kind}_gb": round(getattr(work, f"{kind}_bytes") / 1e9, 3)
                    for kind in ("triton", "own", "extern", "eager")
                },
                "n_by_v_buffers": n_by_v,
                "dense_mask": dense or "none",
                "commit": git_commit()[0],
                "dirty": git_commit()[1],
                "torch": torch.__version__,
            }
        )
        print(", ".join(f"{name} {value}" for name, value in rows[-1].items()), flush=True)
        by_origin = collections.Counter()
        times = collections.Counter()
        for n, origin in work.nodes:
            by_origin[origin] += n
            times[origin] += 1
        for origin, n in by_origin.most_common(largest):
            print(f"    {n / 1e9:7.3f} GB in {times[origin]:3}  {origin[:150]}")
    if code:
        for number, source in enumerate(counter.graphs):
            (Path(code) / f"{case.depth}_{case.seq_len}_{case.flags}_{number}.py").write_text(
                source
            )
    return rows
