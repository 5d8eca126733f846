"""One of two hosts of a training run, with two virtual devices each.

Usage: `python -m tests.minicpmv46_jax.train.two_hosts PORT HOST SETTINGS STOP`.
"""

import json
import os
import sys

os.environ.update(JAX_PLATFORMS="cpu", XLA_FLAGS="--xla_force_host_platform_device_count=2")

import jax

from minicpmv46_jax.train.run import train
from minicpmv46_jax.train.settings import Settings
from tests.minicpmv46_jax.train.train_compile import QUICK


def main() -> None:
    port, host, settings, stop = sys.argv[1:]
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"127.0.0.1:{port}", 2, int(host))
    assert len(jax.devices()) == 4
    train(Settings.from_dict(json.loads(settings)), stop=lambda step: step == int(stop), compiler_options=QUICK)


if __name__ == "__main__":
    main()
