"""``build.sources`` and the ABI number: what makes a library out of date."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tq_tvm.artifacts.manifest import ABI
from tq_tvm.build import sources
from tq_tvm.served import functions_on
from tq_tvm.spec import CacheSpec

SPEC = CacheSpec(head_dim=128, num_q_heads=32, num_kv_heads=8)

ROWS = "bfloat16[*, 8, 128]"
CACHES = ["uint8[*, 64, 8, 64]", "uint8[*, 64, 8, 32]", "bfloat16[*, 64, 8, 2]"]
CACHES += ["bfloat16[*, 64, 8, 1]"]
TABLE = ["int32[*, *]", "int32[*]"]
ARGUMENTS = {
    "rotate": ["bfloat16[*, 128]"] * 2,
    "fill_slots": [ROWS, ROWS, *CACHES, "int64[*]"],
    "fill_table": [ROWS, ROWS, *CACHES, *TABLE, "int32[*]"],
    "flatten": [*CACHES, *TABLE, "int32[*]", ROWS, ROWS],
    "flatten_unrotated": [*CACHES, *TABLE, "int32[*]", ROWS, ROWS],
    "decode": [
        "bfloat16[*, 32, 128]", *CACHES, *TABLE, "float32[*]", "bfloat16[*, 32, 128]",
        "int32", "float32",
    ],
    "decode_featured": [
        "bfloat16[*, 32, 128]", *CACHES, *TABLE, "float32[*]", "float32[*]",
        "float32[*]", "bfloat16[*, 32, 128]", "float32[*, *]",
        "int32", "float32", "float32", "int32",
    ],
    "attend": [
        "bfloat16[*, 32, 128]", *CACHES, *TABLE, "int32[*]", "float32[*]", "float32[*]",
        "float32[*]", "bfloat16[*, 32, 128]", "float32[*, *]",
        "int32", "float32", "float32", "int32", "int32",
    ],
    "prefill": [
        "bfloat16[*, 32, 128]", *CACHES, *TABLE, "int32[*]", "float32[*]", "float32[*]",
        "bfloat16[*, 32, 128]", "float32[*, *]",
        "int32", "float32", "float32", "int32", "int32",
    ],
}  # fmt: skip


def described(param):
    if not hasattr(param.ty, "shape"):
        return str(param.ty)
    extents = [str(x) if str(x).isdecimal() else "*" for x in param.ty.shape]
    return f"{param.ty.dtype}[{', '.join(extents)}]"


@pytest.mark.parametrize(
    ("function", "kind"),
    [(function, kind) for kind in ("llvm", "cuda") for function in functions_on(SPEC, kind)],
)
def test_arguments_are_those_of_the_abi(function, kind):
    """Who changes arguments gives ``ABI`` another number, and this table what goes with it."""
    pytest.importorskip("tvm", reason="the compiler (extra 'tune') is not installed")
    from tq_tvm.schedules import instantiate

    func = instantiate(function, SPEC, kind, None).func
    assert (ABI, [described(p) for p in func.params]) == (3, ARGUMENTS[function])


def test_digest_is_found_without_the_compiler():
    program = (
        "import sys; from tq_tvm.build.sources import sources_digest; "
        "print(sources_digest()); sys.exit('tvm' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == sources.sources_digest()


def test_digest_is_of_every_source(tmp_path, monkeypatch):
    """A file that changes, appears or is renamed changes it; anything else does not."""
    package = tmp_path / "some_kernels"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (tmp_path / "some_spec.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sources, "_MODULES", ("some_spec", "some_kernels"))

    def digest():
        sources.sources_digest.cache_clear()
        return sources.sources_digest()

    try:
        seen = [digest()]
        (package / "fill.py").write_text("x = 1")
        seen.append(digest())
        (package / "fill.py").write_text("x = 2")
        seen.append(digest())
        (package / "fill.py").rename(package / "fill.cpp")
        seen.append(digest())
        (tmp_path / "some_spec.py").write_text("x = 1")
        seen.append(digest())
        (package / "notes.txt").write_text("")
        (tmp_path / "notes.py").write_text("")
        assert len(set(seen)) == 5
        assert digest() == seen[-1]
    finally:
        sources.sources_digest.cache_clear()
