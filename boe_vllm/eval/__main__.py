"""`python -m boe_vllm.eval`."""

import sys

from boe_vllm.eval import main

if __name__ == "__main__":
    sys.exit(main())
