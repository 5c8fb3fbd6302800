"""Losses by position as runs record them -> arrays, with every way they can be wrong said in one line."""

import math
from pathlib import Path

import numpy as np

from nanochat.common import UserError, read_json
from nanochat.lane_b import Refusal
from nanochat.lane_b.infer.inputs import check_different
from nanochat.lane_b.measure.entropy import PositionLosses
from nanochat.runlog import find_run


def read_position_losses(name, runs_dir):
    """PositionLosses of a run (its id or folder; its last `position_losses` event), or of a JSON file of one event.

    Errors: UserError for what is not such an event, naming the file; Refusal for losses that are NaN or not positive.
    """
    path = Path(name)
    if path.is_file():
        return _of_event(read_json(path, "give a run's position_losses event"), str(path))
    run = find_run(name, runs_dir)
    events = run.of("position_losses")
    if not events:
        raise UserError(f"run {run.run_id} recorded no position_losses; train it with --position-losses")
    identity = {key: run.config.get(key) for key in ("dataset_id", "tokenizer_id", "model_config")}
    return _of_event({**identity, **events[-1]}, run.run_id)


def check_same_text(losses, dataset_id, tokenizer_id):
    """Errors: Refusal where the losses say that they were measured on another dataset, or in other tokens."""
    for loss in losses:
        for what, here, there in (("dataset", dataset_id, loss.dataset_id),
                                  ("tokenizer", tokenizer_id, loss.tokenizer_id)):
            if there is not None and there != here:
                raise Refusal(f"entropy measured on another distribution than the training text: {loss.name} has "
                              f"{what} {there}, the statistics {here}; give the --{what} of the runs")


def check_same_model(losses):
    """Errors: Refusal where one run is given twice, or the models that the losses name differ."""
    check_different([loss.name for loss in losses])
    known = [loss for loss in losses if loss.model_config is not None]
    for loss in known[1:]:
        if loss.model_config != known[0].model_config:
            raise Refusal(f"losses by position of {known[0].name} and {loss.name} are of different models; "
                          "give runs of one model, they differ in data alone")


def _of_event(event, name):
    nats, counts, tokens = (event.get(key) for key in ("nats_by_position", "counts_by_position", "tokens"))
    if type(tokens) is not int or tokens <= 0:
        raise UserError(f"{name}: `tokens` is {tokens!r}, not the number of tokens the model was trained on")
    if not (isinstance(nats, list) and isinstance(counts, list) and len(nats) == len(counts) > 1):
        raise UserError(f"{name}: nats_by_position and counts_by_position are not two lists of the same length; "
                        "give a run's position_losses event")
    if not all(type(count) is int and count >= 0 for count in counts):
        raise UserError(f"{name}: counts_by_position holds something that is not a count")
    for n, (loss, count) in enumerate(zip(nats, counts, strict=True)):
        if loss is not None and type(loss) not in (int, float):
            raise UserError(f"{name}: nats_by_position[{n}] is {loss!r}, not a number")
        if count and (loss is None or not math.isfinite(loss) or loss <= 0):
            raise Refusal(f"{name}: the loss with {n} tokens of context is {loss}; leave this run out, it diverged")
    values = np.array([0.0 if loss is None or not count else loss for loss, count in zip(nats, counts, strict=True)])
    return PositionLosses(name, tokens, values, np.array(counts, np.int64),
                          event.get("dataset_id"), event.get("tokenizer_id"), event.get("model_config"))
