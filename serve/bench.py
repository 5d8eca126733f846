"""`python -m serve.bench`: see `serve.cli.bench`."""

import sys

from serve.cli.bench import main

if __name__ == "__main__":
    sys.exit(main())
