"""`python -m vllm_depthpar.cli`, which launchers of several processes need."""

import sys

from vllm_depthpar.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
