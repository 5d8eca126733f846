"""The table of a server under load: its loads are understood, counted, and a server that does not start is said in a line."""

import contextlib

import pytest

from serve.cli import bench
from serve.cli import bench_suite as table


@pytest.mark.parametrize("load", table.LOADS, ids=lambda load: load[0])
def test_the_loads_are_the_load_clients(load, tmp_path):
    _, requests, arguments, shown = load
    (tmp_path / "form.json").write_text("{}")
    given = [str(tmp_path / "form.json") if argument == "FORM" else argument for argument in arguments]
    args = bench.parser().parse_args(given)
    assert requests >= args.concurrency or args.concurrency == 1
    assert set(shown) <= set(bench.summary([], 1.0))


def test_a_load_is_counted(demo_address, tmp_path):
    (tmp_path / "form.json").write_text('{"type": "boolean"}')
    loaded = ("--input-len", "8", "--output-len", "6", "--concurrency", "2", "--chat", "--response-format", "FORM")
    numbers = table.load(demo_address, 3, loaded, tmp_path / "form.json", seed=1)
    assert (numbers["successful_requests"], numbers["failed_requests"]) == (3, 0)
    assert numbers["steps"] > 0
    assert numbers["host_ms_a_step"] > 0


def test_no_load_asks_what_another_has_asked(monkeypatch):
    """A picture or prompt that the server has kept would make the later load look fast."""
    sent = []

    async def drawn(args):
        asked = bench.Load(args, None)
        sent.extend(str(turn.said) for turns in asked.drawn for turn in turns)
        return bench.summary([], 1.0), []

    monkeypatch.setattr(bench, "bench", drawn)
    monkeypatch.setattr(table, "_counters", lambda _: (0.0, 0.0))
    monkeypatch.setattr(table, "server", lambda *_: contextlib.nullcontext(("http://here", 1.0)))
    monkeypatch.setattr(table, "_steps", lambda _: "")
    assert table.main(["--share", "0.01"]) == 0
    assert len(sent) == len(set(sent)) >= len(table.LOADS)


def test_a_server_that_does_not_start_is_one_line(tmp_path, capsys):
    assert table.main(["--model", str(tmp_path), "--cpu", "--output", str(tmp_path / "out.json")]) == 1
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: the server did not start")
    assert "\n" not in error
    assert "config.json" in error
    assert (tmp_path / "out.json").read_text() == "{}\n"
