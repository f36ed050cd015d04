"""Search every kernel's decisions on this machine: `tq-tvm tune`."""

from tq_tvm.cli import main

if __name__ == "__main__":
    main.commands["tune"](prog_name="autotune.py")
