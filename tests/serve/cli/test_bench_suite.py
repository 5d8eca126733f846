"""The benchmark suite: valid workloads, counted requests, and a server that fails to start."""

import contextlib

import pytest

from serve.cli import bench, bench_suite


@pytest.mark.parametrize("workload", bench_suite.WORKLOADS, ids=lambda workload: workload[0])
def test_workloads_are_valid_arguments_of_the_load_client(workload, tmp_path):
    _, requests, arguments, printed = workload
    (tmp_path / "schema.json").write_text("{}")
    arguments = [str(tmp_path / "schema.json") if argument == bench_suite.SCHEMA_FILE else argument for argument in arguments]
    args = bench.make_parser().parse_args(arguments)
    assert requests >= args.concurrency or args.concurrency == 1
    assert set(printed) <= set(bench.summarize([], 1.0))


def test_workload_counts_requests_and_steps(demo_address, tmp_path):
    (tmp_path / "schema.json").write_text('{"type": "boolean"}')
    arguments = (*"--input-len 8 --output-len 6 --concurrency 2 --chat --response-format".split(), bench_suite.SCHEMA_FILE)
    numbers = bench_suite.run_workload(demo_address, 3, arguments, tmp_path / "schema.json", seed=1)
    assert (numbers["successful_requests"], numbers["failed_requests"]) == (3, 0)
    assert numbers["steps"] > 0
    assert numbers["host_ms_a_step"] > 0


def test_workloads_share_no_content(monkeypatch):
    """A cached image or prompt would make the later workload look fast."""
    sent = []

    async def record(args):
        workload = bench.Workload(args, None)
        sent.extend(str(turn.content) for turns in workload.conversations for turn in turns)
        return bench.summarize([], 1.0), []

    monkeypatch.setattr(bench, "run_benchmark", record)
    monkeypatch.setattr(bench_suite, "_engine_counters", lambda _: (0.0, 0.0))
    monkeypatch.setattr(bench_suite, "start_server", lambda *_: contextlib.nullcontext(("http://here", 1.0)))
    monkeypatch.setattr(bench_suite, "_startup_times", lambda _: "")
    assert bench_suite.main(["--share", "0.01"]) == 0
    assert len(sent) == len(set(sent)) >= len(bench_suite.WORKLOADS)


def test_server_that_fails_to_start_is_one_line(tmp_path, capsys):
    assert bench_suite.main(["--model", str(tmp_path), "--cpu", "--output", str(tmp_path / "out.json")]) == 1
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: the server did not start")
    assert "\n" not in error
    assert "config.json" in error
    assert (tmp_path / "out.json").read_text() == "{}\n"
