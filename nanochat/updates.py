"""The arithmetic of the optimizer's updates, on tensors that `nanochat.optim` lays out and shares among ranks."""

import torch

# Coefficients a, b, c of aX + (bA + cA^2)X, A = XX^T, one row an iteration (Polar Express, arXiv:2505.16932).
POLAR_EXPRESS = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)
TINY = 1e-10


def adamw_updates(tensors, numbers):
    """`adamw_update` of each of several tensors: one function, so that a compiler can join what is small."""
    for each, values in zip(tensors, numbers, strict=True):
        adamw_update(*each, *values)


def adamw_update(p, cast, grad, exp_avg, exp_avg_sq, lr, beta1, beta2, eps, weight_decay, bias1, bias2):
    """AdamW in place on tensors of one shape: decoupled decay, then the bias-corrected step. cast: p's copy, or None.

    The other arguments are 0-dim fp32 CPU tensors, so that new values do not recompile; the arithmetic
    is fp32 whatever the storage. bias1, bias2 are 1 - beta^step. Source: arXiv:1711.05101.
    """
    g, w = grad.float(), p.float()
    m = torch.lerp(exp_avg.float(), g, 1 - beta1)
    v = torch.lerp(exp_avg_sq.float(), g * g, 1 - beta2)
    w = w * (1 - lr * weight_decay) - lr * (m / bias1) / ((v / bias2).sqrt() + eps)
    exp_avg.copy_(m)
    exp_avg_sq.copy_(v)
    p.copy_(w)
    if cast is not None:
        cast.copy_(w)


def muon_direction(grad, momentum_buffer, momentum, dtype):
    """What Muon orthogonalises, in `dtype`: of each matrix, with gradient g, buffer b and momentum m,

        b <- m b + (1 - m) g,    n = (1 - m) g + m b                  Nesterov momentum
        r_i = n_i sqrt(mean_j |n_j|^2) / |n_i|                        row i: every row has the rows' rms norm
        r / (1.01 |r|_F + 1e-6)                                       spectral norm below 1

    grad and the fp32 momentum_buffer (updated in place) are (K, rows, cols), momentum a 0-dim fp32 tensor.
    """
    grad = grad.float()
    momentum_buffer.copy_(torch.lerp(momentum_buffer, grad, 1 - momentum))
    nesterov = torch.lerp(grad, momentum_buffer, momentum)
    row_power = nesterov.square().sum(dim=-1, keepdim=True)  # (K, rows, 1): every norm below follows from it
    row_scale = (row_power.mean(dim=-2, keepdim=True) / row_power.clamp_min(TINY**2)).sqrt()
    frobenius_norm = (row_power * row_scale.square()).sum(dim=-2, keepdim=True).sqrt()
    return (nesterov * (row_scale / (1.01 * frobenius_norm + 1e-6))).to(dtype)


def muon_update(p, cast, update, second_moment, lr, beta2, weight_decay):
    """Change p (K, rows, cols) fp32 and `cast`, its copy or None, by orthogonalised updates u; the numbers are 0-dim:

        u <- u sqrt(min(rows, cols)) / |u|_F                          an orthogonal matrix's Frobenius norm
        s_i <- beta2 s_i + (1 - beta2) mean(u_i^2)                    second_moment of row i (of columns if wide),
        u_i <- u_i / sqrt(s_i), then all scaled to the norm before    (K, rows, 1) or (K, 1, cols), in place
        p <- p - lr (u + weight_decay p [u p >= 0])                   decay where u and p agree in sign

    Source: NorMuon, arXiv:2510.05491.
    """
    rows, cols = p.shape[-2:]
    lines, within = (-2, -1) if rows >= cols else (-1, -2)
    update = update.float()
    power = update.square().mean(dim=within, keepdim=True)  # of each row (column if wide)
    to_norm = (min(rows, cols) / p[0].numel() / power.mean(dim=lines, keepdim=True).clamp_min(TINY**2)).sqrt()
    power = power * to_norm.square()
    second_moment.copy_(torch.lerp(second_moment, power, 1 - beta2))
    line_scale = second_moment.clamp_min(TINY).rsqrt()
    after = (power * line_scale.square()).mean(dim=lines, keepdim=True)
    keep_norm = (power.mean(dim=lines, keepdim=True) / after.clamp_min(TINY**2)).sqrt()
    update = update * (to_norm * line_scale * keep_norm)
    agree = (update * p >= 0).to(p.dtype)
    new = p - lr * (update + weight_decay * p * agree)
    p.copy_(new)
    if cast is not None:
        cast.copy_(new)


def polar_express(x):
    """Approximate the orthogonal polar factor of each matrix of x (K, rows, cols) of spectral norm below 1.

    Five iterations of odd quintic polynomials in x's dtype, on the smaller side. Source: arXiv:2505.16932. The sums are
    the BLAS calls' own, in fp32: rounded to bf16 before, or with the first term on the polynomial's diagonal, the
    result's error was 4 times as large.
    """
    tall = x.size(-2) > x.size(-1)
    for a, b, c in POLAR_EXPRESS:
        gram = x.mT @ x if tall else x @ x.mT
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, x, polynomial, beta=a) if tall else torch.baddbmm(x, polynomial, x, beta=a)
    return x


def polar_express_flops(rows, cols):
    """FLOPs of `polar_express` for one matrix: three products in each iteration."""
    small, large = sorted((rows, cols))
    return len(POLAR_EXPRESS) * (4 * small * small * large + 2 * small**3)
