"""Compiled libraries on the run side: what a library says about itself, finding, checking, loading.

Nothing here imports the compiler. Order of the modules: `manifest`, `verify`, `locate`, `load`.
"""

from tq_tvm.artifacts.load import LoadedFunction, LoadedVariant, clear_cache, load
from tq_tvm.artifacts.locate import ArtifactInfo, list_artifacts, locate
from tq_tvm.artifacts.manifest import FileRecord, Manifest, Variant, schedule_word
from tq_tvm.artifacts.verify import verify_all, verify_directory

__all__ = [
    "ArtifactInfo",
    "FileRecord",
    "LoadedFunction",
    "LoadedVariant",
    "Manifest",
    "Variant",
    "clear_cache",
    "list_artifacts",
    "load",
    "locate",
    "schedule_word",
    "verify_all",
    "verify_directory",
]
