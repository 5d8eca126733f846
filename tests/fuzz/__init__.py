"""Fuzzers of the server: nothing that a client sends may end it, stall it or get a 5xx.

    python -m tests.fuzz http --url http://127.0.0.1:8000 --number 100000 --seed 1
    python -m tests.fuzz media --url http://127.0.0.1:8000 --number 5000 --pid 4321  # the server's process
    python -m tests.fuzz schemas --url http://127.0.0.1:8000 --seed 1 --first 471 --number 1  # one case again

Case i of a seed depends on both numbers alone. `test_fuzz.py` runs some seconds of each against a server in
its own process; `make fuzz` runs more.
"""
