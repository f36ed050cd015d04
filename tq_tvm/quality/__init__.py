"""What a format costs: distortion, logits and attention, beside theory and the model's dtype."""

from tq_tvm.quality.measure import (
    CodecQuality,
    PresetQuality,
    measure_codecs,
    measure_preset,
)
from tq_tvm.quality.table import codec_table, preset_table

__all__ = [
    "CodecQuality",
    "PresetQuality",
    "codec_table",
    "measure_codecs",
    "measure_preset",
    "preset_table",
]
