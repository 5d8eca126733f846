"""`python -m serve.batch`: see `serve.cli.batch`."""

import signal
import sys

from serve.cli.batch import main

if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    sys.exit(main())
