"""An engine over a fake model: one request after the other, in the order of submission. What the HTTP layer's tests talk to."""

import contextlib
import types
from collections import deque

from serve.engine.engine_client import Cancelled, EngineClient, EngineStopped, notify_readers


class SerialEngine(EngineClient):
    """Runs `model.generate(inputs, options)` for one job at a time; `max_waiting` more may wait."""

    def __init__(self, model, max_waiting=16):
        super().__init__(max_waiting + 1)
        self._model = model
        self._waiting = deque()
        self.metrics = types.SimpleNamespace(text=lambda: b"")
        self.start()

    @property
    def max_model_len(self):
        return self._model.config.text.max_position_embeddings

    def add_request(self, job, inputs, options):
        with self.changed:
            if self.stopping:
                raise EngineStopped
            self._waiting.append((job, inputs, options))
            self.changed.notify_all()

    def abort_request(self, job):
        with self.changed:
            there = [entry for entry in self._waiting if entry[0] is job]
            for entry in there:
                self._waiting.remove(entry)
        if there:
            self.finish_request(job, Cancelled())

    def work(self):
        while True:
            with self.changed:
                self.changed.wait_for(lambda: self._waiting or self.stopping)
                if self.stopping:
                    break
                job, inputs, options = self._waiting.popleft()
            self.finish_request(job, self._answer(job, inputs, options))
        for job, *_ in self._waiting:
            self.finish_request(job, EngineStopped())

    def _answer(self, job, inputs, options):
        try:
            with contextlib.closing(self._model.generate(inputs, options)) as deltas:
                for delta in deltas:
                    if job.cancelled or self.stopping:
                        return EngineStopped() if self.stopping else Cancelled()
                    if delta.finish_reason is not None:
                        return delta
                    if job.deliver(delta):
                        notify_readers([job])
        except Exception as error:
            return error
        raise AssertionError("the fake model's answer has no end")
