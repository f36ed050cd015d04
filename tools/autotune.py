"""Search every kernel's decisions on this machine: `tq-tvm tune`."""

import sys

from tq_tvm.cli import main

if __name__ == "__main__":
    main(["tune", *sys.argv[1:]], prog_name="tq-tvm")
