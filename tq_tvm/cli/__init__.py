"""The command ``tq-tvm``: tune, refile, build, list, verify, bench, quality, show-config.

Exit codes: 0 all is well, 1 an operation failed (the message says what to do), 2 wrong usage,
130 interrupted.
"""

from __future__ import annotations

import logging
import sys

import click

from tq_tvm import env
from tq_tvm._version import __version__
from tq_tvm.cli.installed import list_, show_config, verify
from tq_tvm.cli.libraries import build, refile, tune
from tq_tvm.cli.measure import bench, quality
from tq_tvm.cli.options import reported

__all__ = ["main"]


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="tq-tvm")
@reported
def main() -> None:
    """Kernels for a TurboQuant KV cache: search them, build them, look at them."""
    logging.basicConfig(format="%(levelname)s: %(message)s", stream=sys.stderr)
    logging.getLogger("tq_tvm").setLevel(env.log_level())


for _command in (tune, refile, build, list_, verify, bench, quality, show_config):
    main.add_command(_command)
