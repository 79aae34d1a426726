"""`python -m boe_vllm.lab.eval`."""

import sys

from boe_vllm.lab.eval import main

if __name__ == "__main__":
    sys.exit(main())
