"""Runs a script from a fixed seed, for scripts that have no such option: `seeded.py SCRIPT ARGS...`."""

import runpy
import sys

from accelerate.utils import set_seed

if __name__ == "__main__":
    set_seed(0)
    del sys.argv[0]
    runpy.run_path(sys.argv[0], run_name="__main__")
