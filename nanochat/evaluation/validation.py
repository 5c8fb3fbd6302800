"""A model on one split of a dataset: bits per byte over its rows, and continuations of its documents."""

from nanochat.data.dataloader import RowPlanner, TokenLoader, n_batches_of_rank
from nanochat.evaluation.loss import evaluate_loss
from nanochat.model.engine import generate

SAMPLE_PROMPT_TOKENS, SAMPLE_NEW_TOKENS, N_SAMPLES = 16, 96, 2


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


def sample_documents(model, tokenizer, shard):
    """Continuations of the beginnings of a shard's first documents: [{prompt, text}]."""
    was_training = model.training
    model.eval()
    try:
        return [_continue(model, tokenizer, shard, index) for index in range(N_SAMPLES)]
    finally:
        model.train(was_training)


def _continue(model, tokenizer, shard, index):
    start, end = shard.offsets[index % shard.n_docs], shard.offsets[index % shard.n_docs + 1]
    prompt = shard.tokens[start:min(end, start + 1 + SAMPLE_PROMPT_TOKENS)].tolist()
    [new] = generate(model, prompt, SAMPLE_NEW_TOKENS, temperature=0.8, top_k=50, seed=index,
                     stop_ids=(tokenizer.bos_id,))
    return {"prompt": tokenizer.decode(prompt[1:]), "text": tokenizer.decode(new)}
