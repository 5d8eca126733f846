"""How the tests of training compile their steps."""

QUICK = {"xla_backend_optimization_level": 0}  # a step compiles in 4 s of a core where it took 10, and runs three times as long
