"""The workloads that are searched, and why each one.

A record is found at one size and serves the sizes nearest to it (`LoadedFunction.nearest`).
"""

from __future__ import annotations

import dataclasses
import math

from tq_tvm.served import check_target
from tq_tvm.spec import FUNCTIONS, CacheSpec, RotateSpec, Spec
from tq_tvm.targets import TargetInfo

__all__ = ["Workload", "chosen_by_batch", "decision_sizes", "workloads"]


@dataclasses.dataclass(frozen=True)
class Workload:
    """One function at one size.

    ``shape`` holds the sizes of ``tq_tvm.schedules.search_module``; ``context`` and ``new_tokens``
    say what the sequences look like inside them.
    """

    function: str
    spec: Spec
    shape: dict[str, int] = dataclasses.field(hash=False)
    why: str

    @property
    def kernel(self) -> str:
        """Kernel that the function is a form of."""
        return FUNCTIONS[self.function]

    @property
    def cache_spec(self) -> CacheSpec:
        """The spec, of a function other than ``rotate``."""
        assert isinstance(self.spec, CacheSpec)
        return self.spec

    @property
    def label(self) -> str:
        """A slug of function, sizes and spec."""
        sizes = "_".join(f"{k}{v}" for k, v in self.shape.items())
        return f"{self.function}-{sizes}-{self.spec.label}"

    @property
    def size(self) -> int:
        """Problem size by which a variant is chosen at run time."""
        if self.function == "rotate":
            return self.shape["n"] * self.spec.rotation.dim
        heads, dim = self.cache_spec.num_kv_heads, self.cache_spec.head_dim
        if self.function in ("decode", "attend", "prefill", "mla"):
            context = self.shape["table_width"] * self.cache_spec.page_size
            queries = self.shape["tokens" if "tokens" in self.shape else "batch"]
            return queries * heads * context * dim
        return self.shape["tokens"] * heads * dim

    @property
    def batch(self) -> int | None:
        """`chosen_by_batch` of it."""
        return chosen_by_batch(self.function, self.shape)


def chosen_by_batch(function: str, shape: dict[str, int]) -> int | None:
    """Sequences of a workload of ``decode``, which say more of a batch than its size; else None."""
    return shape["batch"] if function == "decode" else None


def _batch(spec: CacheSpec, batch: int, context: int) -> dict[str, int]:
    width = -(-context // spec.page_size)
    return {"batch": batch, "pages": batch * width, "table_width": width}


def _tokens(spec: CacheSpec, batch: int, context: int) -> dict[str, int]:
    return {"tokens": batch * context, **_batch(spec, batch, context)}


def workloads(spec: Spec, target: TargetInfo) -> list[Workload]:
    """Workloads of a spec: on a GPU sizes of serving, on a CPU sizes that take milliseconds.

    Those of functions that the target has kernels of.

    Raises
    ------
    UnsupportedSpecError
        It has none.
    """
    check_target("workloads", spec, target.kind)
    large, small = (1 << 29, 1 << 19) if target.kind == "cuda" else (1 << 23, 1 << 16)
    rotation = spec.rotation
    rotations = [
        Workload("rotate", rotation, {"n": large // rotation.dim}, "no cache holds it: bandwidth"),
        Workload("rotate", rotation, {"n": small // rotation.dim}, "one launch: latency"),
    ]
    if isinstance(spec, RotateSpec):
        return rotations
    group = spec.group_size
    if target.kind == "cuda":
        prefill, append, gather = (8, 2048), 64, (16, 4096)
        decodes = [
            (64, 8192, "every SM busy: bandwidth and instructions"),
            (1, 131072, "one long sequence: every SM busy with few heads"),
            (64, 1024, "every SM busy for a short while: prologue and tail"),
            (256, 512, "many short sequences: what comes between two of them"),
            (8, 2048, "a few short sequences: clusters of few CTAs"),
            (1, 8192, "one sequence: splits, latency and the merge"),
            (1, 1024, "one short sequence: launches"),
        ]
        chunks = [
            ("attend", 64, 1, 8192, "one token beside kept ones"),
            ("attend", 64, 4, 8192, "several tokens of a draft"),
            ("attend", 64, 8, 8192, "more rows than a tensor core takes at a time"),
            ("attend", 1, 4, 8192, "one sequence: splits and the merge"),
            ("prefill", 1, 2048, 32768, "a chunk over a long past"),
            ("prefill", 1, 512, 32768, "fewer CTAs than fill the GPU twice"),
            ("prefill", 64, max(1, 64 // group), 8192, "long drafts: the rows of a warpgroup"),
        ]
        chunk = {"tokens": math.prod(prefill), "pages": math.prod(prefill) // spec.page_size}
        fills = [
            Workload("fill_table", spec, _tokens(spec, append, 1), "the same by a block table"),
            Workload("fill_slots", spec, chunk, "prefill chunks by slots: bandwidth"),
            Workload("fill_table", spec, _tokens(spec, 64, 8192), "a whole batch: bandwidth alone"),
        ]
    else:
        fills = []
        prefill, append, gather = (2, 256), 8, (2, 512)
        decodes = [(2, 1024, "a small batch")]
        chunks = [("attend", 2, 64, 512, "chunks of prefill over a packed past")]
    served = target.functions(spec)
    every = [
        *rotations,
        Workload(
            "fill_slots",
            spec,
            {"tokens": append, "pages": append},
            "one new token a sequence: latency",
        ),
        Workload("fill_table", spec, _tokens(spec, *prefill), "prefill chunks: bandwidth"),
        *fills,
        Workload("flatten", spec, _tokens(spec, *gather), "prefill over a packed past"),
        Workload("flatten_unrotated", spec, _tokens(spec, *gather), "export in the model's domain"),
        *(
            Workload(function, spec, _batch(spec, b, c), why)
            for function in ("decode", "mla")
            for b, c, why in decodes
        ),
        *(
            Workload(function, spec, {"tokens": b * n, **_batch(spec, b, c)}, why)
            for function, b, n, c, why in chunks
        ),
    ]
    return [w for w in every if w.function in served]


def decision_sizes(
    function: str, shape: dict[str, int], target: TargetInfo
) -> dict[str, int] | None:
    """Sizes that say which decisions are on offer, or which are the defaults, on GPUs.

    Of ``fill``, of ``decode`` where there are clusters, and of ``attend`` and ``prefill``, for
    which they also say what the GPU has. None elsewhere: all sizes have the same.
    """
    if target.kind != "cuda":
        return None
    if function in ("attend", "prefill"):
        has = {"shared_bytes": target.attrs["max_shared_memory_per_block"]}
        able = {"clusters": target.has_clusters, "wgmma": target.has_wgmma}
        return {**shape, **has, **{name: 1 for name, has_it in able.items() if has_it}}
    sized = FUNCTIONS[function] == "fill" or (function == "decode" and target.has_clusters)
    return shape if sized else None
