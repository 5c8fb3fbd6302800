"""Where a run's events go besides its record: the terminal, and wandb."""

import sys
import time

from tqdm import tqdm

from nanochat.common import Bar, TenPercentSteps, UserError


class ConsoleSink:
    """A progress bar with rate and ETA on a terminal, a line every 10 % in a log; one line for each evaluation."""

    def __init__(self, num_iterations, start_step=0):
        self.num_iterations = num_iterations
        self.bar = Bar(total=num_iterations, initial=start_step, unit="step", dynamic_ncols=True,
                        disable=not sys.stderr.isatty())
        self.first = None  # (time, step) of the first training step: it compiles, so rates count from its end
        self.start_step, self.tenths = start_step, TenPercentSteps(apart_sec=0.0)

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
        is_first = self.first is None  # it says that the run is alive
        self.first = self.first or (now, step)
        if self.tenths.is_due(step - self.start_step, self.num_iterations - self.start_step) or is_first:
            first_time, first_step = self.first
            if step > first_step:
                per_step = (now - first_time) / (step - first_step)
                numbers += f", ETA {tqdm.format_interval(per_step * (self.num_iterations - step))}"
            self._line(f"step {step}/{self.num_iterations}: {numbers}")

    def _val(self, event):
        seconds = event["train_time_sec"]
        self._line(f"step {event['step']}: val_bpb {event['val_bpb']:.4f} after {seconds:.1f} s of training")

    def _repeats(self, event):
        self._line(f"step {event['step']}: all {event['distinct_tokens'] / 1e6:.2f}M tokens that this run takes of the "
                   "text have been read, they repeat from here on; nearly as good as new text up to about four times "
                   "(arXiv:2305.16264)")

    def _core(self, event):
        self._line(f"step {event['step']}: CORE {event['core_metric']:.4f}")

    def _target(self, event):
        self._line(event["description"])

    def _checkpoint(self, event):
        saved_step = event.get("saved_step", event["step"])
        of = "" if saved_step == event["step"] else f" of step {saved_step}"
        self._line(f"step {event['step']}: checkpoint{of} saved in {event['path']}")

    def _resume(self, event):
        if "rollback" in event:
            self._line(f"{event['rollback']}: back to the checkpoint of step {event['step']}, on with other text "
                       f"(rollback {event['n_rollbacks']} of {event['max_rollbacks']})")

    def _sample(self, event):
        text = event["text"].replace("\n", "\n    ")
        self._line(f"step {event['step']}: sample, the model continues after [...]:\n"
                   f"    {event['prompt'].replace(chr(10), chr(10) + '    ')}[...]{text}")

    def _line(self, text):
        self.bar.write(text, file=sys.stdout)
        sys.stdout.flush()


class WandbSink:
    """Sends the numbers of the same events to wandb; WANDB_MODE=offline works without a network."""

    def __init__(self, name, run_id, config):
        import wandb

        try:
            self.run = wandb.init(project="nanochat", name=name, id=run_id, resume="allow", config=config)
        except (wandb.errors.UsageError, wandb.errors.CommError) as error:
            raise UserError(f"wandb does not start ({error}); run `wandb login`, set "
                            "WANDB_MODE=offline, or turn it off with --run=dummy") from None

    def __call__(self, kind, event):
        numbers = {f"{kind}/{name}": value for name, value in event.items()
                   if isinstance(value, (int, float)) and name != "step"}
        if numbers and "step" in event:
            self.run.log({"step": event["step"], **numbers})

    def close(self):
        self.run.finish()
