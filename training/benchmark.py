"""`hf-mim benchmark` as a script: `python training/benchmark.py step | data SOURCE | evaluate`."""

import sys

from hf_mim.cli import main

if __name__ == "__main__":
    sys.exit(main(["benchmark", *sys.argv[1:]]))
