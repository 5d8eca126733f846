"""`python -m serve.table`: see `serve.cli.bench_suite`."""

import sys

from serve.cli.bench_suite import main

if __name__ == "__main__":
    sys.exit(main())
