"""Outputs for the events of a run in addition to its record: the terminal and wandb."""

import sys
import time

from tqdm import tqdm

from nanochat.common import TenPercentSteps, UserError


class ConsoleSink:
    """Print results as lines, and progress as a bar or, in a log, as a line per 10 % of steps."""

    def __init__(self, num_iterations, start_step=0):
        self.num_iterations, self.start_step = num_iterations, start_step
        self.bar = tqdm(total=num_iterations, initial=start_step, unit="step", dynamic_ncols=True,
                        disable=not sys.stderr.isatty())
        self.ten_percent = TenPercentSteps(apart_sec=0.0)
        self.first = None  # (time, step) of the first step: it compiles, so rates begin at its end

    def __call__(self, kind, event):
        writer = getattr(self, f"_{kind}", None)
        if writer:
            writer(event)

    def close(self):
        self.bar.close()

    def _train(self, event):
        step = event["step"]
        numbers = f"loss {event['loss']:.4f}, {event['tok_per_sec']:,.0f} tok/s"
        if not self.bar.disable:
            self.bar.set_postfix_str(numbers, refresh=False)
            self.bar.update(step - self.bar.n)
            return

        now = time.monotonic()
        is_first = self.first is None
        self.first = self.first or (now, step)
        n_steps = self.num_iterations - self.start_step
        if self.ten_percent.is_due(step - self.start_step, n_steps) or is_first:
            first_time, first_step = self.first
            if step > first_step:
                per_step = (now - first_time) / (step - first_step)
                left_sec = per_step * (self.num_iterations - step)
                numbers += f", ETA {tqdm.format_interval(left_sec)}"
            self._line(f"step {step}/{self.num_iterations}: {numbers}")

    def _val(self, event):
        error = event.get("val_bpb_se")
        error = "" if error is None else f" ± {error:.4f}"
        seconds = event["train_time_sec"]
        self._line(f"step {event['step']}: val_bpb {event['val_bpb']:.4f}{error} on "
                   f"{event['n_tokens']:,} tokens after {seconds:.1f} s of training")

    def _repeats(self, event):
        tokens = event["distinct_tokens"] / 1e6
        self._line(f"step {event['step']}: all {tokens:.2f}M training tokens have been read once "
                   "and repeat from here on; up to four passes are nearly as good as new text "
                   "(arXiv:2305.16264)")

    def _core(self, event):
        self._line(f"step {event['step']}: CORE {event['core_metric']:.4f}")

    def _target(self, event):
        self._line(event["description"])

    def _checkpoint(self, event):
        self._line(f"step {event['step']}: checkpoint saved in {event['path']}")

    def _resume(self, event):
        self._line(f"resumed at step {event['step']}")

    def _sample(self, event):
        prompt, text = (event[name].replace("\n", "\n    ") for name in ("prompt", "text"))
        self._line(f"step {event['step']}: sample (the model continues after [...]):\n"
                   f"    {prompt}[...]{text}")

    def _line(self, text):
        self.bar.write(text, file=sys.stdout)
        sys.stdout.flush()


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
