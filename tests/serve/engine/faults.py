"""Fault injection, for tests alone: makes one named function raise at its n-th call.

    with failing(OffloadedPrefix, "finish", RuntimeError) as fault:
        ...
    assert fault.raised

A target is an attribute of an object, a class or a module (`failing`), or a device program of a model runner
(`failing_program`). A device program takes its donated arguments when it runs. So it can fail before that,
with the state intact, or after it (`after=True`), with the state gone.
"""

import contextlib
import functools
import threading

MESSAGE = "injected fault"


class Panic(BaseException):
    """Stands for pyo3's PanicException: a panic of a Rust library is a BaseException and no Exception."""


class Fault:
    """A fault of wrapped functions, counted over all of them.

    Args:
      error: class of the error.
      call: the first call that raises, from 1.
      times: number of calls that raise, from there on.
      after: True to raise after the function has run.
    """

    def __init__(self, error, call=1, times=1, after=False):
        self._error, self._first, self._times, self._after = error, call, times, after
        self._lock = threading.Lock()
        self.calls = 0

    @property
    def raised(self):
        """True if a call has raised."""
        return self.calls >= self._first

    def wrap(self, function):
        """Returns the function with the fault."""

        @functools.wraps(function)
        def faulty(*args, **kwargs):
            with self._lock:
                self.calls += 1
                fails = self._first <= self.calls < self._first + self._times
            if fails and not self._after:
                raise self._error(MESSAGE)
            result = function(*args, **kwargs)
            if fails:
                raise self._error(MESSAGE)
            return result

        return faulty


@contextlib.contextmanager
def failing(owner, name, error=RuntimeError, **when):
    """Wraps `owner.name`; see `Fault` for `when`."""
    fault, own = Fault(error, **when), vars(owner).get(name)
    setattr(owner, name, fault.wrap(getattr(owner, name)))
    try:
        yield fault
    finally:
        if own is None:
            delattr(owner, name)
        else:
            setattr(owner, name, own)


@contextlib.contextmanager
def failing_program(runner, name, error=RuntimeError, **when):
    """Wraps the device programs of this name, of all shapes."""
    fault, programs = Fault(error, **when), runner._programs._compiled
    found = {key: program for key, program in programs.items() if name in (key, key[0])}
    assert found, f"no program is called {name!r}"
    programs.update({key: fault.wrap(program) for key, program in found.items()})
    try:
        yield fault
    finally:
        programs.update(found)
