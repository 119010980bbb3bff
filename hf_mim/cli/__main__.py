import sys

from hf_mim.cli import main

sys.exit(main())
