"""The table of a server under load: its loads are understood, counted, and a server that does not start is said in a line."""

import contextlib

import pytest

from serve.cli import bench, bench_suite


@pytest.mark.parametrize("load", bench_suite.WORKLOADS, ids=lambda load: load[0])
def test_the_loads_are_the_load_clients(load, tmp_path):
    _, requests, arguments, shown = load
    (tmp_path / "schema.json").write_text("{}")
    given = [str(tmp_path / "schema.json") if argument == bench_suite.SCHEMA_FILE else argument for argument in arguments]
    args = bench.make_parser().parse_args(given)
    assert requests >= args.concurrency or args.concurrency == 1
    assert set(shown) <= set(bench.summarize([], 1.0))


def test_a_load_is_counted(demo_address, tmp_path):
    (tmp_path / "schema.json").write_text('{"type": "boolean"}')
    arguments = (*"--input-len 8 --output-len 6 --concurrency 2 --chat --response-format".split(), bench_suite.SCHEMA_FILE)
    numbers = bench_suite.run_workload(demo_address, 3, arguments, tmp_path / "schema.json", seed=1)
    assert (numbers["successful_requests"], numbers["failed_requests"]) == (3, 0)
    assert numbers["steps"] > 0
    assert numbers["host_ms_a_step"] > 0


def test_no_load_asks_what_another_has_asked(monkeypatch):
    """A picture or prompt that the server has kept would make the later load look fast."""
    sent = []

    async def drawn(args):
        asked = bench.Workload(args, None)
        sent.extend(str(turn.content) for turns in asked.conversations for turn in turns)
        return bench.summarize([], 1.0), []

    monkeypatch.setattr(bench, "run_benchmark", drawn)
    monkeypatch.setattr(bench_suite, "_engine_counters", lambda _: (0.0, 0.0))
    monkeypatch.setattr(bench_suite, "start_server", lambda *_: contextlib.nullcontext(("http://here", 1.0)))
    monkeypatch.setattr(bench_suite, "_startup_times", lambda _: "")
    assert bench_suite.main(["--share", "0.01"]) == 0
    assert len(sent) == len(set(sent)) >= len(bench_suite.WORKLOADS)


def test_a_server_that_does_not_start_is_one_line(tmp_path, capsys):
    assert bench_suite.main(["--model", str(tmp_path), "--cpu", "--output", str(tmp_path / "out.json")]) == 1
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: the server did not start")
    assert "\n" not in error
    assert "config.json" in error
    assert (tmp_path / "out.json").read_text() == "{}\n"
