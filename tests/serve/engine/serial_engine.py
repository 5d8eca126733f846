"""An engine over a fake model for the HTTP layer's tests: one request after another, in the order of
submission.
"""

import contextlib
import types
from collections import deque

from serve.engine.engine_client import Cancelled, EngineClient, EngineStopped, notify_readers


class SerialEngine(EngineClient):
    """Runs `model.generate(inputs, options)` for one request at a time; `max_waiting` more may wait."""

    def __init__(self, model, max_waiting=16):
        super().__init__(max_waiting + 1)
        self._model = model
        self._waiting = deque()
        self.metrics = types.SimpleNamespace(text=lambda: b"")
        self.start()

    @property
    def max_model_len(self):
        return self._model.config.text.max_position_embeddings

    def add_request(self, handle, inputs, options, cache_salt):
        with self.changed:
            if self.stopping:
                raise self.stopped_error()
            self._waiting.append((handle, inputs, options))
            self.changed.notify_all()

    def abort_request(self, handle):
        with self.changed:
            found = [entry for entry in self._waiting if entry[0] is handle]
            for entry in found:
                self._waiting.remove(entry)
        if found:
            self.finish_request(handle, Cancelled())

    def run(self):
        while True:
            with self.changed:
                self.changed.wait_for(lambda: self._waiting or self.stopping)
                if self.stopping:
                    break
                handle, inputs, options = self._waiting.popleft()
            self.finish_request(handle, self._generate(handle, inputs, options))

    def _generate(self, handle, inputs, options):
        try:
            with contextlib.closing(self._model.generate(inputs, options)) as deltas:
                for delta in deltas:
                    if handle.cancelled or self.stopping:
                        return EngineStopped() if self.stopping else Cancelled()
                    if delta.finish_reason is not None:
                        return delta
                    if handle.deliver(delta):
                        notify_readers([handle])
        except Exception as error:
            return error
        raise AssertionError("the fake model's output has no end")
