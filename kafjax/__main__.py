"""`python -m kafjax COMMAND` is `kafjax COMMAND`."""

import sys

from kafjax.cli import main

if __name__ == "__main__":
    sys.exit(main())
