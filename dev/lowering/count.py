"""Run a program on fake CUDA tensors and count the launches and bytes it would need.

Import after fake_h100.pretend. A compiled graph counts, per call, the code that Inductor generated
for it. Outside of graphs, every operation that makes or changes data counts as one launch that
reads its inputs and writes its outputs.
"""

import contextlib
import functools
import math
import re
from collections import defaultdict
from dataclasses import dataclass, field
from types import SimpleNamespace

import torch
from torch._higher_order_ops.triton_kernel_wrap import triton_kernel_wrapper_mutation
from torch._inductor import compile_fx
from torch._inductor.graph import GraphLowering
from torch._inductor.ir import UserDefinedTritonKernel
from torch._inductor.virtualized import V
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves

_TRITON = re.compile(r"\btriton_\w+\.run\(")
_EXTERN = re.compile(r"extern_kernels\.\w+\(|torch\.ops\.(?!nanochat)[\w.]+\(")
_OWN = re.compile(r"torch\.ops\.nanochat\.[\w.]+\(|(?<=\s)(?!triton_)\w+\.run\(")
_BUFFER = re.compile(r"empty_strided_cuda\(\(([\d, ]+)\), ")
_MATMULS = {"mm", "bmm", "addmm", "baddbmm"}
_NO_LAUNCH = {
    "empty",
    "empty_like",
    "empty_strided",
    "new_empty",
    "new_empty_strided",
    "_unsafe_view",
    "lift_fresh",
}


@dataclass
class Work:
    """Launches by kind, and bytes read plus written.

    triton: kernels of the compiler; own: our kernels and ops (without their insides); extern:
    matmuls and attention of libraries; buffers: the allocated shapes.
    """

    triton: int = 0
    extern: int = 0
    own: int = 0
    eager: int = 0
    triton_bytes: int = 0
    own_bytes: int = 0
    extern_bytes: int = 0
    eager_bytes: int = 0
    buffers: list = field(default_factory=list)
    nodes: list = field(
        default_factory=list
    )  # (bytes, kernel's origin), for a look at what is large

    def add(self, other):
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + value)


class Counter(FakeTensorMode):
    """The mode to run in; `work` is the Work by phase, and nothing is counted without a phase."""

    def __init__(self):
        super().__init__(allow_non_fake_inputs=True)
        self.work, self.graphs, self.phase = defaultdict(Work), [], None

    @contextlib.contextmanager
    def during(self, phase):
        """Count what happens inside as `phase` (None: do not count)."""
        before, self.phase = self.phase, phase
        try:
            yield
        finally:
            self.phase = before

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = super().__torch_dispatch__(func, types, args, kwargs)
        if self.phase:
            self._count_eager(func, args, kwargs, out)
        return out

    def _count_eager(self, func, args, kwargs, out):
        namespace, _, name = func._schema.name.rpartition("::")
        tensors = [
            x for x in tree_leaves((args, kwargs, out)) if isinstance(x, torch.Tensor) and x.is_cuda
        ]
        returns_view = any(r.alias_info and not r.alias_info.is_write for r in func._schema.returns)
        if not tensors or returns_view or namespace == "prim" or name in _NO_LAUNCH:
            return
        n_bytes = sum(tensor.numel() * tensor.itemsize for tensor in tensors)
        work = Work(eager=1, eager_bytes=n_bytes, nodes=[(n_bytes, f"eager {name}")])
        if name in _MATMULS:
            work = Work(
                extern=1, extern_bytes=n_bytes, eager=int(name == "baddbmm")
            )  # which first copies its addend
        self.work[self.phase].add(work)

    def compile(self, function=None, **options):
        """Replace torch.compile: lower by Inductor, and run the graph itself on fake tensors."""
        if function is None:
            return functools.partial(self.compile, **options)
        backend = functools.partial(
            compile_fx.compile_fx, inner_compile=self._lower, config_patches=options.get("options")
        )
        return torch._dynamo.optimize(
            backend, dynamic=False, nopython=options.get("fullgraph", False)
        )(function)

    def _lower(self, graph, inputs, **options):
        lowered = []

        def generate(lowering):
            code = lowering.codegen()[0]
            lowered.append((lowering, getattr(code, "value", code)))
            return SimpleNamespace(call=lambda arguments: None, __file__=__file__, __path__=None)

        methods = ("compile_to_module", "_compile_to_module")
        originals = {name: getattr(GraphLowering, name) for name in methods}
        try:
            for name in methods:
                setattr(GraphLowering, name, generate)
            compile_fx.compile_fx_inner(graph, inputs, **options)
        finally:
            for name, original in originals.items():
                setattr(GraphLowering, name, original)
        [(lowering, source)] = lowered
        work = generated_work(lowering, source)
        self.graphs.append(source)

        def run(arguments):
            if self.phase:
                self.work[self.phase].add(work)
            with self.during(None):
                return graph.forward(*arguments)

        run._boxed_call = True
        return run


@triton_kernel_wrapper_mutation.py_impl(Counter)
def _(mode, **launch):
    """Ignore a Triton kernel of this project: it changes only data, which fake tensors lack."""


def generated_work(lowering, source):
    """Return the Work of one call of the code that Inductor generated."""
    calls = source.split("def call")[-1]
    work = Work(
        triton=len(_TRITON.findall(calls)),
        own=len(_OWN.findall(calls)),
        extern=len(_EXTERN.findall(calls)),
        buffers=[tuple(map(int, re.findall(r"\d+", shape))) for shape in _BUFFER.findall(calls)],
    )
    with V.set_graph_handler(lowering):
        for node, words in lowering.count_bytes()[1]:
            n_bytes, kind = (
                4 * words,
                "extern" if node.is_extern() else "triton",
            )  # it gives 4-byte words
            if isinstance(
                node.node, UserDefinedTritonKernel
            ):  # it counts what is written as read too
                kind = "own"
                n_bytes -= sum(
                    math.prod(buffer.get_size()) * buffer.get_dtype().itemsize
                    for buffer in node.node.mutable_args
                )
            elif "nanochat." in _origin(node) and kind == "extern":
                kind = "own"
            setattr(work, f"{kind}_bytes", getattr(work, f"{kind}_bytes") + n_bytes)
            work.nodes.append((int(n_bytes), f"{kind} {_origin(node)}"))
    return work


def _origin(node):
    origins = {
        str(origin.target)
        for part in node.get_nodes()
        for origin in getattr(part.node, "origins", ())
    }
    return ", ".join(sorted(origin.removeprefix("aten.") for origin in origins))
