"""Lane B: from the statistics of a corpus to a training horizon. numpy and scipy alone."""

from nanochat.errors import UserError


class Refusal(UserError):
    """The data do not carry the answer asked for: one line with a way out, exit code 3, nothing written."""

    exit_code = 3
