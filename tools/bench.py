"""Time the calls beside torch: `tq-tvm bench`."""

import sys

from tq_tvm.cli import main

if __name__ == "__main__":
    main(["bench", *sys.argv[1:]], prog_name="tq-tvm")
