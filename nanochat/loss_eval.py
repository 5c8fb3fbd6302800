"""Bits per byte on a stream of batches, and the loss by position: tokens since the document's BOS."""

import math
from dataclasses import dataclass

import torch
import torch.distributed as dist

from nanochat.distributed import Ranks


@dataclass(frozen=True)
class LossEvaluation:
    """bits_per_byte: summed nats / (ln 2 x summed UTF-8 bytes) of the targets, special tokens left out of both.

    nats_by_position[n]: mean nats of the targets that n tokens of their own document precede (BOS not
    counted); None where there was none. counts_by_position: how many there were.
    """

    bits_per_byte: float
    nats_per_token: float
    n_tokens: int
    nats_by_position: list
    counts_by_position: list


@torch.no_grad()
def evaluate_loss(model, batches, n_batches, token_bytes, bos_id, ranks=None):
    """Evaluate `model(inputs, targets, "none")` on n_batches of `batches`, which may be 0, summed over ranks.

    batches yields inputs and targets (B, T) int64; token_bytes (vocab,) int32 on their device, 0 for
    special tokens, which count neither as bytes nor as nats. Returns a LossEvaluation.
    """
    ranks = ranks or Ranks()
    device = token_bytes.device
    sums_device = "cpu" if device.type == "mps" else device
    totals = None
    for done in range(max(n_batches, 1)):
        inputs, targets = next(batches)
        if totals is None:
            totals = torch.zeros(3, inputs.size(1) + 1, dtype=torch.float64, device=sums_device)
        if done == n_batches:  # this rank has none
            break
        nats = model(inputs, targets, "none").flatten()
        n_bytes = torch.where(targets >= 0, token_bytes[targets.clamp_min(0)], 0).flatten()
        counted = n_bytes > 0
        discarded = inputs.size(1)  # one bin past the positions
        position = torch.where(counted, tokens_since_bos(inputs, bos_id).flatten(), discarded)
        weights = torch.stack((nats.double() * counted, counted.double(), n_bytes.double()))
        totals.index_add_(1, position.to(sums_device), weights.to(sums_device))
    if ranks.world_size > 1:
        dist.all_reduce(totals)
    nats, counts, n_bytes = totals[:, :-1].tolist()
    return LossEvaluation(
        bits_per_byte=sum(nats) / (math.log(2) * sum(n_bytes)) if sum(n_bytes) else math.nan,
        nats_per_token=sum(nats) / sum(counts) if sum(counts) else math.nan,
        n_tokens=int(sum(counts)),
        nats_by_position=[total / n if n else None for total, n in zip(nats, counts, strict=True)],
        counts_by_position=[int(n) for n in counts],
    )


def tokens_since_bos(inputs, bos_id):
    """For each input position, the tokens of its document between BOS and it, itself included; (B, T) int64.

    0 at BOS; a row that does not begin with BOS counts from its first token.
    """
    index = torch.arange(inputs.size(1), device=inputs.device).expand_as(inputs)
    last_bos = torch.where(inputs == bos_id, index, 0).cummax(dim=1).values
    return index - last_bos
