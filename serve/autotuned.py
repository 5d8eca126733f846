"""`python -m serve.autotuned`: see `serve.runtime.xla_autotune_cache`."""

import sys

from serve.runtime.xla_autotune_cache import main

if __name__ == "__main__":
    sys.exit(main())
