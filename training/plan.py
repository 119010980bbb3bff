"""`hf-mim plan` as a script: `python training/plan.py RECIPE --devices 64`."""

import sys

from hf_mim.cli import main

if __name__ == "__main__":
    sys.exit(main(["plan", *sys.argv[1:]]))
