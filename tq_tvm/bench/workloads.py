"""The rows that are timed on a GPU and on a CPU: kernels, specs and sizes."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

from tq_tvm.spec import CacheSpec, RotateSpec, Spec

__all__ = ["Workload", "specs", "workloads"]

_SERVED = CacheSpec(head_dim=128, num_q_heads=32, num_kv_heads=8)
_LATENT = CacheSpec(512, 16, 1, format="mse4-none-signed-matched", head_dim_v=64)
_GROUPS = (1, 2, 5, 6, 7, 16)
_FORMATS = (
    *("tq22", "tq32", "tq33", "tq42", "tq43", "tq44"),
    *("mse2-mse3-signed-matched", "mse2-mse4-signed-matched", "mse3-mse4-signed-matched"),
    *("qjl4-mse3-signed-matched", "qjl4-mse4-signed-matched"),
    *("int4", "int8", "fp8", "none"),
)
"""Every pair of Lloyd-Max codecs but k4v2, which most rows have, and direct codecs."""
_ROTATED = (64, 128, 256, 512, 1024, 4096)
_GIB = 1 << 30
_FEATURES = ("soft cap", "sinks", "ALiBi")


@dataclasses.dataclass(frozen=True)
class Workload:
    """One row to measure. ``batch`` and ``context`` are (rows, 1) for ``rotate``.

    The lengths of a ragged batch are log-uniform in ``shortest`` to ``context``. Of ``attend`` and
    ``prefill``, each sequence has ``new_tokens`` query tokens, and the call asks for ``feature``.
    """

    kernel: str
    spec: Spec
    batch: int
    context: int
    graph: bool = False
    rotate_back: bool = False
    shortest: int | None = None
    new_tokens: int = 1
    feature: str = ""

    @property
    def cache_spec(self) -> CacheSpec:
        """The spec, of a kernel other than ``rotate``."""
        assert isinstance(self.spec, CacheSpec)
        return self.spec

    def describe(self) -> dict[str, Any]:
        """The fields of ``bench.json``."""
        if self.kernel == "rotate":
            rotation = self.spec.rotation
            return {
                "rows": self.batch,
                "n": rotation.dim,
                "dtype": rotation.dtype,
                "graph": self.graph,
            }
        spec = self.cache_spec
        fields: dict[str, Any] = {
            "batch": self.batch,
            "context": self.context,
            "q_heads": spec.num_q_heads,
            "kv_heads": spec.num_kv_heads,
            "head_dim": spec.head_dim,
            "page_size": spec.page_size,
            "dtype": spec.dtype,
            "format": spec.format,
            "layout": spec.layout,
            "graph": self.graph,
        }
        if spec.window:
            fields["window"] = spec.window
        if self.shortest is not None:
            fields["shortest"] = self.shortest
        if self.kernel in ("attend", "prefill"):
            fields |= {"new_tokens": self.new_tokens, "feature": self.feature}
        if self.kernel == "flatten":
            fields["rotate_back"] = self.rotate_back
        if self.kernel == "fill":
            fields["addressing"] = "slot_mapping" if self.context == 1 else "block_table"
        return fields


def workloads(kind: str) -> list[Workload]:
    """The rows for a kind of target: serving sizes on a GPU, sizes of milliseconds on a CPU."""
    if kind == "llvm":
        return [
            Workload("rotate", RotateSpec(128), 65536, 1),
            Workload("fill", _SERVED, 2, 512),
            Workload("fill", _SERVED, 8, 1),
            Workload("flatten", _SERVED, 2, 1024),
            Workload("flatten", _SERVED, 2, 1024, rotate_back=True),
            Workload("decode", _SERVED, 2, 1024),
            Workload("decode", _SERVED, 4, 4096),
            Workload("mla", _LATENT, 2, 1024),
        ]
    shapes = [
        *(dataclasses.replace(_SERVED, num_q_heads=8 * group) for group in _GROUPS),
        dataclasses.replace(_SERVED, layout="bhsd"),
        dataclasses.replace(_SERVED, dtype="float16"),
        *(dataclasses.replace(_SERVED, head_dim=dim) for dim in (64, 96, 256, 512)),
        *(dataclasses.replace(_SERVED, format=name) for name in _FORMATS),
    ]
    formats = [spec for spec in shapes if spec.format != _SERVED.format]
    many_heads = dataclasses.replace(_SERVED, num_q_heads=64)
    mse4 = dataclasses.replace(_SERVED, format="tq42")
    few_kv_heads = dataclasses.replace(_SERVED, num_kv_heads=4)
    windowed = dataclasses.replace(_SERVED, window=64)
    latents = [dataclasses.replace(_LATENT, num_q_heads=heads) for heads in (16, 128)]
    return [
        Workload("decode", _SERVED, 64, 8192),
        Workload("decode", _SERVED, 16, 32768),
        Workload("decode", many_heads, 128, 4096),
        Workload("decode", few_kv_heads, 64, 8192),
        Workload("decode", _SERVED, 1, 131072),
        Workload("decode", _SERVED, 64, 1024),
        Workload("decode", _SERVED, 256, 512),
        Workload("decode", _SERVED, 8, 2048, graph=True),
        Workload("decode", _SERVED, 1, 8192, graph=True),
        Workload("decode", _SERVED, 1, 1024, graph=True),
        Workload("decode", _SERVED, 64, 32768, shortest=128),
        *(Workload("decode", spec, 64, 8192) for spec in (*shapes, windowed)),
        *(Workload("attend", _SERVED, 64, 8192, feature=name) for name in ("lse", *_FEATURES)),
        *(Workload("attend", _SERVED, 64, 8192, new_tokens=new) for new in (4, 8)),
        Workload("attend", _SERVED, 64, 1024, new_tokens=4),
        Workload("attend", windowed, 64, 8192, new_tokens=4),
        *(Workload("attend", mse4, 64, 8192, new_tokens=new) for new in (1, 4, 8)),
        Workload("decode", _SERVED, 64, 4096),
        Workload("attend", _SERVED, 64, 4096),
        Workload("attend", _SERVED, 64, 32768, feature="window of 4096"),
        Workload("prefill", _SERVED, 1, 32768, new_tokens=2048),
        Workload("prefill", _SERVED, 1, 32768, new_tokens=512),
        Workload("prefill", _SERVED, 4, 2048, new_tokens=2048),
        Workload("prefill", _SERVED, 64, 8192, new_tokens=16),
        Workload("prefill", mse4, 1, 32768, new_tokens=2048),
        Workload("fill", _SERVED, 64, 8192),
        Workload("fill", _SERVED, 8, 2048),
        Workload("fill", _SERVED, 64, 1, graph=True),
        Workload("fill", _SERVED, 256, 1, graph=True),
        *(Workload("fill", spec, 64, 8192) for spec in formats),
        Workload("flatten", _SERVED, 64, 8192),
        Workload("flatten", _SERVED, 64, 8192, rotate_back=True),
        *(Workload("rotate", RotateSpec(dim), _GIB // (2 * dim), 1) for dim in _ROTATED),
        Workload("rotate", RotateSpec(128), 4096, 1, graph=True),
        *(Workload("mla", spec, 64, 8192) for spec in latents),
        *(Workload("mla", spec, 8, 2048, graph=True) for spec in latents),
        *(Workload("mla", spec, 1, 8192, graph=True) for spec in latents),
    ]


def specs(rows: list[Workload]) -> Iterator[Spec]:
    """Specs whose libraries the rows need, each once."""
    yield from dict.fromkeys(row.spec for row in rows)
