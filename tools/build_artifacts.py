"""Compile libraries from the tuning logs: `tq-tvm build`."""

from tq_tvm.cli import main

if __name__ == "__main__":
    main.commands["build"](prog_name="build_artifacts.py")
