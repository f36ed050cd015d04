"""Write the test vectors from the reference: ``python tests/vectors/make.py``.

One file a codec: rows of float16 values, and for each what the format makes of it. ``bytes`` is the
row in the cache in hexadecimal, ``scales`` are as stored in float16, ``values`` the row after
decoding and rotating back, in float32.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch

from tq_tvm import reference
from tq_tvm.formats import CODECS, LAYOUT_VERSION

HERE = Path(__file__).parent
TENSOR_SCALE = 0.25


def cases(codec):
    """Head_dim, rotation and scale rule of each row."""
    if codec.family == "lloyd_max":
        return [
            (64, "hadamard", "norm"),
            (64, "signed_hadamard", "matched"),
            (64, "signed_hadamard", "least_squares"),
            (80, "signed_hadamard", "unbiased"),
            (112, "hadamard", "matched"),
        ]
    return [(64, "none", None), (80, "none", None), (64, "signed_hadamard", None)]


def vector(codec, dim, rotation, rule, seed):
    generator = torch.Generator().manual_seed(seed)
    # Short to print, and exact in float16.
    row = (torch.randn(dim, generator=generator) * 256 + 64).round() / 256
    scale = TENSOR_SCALE if codec.tensor_scale else 1.0
    rotated = reference.rotate_rows(row, rotation)
    packed, scales = reference.encode_rows(
        rotated, codec, rule, tensor_scale=scale, dtype=torch.float16
    )
    stored = scales.half()
    values = reference.rotate_back(
        reference.decode_rows(packed, stored, codec, tensor_scale=scale), rotation
    )
    return {
        "head_dim": dim,
        "rotation": rotation,
        "scale_rule": rule,
        "tensor_scale": scale if codec.tensor_scale else None,
        "row": row.tolist(),
        "bytes": packed.contiguous().view(torch.uint8).numpy().tobytes().hex(),
        "scales": stored.tolist(),
        "values": [float(f"{v:.7g}") for v in values.tolist()],
    }


def contents(codec):
    """What the file of a codec says."""
    rows = [vector(codec, *case, seed=seed) for seed, case in enumerate(cases(codec))]
    return {"layout_version": LAYOUT_VERSION, "codec": codec.name, "rows": rows}


if __name__ == "__main__":
    for codec in CODECS.values():
        file = contents(codec)
        rows = ",\n".join(json.dumps(row) for row in file.pop("rows"))
        text = f'{json.dumps(file)[:-1]}, "rows": [\n{rows}\n]}}\n'
        (HERE / f"{codec.name}.json").write_text(text)
