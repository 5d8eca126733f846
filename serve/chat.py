"""`python -m serve.chat`: see `serve.cli.chat`."""

import sys

from serve.cli.chat import main

if __name__ == "__main__":
    sys.exit(main())
