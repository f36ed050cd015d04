"""Compile libraries from the tuning logs: `tq-tvm build`."""

import sys

from tq_tvm.cli import main

if __name__ == "__main__":
    main(["build", *sys.argv[1:]], prog_name="tq-tvm")
