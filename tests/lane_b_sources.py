"""Sources of text whose correlations and entropies are known exactly, for the tests of lane B."""

import numpy as np

from nanochat.lane_b.corpus import Corpus


def cut(tokens, document_tokens, vocab_size):
    """Return a Corpus of documents of equal length from one long stationary sequence."""
    n_documents = len(tokens) // document_tokens
    documents = tokens[:n_documents * document_tokens].reshape(n_documents, document_tokens)
    return Corpus.of(list(documents), vocab_size)


class Copying:
    """x_t = x_{t-k} with probability q w_k, w_k ~ k^-exponent for k <= reach; else drawn from Zipf.

    C(n) = c(n) (diag p - p p^T) with c(0) = 1 and c(n) = q sum_k w_k c(|n - k|), a linear system.
    """

    def __init__(self, exponent, q=0.6, reach=512, vocab_size=8191):
        self.q, self.vocab_size = q, vocab_size
        self.w = np.arange(1, reach + 1) ** -float(exponent)
        self.w /= self.w.sum()
        self.p = 1 / np.arange(1, vocab_size + 1)
        self.p /= self.p.sum()
        system, right_side = np.eye(reach + 1), np.zeros(reach + 1)
        right_side[0] = 1
        for n in range(1, reach + 1):
            np.subtract.at(system[n], np.abs(n - np.arange(1, reach + 1)), q * self.w)
        self.c = np.linalg.solve(system, right_side)

    def sample(self, n_tokens, seed):
        rng = np.random.default_rng(seed)
        origin = np.arange(n_tokens)
        back = rng.choice(np.arange(1, len(self.w) + 1), size=n_tokens, p=self.w)
        copied = (rng.random(n_tokens) < self.q) & (back <= origin)
        origin[copied] -= back[copied]
        while (origin != origin[origin]).any():  # follow the copies to where the token was drawn
            origin = origin[origin]
        return rng.choice(self.vocab_size, size=n_tokens, p=self.p)[origin]

    def operator_norm(self, lags):
        p = self.p[:400]  # the leading direction is in the most frequent tokens
        return self.c[lags] * np.linalg.norm(np.diag(p) - np.outer(p, p), 2)

    def frobenius_norm(self, lags):
        squares = np.sum(self.p ** 2)
        return self.c[lags] * np.sqrt(squares - 2 * np.sum(self.p ** 3) + squares ** 2)


class Markov:
    """A chain of order 1. C(n) = diag(pi) T^n - pi pi^T; H_n = H_1 for every n >= 1."""

    def __init__(self, vocab_size, seed=0, concentration=0.2):
        self.vocab_size = vocab_size
        concentrations = np.full(vocab_size, concentration)
        self.transitions = np.random.default_rng(seed).dirichlet(concentrations, size=vocab_size)
        self.stationary = np.linalg.matrix_power(self.transitions, 1000)[0]

    def sample(self, n_documents, document_tokens, seed):
        """Return a Corpus; each document begins in the stationary state."""
        rng = np.random.default_rng(seed)
        cumulative = np.cumsum(self.transitions, axis=1)
        rows = np.empty((n_documents, document_tokens), int)
        rows[:, 0] = rng.choice(self.vocab_size, size=n_documents, p=self.stationary)
        for t in range(1, document_tokens):
            below = rng.random(n_documents)[:, None] > cumulative[rows[:, t - 1]]
            rows[:, t] = np.minimum(below.sum(axis=1), self.vocab_size - 1)
        return Corpus.of(list(rows), self.vocab_size)

    def covariance(self, lag):
        joint = self.stationary[:, None] * np.linalg.matrix_power(self.transitions, lag)
        return joint - np.outer(self.stationary, self.stationary)

    def entropy(self):
        return float(-self.stationary @ np.sum(_x_log_x(self.transitions), axis=1))


class Renewal:
    """Runs of one label; each new label differs from the last one.

    Run lengths T <= K have S(k) = P(T >= k) ~ k^-decay.
    """

    def __init__(self, vocab_size, longest, decay):
        self.vocab_size = vocab_size
        self.survival = np.append(np.arange(1, longest + 1) ** -float(decay), 0.0)  # S(1), S(2) ...
        self.mean = self.survival.sum()
        self.ends = self.survival[:-1] - self.survival[1:]  # f(1), ..., f(K)

    def sample(self, n_tokens, seed):
        rng = np.random.default_rng(seed)
        n_runs = int(1.2 * n_tokens / self.mean) + 100
        lengths = rng.choice(np.arange(1, len(self.ends) + 1), size=n_runs, p=self.ends)
        labels = np.cumsum(rng.integers(1, self.vocab_size, size=n_runs)) % self.vocab_size
        return np.repeat(labels, lengths)[:n_tokens]

    def correlation(self, longest_lag):
        """Return a(0), ..., a(longest_lag) with C(n) = a(n) (I - 1 1^T / V) / V.

        A change of label multiplies the expectation by -1 / (V - 1).
        """
        r, mean = -1 / (self.vocab_size - 1), self.mean
        survival = np.concatenate([self.survival, np.zeros(longest_lag + 2)])  # [k - 1] is S(k)
        ends = survival[:-1] - survival[1:]
        b, a = np.ones(longest_lag + 1), np.ones(longest_lag + 1)
        for n in range(1, longest_lag + 1):
            j = np.arange(1, n + 1)
            b[n] = survival[n] + r * (ends[j - 1] @ b[n - j])
            a[n] = 1 - survival[j - 1].sum() / mean + r * (survival[j - 1] @ b[n - j]) / mean
        return a

    def entropy(self, n):
        """Return H_n in nats.

        A change of label seen r < n tokens ago tells the length of the run; otherwise it is only
        known to be at least n.
        """
        survival = np.concatenate([self.survival, np.zeros(n + 2)])
        ends = survival[:-1] - survival[1:]
        total = 0.0
        for age in range(1, n):
            if survival[age - 1] > 0:
                choice = self._choice(ends[age - 1] / survival[age - 1])
                total += survival[age - 1] / self.mean * choice
        older = survival[n - 1:].sum() / self.mean
        if older > 0:
            total += older * self._choice(ends[n - 1:].sum() / (self.mean * older))
        return total

    def _choice(self, change):
        binary = -_x_log_x(change) - _x_log_x(1 - change)
        return float(binary + change * np.log(self.vocab_size - 1))


def _x_log_x(x):
    x = np.asarray(x, float)
    return np.where(x > 0, x * np.log(np.where(x > 0, x, 1)), 0.0)
