"""Time the calls beside torch: `tq-tvm bench`."""

from tq_tvm.cli import main

if __name__ == "__main__":
    main.commands["bench"](prog_name="bench.py")
