"""Compare the CPU code that inductor generates for forms of the loss.

    python -m dev.bench.generated_code

Compiles forward and backward and counts in the C++: loops over the vocabulary per row, matmuls, and
(N, V) arrays by dtype. No time is measured.
"""

import argparse
import re
from collections import Counter

import torch
from torch._inductor.utils import run_and_get_code

from dev.bench.variants import masked_loss, plain_loss, sliced_loss
from nanochat.common import command
from nanochat.gpt import GPTConfig

FORMS = {
    "sliced before the softcap": sliced_loss,
    "masked after it": masked_loss,
    "plain path": plain_loss,
}
_LOOP = re.compile(r"for\(int64_t (x\d+)=[^;]*; x\d+<static_cast<int64_t>\((\d+)L\)")
_ARRAY = re.compile(r"empty_strided_cpu\(\((\d+), (\d+)\), \([^)]*\), torch\.(\w+)\)")


def count(code, n_tokens, widths):
    """Return (loops over the vocabulary per row, matmuls, {dtype: (N, V) arrays}) of a module.

    widths: numbers of columns that count as the vocabulary, with and without padding. A loop over
    the columns of a row is an inner one (x1); a loop over all N V elements counts too.
    """
    flat = {n_tokens * width for width in widths}
    loops = sum(
        int(size) in flat or (name != "x0" and int(size) in widths)
        for name, size in _LOOP.findall(code)
    )
    arrays = Counter(
        dtype
        for rows, width, dtype in _ARRAY.findall(code)
        if int(rows) == n_tokens and int(width) in widths
    )
    return (
        loops,
        len(re.findall(r"extern_kernels\.(?:mm|addmm)|mkldnn\._linear_pointwise", code)),
        dict(arrays),
    )


@command
def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--vocab-size", type=int, default=8010, help="padded to a multiple of 64")
    args = parser.parse_args(argv)
    padded = GPTConfig(vocab_size=args.vocab_size).padded_vocab_size
    print(
        f"torch {torch.__version__}, {args.tokens} tokens, vocabulary {args.vocab_size} padded to "
        f"{padded}"
    )
    for dtype in (torch.bfloat16, torch.float32):
        for form, loss in FORMS.items():
            for direction, code in zip(
                ("forward", "backward"), generated(loss, args, padded, dtype), strict=True
            ):
                loops, matmuls, arrays = count(code, args.tokens, {args.vocab_size, padded})
                arrays = ", ".join(f"{n} {kind}" for kind, n in arrays.items()) or "none"
                print(
                    f"{dtype} {form}, {direction}: {loops} loops over V, {matmuls} matmuls, "
                    f"N x V arrays: {arrays}"
                )


def generated(loss, args, padded, dtype):
    """Return [forward, backward], Python modules with C++ code that Inductor wrote."""
    torch._dynamo.reset()
    x = torch.randn(args.tokens, 256).to(dtype).requires_grad_()
    weight = torch.randn(padded, 256).requires_grad_()
    targets = torch.randint(0, args.vocab_size, (args.tokens,))
    compiled = torch.compile(loss, fullgraph=True, dynamic=False)
    return run_and_get_code(lambda: compiled(x, weight, targets, args.vocab_size).backward())[1]


if __name__ == "__main__":
    raise SystemExit(main())
