"""Outputs for the events of a run in addition to its record: the terminal and wandb."""

import sys

from nanochat.common import UserError, progress


class ConsoleSink:
    """Print results as lines, and progress as a bar or, in a log, as a line per minute."""

    def __init__(self, num_iterations, start_step=0):
        self.bar = progress(total=num_iterations, initial=start_step, unit="step", desc="training")

    def __call__(self, kind, event):
        if kind == "train":
            speed = f"{event['tok_per_sec']:,.0f} tok/s"
            self.bar.set_postfix_str(f"loss {event['loss']:.4f}, {speed}", refresh=False)
            self.bar.update(event["step"] - self.bar.n)
        elif text := _in_words(kind, event):
            self.bar.write(text, file=sys.stdout)
            sys.stdout.flush()

    def close(self):
        self.bar.close()


def _in_words(kind, event):
    """Return the text of an event, or None for a kind that the console leaves out."""
    step = f"step {event['step']}"
    if kind == "val":
        error = event.get("val_bpb_se")
        error = "" if error is None else f" ± {error:.4f}"
        return (f"{step}: val_bpb {event['val_bpb']:.4f}{error} on {event['n_tokens']:,} tokens "
                f"after {event['train_time_sec']:.1f} s of training")
    if kind == "repeats":
        return (f"{step}: all {event['distinct_tokens'] / 1e6:.2f}M training tokens have been read "
                "once and repeat from here on; up to four passes are nearly as good as new text "
                "(arXiv:2305.16264)")
    if kind == "sample":
        prompt, text = (event[name].replace("\n", "\n    ") for name in ("prompt", "text"))
        return f"{step}: sample (the model continues after [...]):\n    {prompt}[...]{text}"
    if kind == "core":
        return f"{step}: CORE {event['core_metric']:.4f}"
    if kind == "checkpoint":
        return f"{step}: checkpoint saved in {event['path']}"
    if kind == "resume":
        return f"resumed at {step}"
    return None


class WandbSink:
    """Send the numbers of the events to wandb; WANDB_MODE=offline needs no network."""

    def __init__(self, name, run_id, config):
        import wandb

        try:
            self.run = wandb.init(
                project="nanochat", name=name, id=run_id, resume="allow", config=config)
        except (wandb.errors.UsageError, wandb.errors.CommError) as error:
            raise UserError(f"wandb does not start ({error}); run `wandb login`, set "
                            "WANDB_MODE=offline, or turn it off with --run=dummy") from None
        self.run.define_metric("step")
        self.run.define_metric("*", step_metric="step")

    def __call__(self, kind, event):
        numbers = {f"{kind}/{name}": value for name, value in event.items()
                   if isinstance(value, (int, float)) and name != "step"}
        if numbers and "step" in event:
            # Passing our step as wandb's step makes wandb ignore steps that it has already, which
            # a resumed run repeats.
            self.run.log({"step": event["step"], **numbers}, step=event["step"])

    def close(self):
        self.run.finish()
