"""A model on one split of a dataset: bits per byte over its rows, and continuations of its documents."""

from functools import partial

import torch

from nanochat.common import progress
from nanochat.dataloader import RowPlanner, TokenLoader, n_batches_of_rank
from nanochat.engine import generate
from nanochat.loss_eval import evaluate_loss
from nanochat.tokens import token_shards

SAMPLE_PROMPT_TOKENS, N_SAMPLES = 16, 2  # of documents
SAMPLING = {"max_new_tokens": 96, "n_samples": 1, "temperature": 0.8, "top_k": 50}  # as engine.generate has them


def n_eval_batches(shards, eval_tokens, batch_rows, sequence_len):
    """Batches (of all ranks) of one evaluation: `eval_tokens`, but at most one pass over the split; at least 1."""
    planner = RowPlanner(shards, sequence_len + 1, seed=0, shuffle=False)
    wanted = max(1, eval_tokens // (batch_rows * sequence_len))
    for done in range(wanted):
        for _ in range(batch_rows):
            planner.next_row()
        epoch, position, buffered = planner.snapshot()
        if epoch * planner.order.n_docs + position - len(buffered) > planner.order.n_docs:
            return max(1, done)
    return wanted


def evaluate_split(model, shards, n_batches, batch_rows, sequence_len, token_bytes, bos_id, ranks, progress=iter):
    """LossEvaluation of the split's first `n_batches` batches of `batch_rows` rows, in the documents' order.

    The ranks share them out. Packed by upstream's rule whatever the training's: val_bpb stays comparable. token_bytes:
    as evaluate_loss has them, on the model's device. progress(batches) -> batches: a bar around this rank's.
    """
    was_training = model.training
    model.eval()
    try:
        with TokenLoader(shards, batch_rows, sequence_len, rank=ranks.rank, world_size=ranks.world_size,
                         device=token_bytes.device, shuffle=False) as batches:
            n_own = n_batches_of_rank(n_batches, ranks.rank, ranks.world_size)
            return evaluate_loss(model, iter(progress(batches)), n_own, token_bytes, bos_id, ranks)
    finally:
        model.train(was_training)


def evaluate_splits(model, dataset, tokenizer, split_tokens, batch_rows, sequence_len, device, ranks):
    """{val, train: LossEvaluation} on `split_tokens` tokens of each split, at most one pass, with a bar on rank 0."""
    token_bytes = torch.from_numpy(tokenizer.token_bytes()).to(device)
    losses = {}
    for split in ("val", "train"):
        shards = token_shards(dataset, tokenizer, split)
        n_batches = n_eval_batches(shards, split_tokens, batch_rows, sequence_len)
        bar = partial(progress, desc=f"evaluating {split}", shown=ranks.is_main,
                      total=n_batches_of_rank(n_batches, ranks.rank, ranks.world_size))
        losses[split] = evaluate_split(model, shards, n_batches, batch_rows, sequence_len, token_bytes,
                                       tokenizer.bos_id, ranks, bar)
    return losses


def position_table(loss):
    """Lines of a LossEvaluation's nats by position, at 0 and the powers of two."""
    by_position = list(zip(loss.nats_by_position, loss.counts_by_position, strict=True))
    lines = ["tokens of context since BOS: nats per token"]
    for n in (0, *(2**k for k in range(len(by_position).bit_length() - 1))):
        nats, count = by_position[n]
        lines.append(f"{n:6d}: {nats:.4f} ({count:,} tokens)" if count else f"{n:6d}: none")
    return "\n".join(lines)


def sample_documents(model, tokenizer, shard, **sampling):
    """Continuations of the beginnings of a shard's first documents: [{prompt, text}]; sampling: see SAMPLING."""
    documents = [i % shard.n_docs for i in range(N_SAMPLES)]
    prompts = [shard.tokens[shard.offsets[d]:shard.offsets[d + 1]][:1 + SAMPLE_PROMPT_TOKENS].tolist()
               for d in documents]
    return _continuations(model, tokenizer, prompts, sampling)


def sample_prompts(model, tokenizer, prompts, **sampling):
    """Continuations of texts: [{prompt, text}], n_samples of each; sampling: see SAMPLING."""
    return _continuations(model, tokenizer, [[tokenizer.bos_id, *tokenizer.encode(text)] for text in prompts], sampling)


def _continuations(model, tokenizer, prompts, sampling):
    was_training = model.training
    model.eval()
    try:
        return [{"prompt": tokenizer.decode(prompt[1:]), "text": tokenizer.decode(new)}
                for seed, prompt in enumerate(prompts)
                for new in generate(model, prompt, seed=seed, stop_ids=(tokenizer.bos_id,), **{**SAMPLING, **sampling})]
    finally:
        model.train(was_training)
