"""Compiler options for the tests of training."""

QUICK = {"xla_backend_optimization_level": 0}  # a test runs few steps, so compiling fast matters more than running fast
