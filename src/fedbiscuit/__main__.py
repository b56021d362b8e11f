"""``python -m fedbiscuit``."""

import sys

from fedbiscuit.cli import main

if __name__ == "__main__":
    sys.exit(main())
