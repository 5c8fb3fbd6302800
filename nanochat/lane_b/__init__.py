"""Lane B: curves of calibration runs -> a training horizon; beside it a corpus's statistics. numpy and scipy alone."""

from nanochat.common import UserError


class Refusal(UserError):
    """The data do not carry the answer asked for: one line with a way out, exit code 3."""

    exit_code = 3
