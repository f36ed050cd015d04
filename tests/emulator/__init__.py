"""CUDA kernels on a CPU: every thread a fiber, every warp instruction performed for 32 lanes."""

from emulator.module import EmulatedModule, compile_functions, compile_source
from emulator.translate import TranslationError, translate

__all__ = [
    "EmulatedModule",
    "TranslationError",
    "compile_functions",
    "compile_source",
    "translate",
]
