"""`python -m convert.train_demo`: see `convert.demo.train`."""

import sys

from convert.demo.train import main

if __name__ == "__main__":
    sys.exit(main())
