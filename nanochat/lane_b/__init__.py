"""Lane B: infer a training horizon from calibration runs, and measure statistics of a text."""

from nanochat.common import UserError


class Refusal(UserError):
    """The data do not carry the answer asked for: one line with a way out, exit code 3."""

    exit_code = 3
