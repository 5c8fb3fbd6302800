"""Samples of a text source that cannot be used: counted, the first of them named, left out up to a share of all."""

from nanochat.common import UserError, warn

SKIP_BAD = 0.001  # a broken line in a thousand costs no training; in a small folder one is a mistake worth a look
_NAMED = 3
_SEEN_ENOUGH = 100  # bad samples that are half of all so far: the wrong folder, encoding or field


class BadSamples:
    """What folder_documents met. share: the most of all samples (files, lines, rows) that may be bad."""

    def __init__(self, share=SKIP_BAD):
        self.share, self.n_samples, self.n_bad, self.named = share, 0, 0, []

    def good(self):
        self.n_samples += 1

    def bad(self, where, why, n_samples=1):
        """Count samples that are left out. Errors: UserError where half of all so far are bad."""
        self.n_samples, self.n_bad = self.n_samples + n_samples, self.n_bad + n_samples
        if len(self.named) < _NAMED:
            self.named.append(f"{where}: {why}")
        if self.n_bad >= _SEEN_ENOUGH and self.n_bad > max(0.5, self.share) * self.n_samples:
            raise self._refusal("so far ")

    def settle(self):
        """Once all is read: a warning of what was left out. Errors: UserError where it is more than `share`."""
        if self.n_bad > self.share * self.n_samples:
            raise self._refusal()
        if self.n_bad:
            warn(f"{self.n_bad:,} of {self.n_samples:,} samples left out: {self._names()}")

    def summary(self):
        """For the manifest of the shards made of the rest; empty where nothing was left out."""
        return {"bad_samples": self.n_bad, "samples": self.n_samples, "bad_named": self.named} if self.n_bad else {}

    def _refusal(self, when=""):
        return UserError(f"{self._names()}: {when}{self.n_bad:,} of {self.n_samples:,} samples cannot be used, above "
                         f"the share of {self.share:g} that may be left out; mend or remove them, or allow more with "
                         "python -m nanochat.dataset --skip-bad SHARE")

    def _names(self):
        return "; ".join(self.named) + (" ..." if self.n_bad > len(self.named) else "")
