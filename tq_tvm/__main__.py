"""``python -m tq_tvm`` is ``tq-tvm``."""

from tq_tvm.cli import main

main(prog_name="tq-tvm")
