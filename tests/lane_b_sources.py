"""Sources of text whose correlations and entropies are known exactly: what lane B's estimates are measured against."""

import numpy as np

from nanochat.lane_b.measure.documents import from_arrays


def cut(tokens, document_tokens, vocab_size):
    """Documents of equal length from one long stationary sequence."""
    whole = len(tokens) // document_tokens * document_tokens
    return from_arrays(list(np.asarray(tokens[:whole], np.uint16).reshape(-1, document_tokens)), vocab_size)


class Copying:
    """x_t = x_{t-k} with probability q·w_k, w_k ∝ k^-exponent for k ≤ reach; else drawn afresh from a Zipf law p.

    C(n) = c(n) (diag p − p pᵀ) with c(0) = 1 and c(n) = q Σ_k w_k c(|n − k|): a linear system.
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
        return rng.choice(self.vocab_size, size=n_tokens, p=self.p)[origin].astype(np.uint16)

    def operator_norm(self, lags):
        fresh = np.diag(self.p[:400]) - np.outer(self.p[:400], self.p[:400])  # its top direction is in the head
        return self.c[lags] * np.linalg.norm(fresh, 2)

    def frobenius_norm(self, lags):
        squares = np.sum(self.p ** 2)
        return self.c[lags] * np.sqrt(squares - 2 * np.sum(self.p ** 3) + squares ** 2)


class Markov:
    """Order 1. C(n) = diag(π) Tⁿ − π πᵀ; H_n = H_1 for every n ≥ 1."""

    def __init__(self, vocab_size, seed=0, concentration=0.2):
        self.vocab_size = vocab_size
        self.transitions = np.random.default_rng(seed).dirichlet(np.full(vocab_size, concentration), size=vocab_size)
        self.stationary = np.linalg.matrix_power(self.transitions, 1000)[0]

    def sample(self, n_documents, document_tokens, seed):
        """(n_documents, document_tokens) uint16, each row begun in the stationary state."""
        rng = np.random.default_rng(seed)
        cumulative = np.cumsum(self.transitions, axis=1)
        rows = np.empty((n_documents, document_tokens), np.uint16)
        rows[:, 0] = rng.choice(self.vocab_size, size=n_documents, p=self.stationary)
        for t in range(1, document_tokens):
            drawn = (rng.random(n_documents)[:, None] > cumulative[rows[:, t - 1]]).sum(axis=1)
            rows[:, t] = np.minimum(drawn, self.vocab_size - 1)
        return rows

    def covariance(self, lag):
        joint = self.stationary[:, None] * np.linalg.matrix_power(self.transitions, lag)
        return joint - np.outer(self.stationary, self.stationary)

    def entropy(self):
        return float(-self.stationary @ np.sum(_x_log_x(self.transitions), axis=1))


class Renewal:
    """Runs of one label; run lengths T ≤ K with S(k) = P(T ≥ k) ∝ k^-decay, each new label different from the last."""

    def __init__(self, vocab_size, longest, decay):
        self.vocab_size = vocab_size
        self.survival = np.append(np.arange(1, longest + 1) ** -float(decay), 0.0)  # S(1), ..., S(K), 0
        self.mean = self.survival.sum()
        self.ends = self.survival[:-1] - self.survival[1:]  # f(1), ..., f(K)

    def sample(self, n_tokens, seed):
        rng = np.random.default_rng(seed)
        n_runs = int(1.2 * n_tokens / self.mean) + 100
        lengths = rng.choice(np.arange(1, len(self.ends) + 1), size=n_runs, p=self.ends)
        labels = np.cumsum(rng.integers(1, self.vocab_size, size=n_runs)) % self.vocab_size
        return np.repeat(labels, lengths)[:n_tokens].astype(np.uint16)

    def correlation(self, longest_lag):
        """a(0..longest_lag): C(n) = a(n) (I − 11ᵀ/V) / V. A change of label multiplies the expectation by −1/(V−1)."""
        r, mean = -1 / (self.vocab_size - 1), self.mean
        survival = np.concatenate([self.survival, np.zeros(longest_lag + 2)])  # survival[k - 1] = S(k)
        ends = survival[:-1] - survival[1:]
        b, a = np.ones(longest_lag + 1), np.ones(longest_lag + 1)
        for n in range(1, longest_lag + 1):
            j = np.arange(1, n + 1)
            b[n] = survival[n] + r * (ends[j - 1] @ b[n - j])
            a[n] = 1 - survival[j - 1].sum() / mean + r * (survival[j - 1] @ b[n - j]) / mean
        return a

    def entropy(self, n):
        """H_n in nats: a change seen r < n tokens ago tells how long the run is; otherwise only that it is ≥ n old."""
        survival = np.concatenate([self.survival, np.zeros(n + 2)])
        ends = survival[:-1] - survival[1:]
        total = 0.0
        for age in range(1, n):
            if survival[age - 1] > 0:
                total += survival[age - 1] / self.mean * self._choice(ends[age - 1] / survival[age - 1])
        older = survival[n - 1:].sum() / self.mean
        return total + older * self._choice(ends[n - 1:].sum() / (self.mean * older)) if older > 0 else total

    def _choice(self, change):
        return float(-_x_log_x(change) - _x_log_x(1 - change) + change * np.log(self.vocab_size - 1))


class OrderTwo:
    """p(w | a, b) interpolated from the triples of a text whose words repeat what is near: H_1, H_2 exact."""

    def __init__(self, vocab_size=120):
        x = Copying(1.0, q=0.8, reach=16, vocab_size=vocab_size).sample(60_000, seed=0)
        self.vocab_size = vocab_size
        shape = (vocab_size,) * 3
        triples = np.bincount(np.ravel_multi_index((x[:-2], x[1:-1], x[2:]), shape), minlength=vocab_size ** 3)
        triples = triples.reshape(shape).astype(float)
        single = triples.sum(axis=(0, 1)) + 1
        double = triples.sum(axis=0) + 5 * single / single.sum()
        triples += 5 * (double / double.sum(axis=-1, keepdims=True))[None]
        self.p = triples / triples.sum(axis=-1, keepdims=True)
        self.pairs = np.full((vocab_size, vocab_size), 1 / vocab_size ** 2)
        for _ in range(300):
            self.pairs = np.einsum("ab,abc->bc", self.pairs, self.p)

    def sample(self, n_documents, document_tokens, seed):
        rng = np.random.default_rng(seed)
        cumulative = np.cumsum(self.p, axis=-1)
        rows = np.empty((n_documents, document_tokens), np.uint16)
        start = rng.choice(self.vocab_size ** 2, size=n_documents, p=self.pairs.ravel() / self.pairs.sum())
        rows[:, 0], rows[:, 1] = np.divmod(start, self.vocab_size)
        for t in range(2, document_tokens):
            drawn = (rng.random(n_documents)[:, None] > cumulative[rows[:, t - 2], rows[:, t - 1]]).sum(axis=1)
            rows[:, t] = np.minimum(drawn, self.vocab_size - 1)
        return rows

    def entropies(self):
        """(H_1, H_2) in nats."""
        joint = self.pairs[:, :, None] * self.p
        double = joint.sum(axis=0)
        given_one = double / double.sum(axis=-1, keepdims=True)
        return float(-(double * np.log(given_one)).sum()), float(-(joint * np.log(self.p)).sum())


def _x_log_x(x):
    x = np.asarray(x, float)
    return np.where(x > 0, x * np.log(np.where(x > 0, x, 1)), 0.0)
