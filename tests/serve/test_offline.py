"""Offline inference: answers in order and as for single conversations, errors with their index, backends."""

import pytest

from serve import offline as offline_module
from serve.offline import Offline
from tests.serve.engine.serial_engine import SerialEngine
from tests.serve.support import FakeModel


def conversation(text):
    return [{"role": "user", "content": text}]


class Model(FakeModel):
    """A fake model with the library's `prepare`."""

    def prepare(self, messages, options):
        return self.processor.assemble(self.plan(messages), []), self.options(**options)


def offline_fake():
    model = Model()
    return Offline(model, SerialEngine(model, max_waiting=64))


def test_answers_come_in_order():
    texts = [f"question {i}" for i in range(100)]
    with offline_fake() as offline:
        assert offline.chat(map(conversation, texts)) == [text.upper() for text in texts]
        assert offline.chat(map(conversation, texts[:2]), max_new_tokens=3, progress=False) == ["QUE", "QUE"]
        assert offline.chat([]) == []


def test_answers_are_those_of_single_conversations(demo, demo_engine):
    offline = Offline(demo, demo_engine)  # not closed: other tests use the engine
    conversations = [conversation(f"Question {i}") for i in range(3)]
    options = {"max_new_tokens": 6, "temperature": 0.0}
    assert offline.chat(conversations, **options) == [demo.chat(messages, **options) for messages in conversations]


def test_requested_backend_reaches_the_engine(monkeypatch):
    device_configs, model = [], Model()

    def make_engine(model, device_config, *_):
        device_configs.append(device_config)
        return SerialEngine(model, max_waiting=64)

    monkeypatch.setattr(offline_module, "make_engine", make_engine)
    with Offline(model, backend="reference") as offline:
        assert offline.chat([conversation("a")]) == ["A"]
    assert [config.backend for config in device_configs] == ["reference"]


def test_backend_for_another_device_is_refused(demo):
    with pytest.raises(ValueError, match=r"backend 'tpu' is for TPU v5, .*; backend 'reference' runs on it"):
        Offline(demo, backend="tpu")


def test_backend_with_an_engine_is_refused(demo, demo_engine):
    with pytest.raises(ValueError, match="backend is 'reference', but the engine given has its kernels already"):
        Offline(demo, demo_engine, backend="reference")


def test_error_has_the_conversations_index():
    with offline_fake() as offline:
        with pytest.raises(ValueError, match="conversation 1: messages is empty"):
            offline.chat([conversation("a"), []])
        assert offline.chat([conversation("b")]) == ["B"]
