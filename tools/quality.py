"""Measure what formats cost: `tq-tvm quality`."""

import sys

from tq_tvm.cli import main

if __name__ == "__main__":
    main(["quality", *sys.argv[1:]], prog_name="tq-tvm")
