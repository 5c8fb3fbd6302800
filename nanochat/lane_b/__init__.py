"""Lane B: curves of small runs give depth and horizon; the statistics of a text stand beside it."""

from nanochat.common import UserError


class Refusal(UserError):
    """The data do not give the answer. One line with a remedy; `state` is a word for programs."""

    exit_code = 3

    def __init__(self, message, state="refused"):
        super().__init__(message)
        self.state = state


class Uncertain(UserError):
    """There is an answer, but a check failed; it must not be used unseen."""

    exit_code = 4
