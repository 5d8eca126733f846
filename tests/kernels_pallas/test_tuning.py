"""How the kernels cut their work: every entry of the file is one of its kernel's candidates, and the tuner finds the fastest."""

import functools
import json
from types import SimpleNamespace

import pytest

from kernels_pallas import tune, tuning
from kernels_pallas.backends import CHIPS
from kernels_pallas.bench import benchmarks
from kernels_pallas.benchmarking import Benchmark
from kernels_pallas.tuning import FILE, TuningSpace, read, tuned_config, write

KERNELS = {(tuned.backend, tuned.kernel): tuned for tuned in tune.TUNING_SPACES}


def test_every_entry_is_one_of_its_kernels_candidates():
    for family, kinds in read(FILE).items():
        for kind, kernels in kinds.items():
            assert kind.startswith(CHIPS[family])
            assert set(kernels) == {kernel for of, kernel in KERNELS if of == family}
            for kernel, cuts in kernels.items():
                tuned = KERNELS[family, kernel]
                assert [cut.get("most") for cut in cuts] == list(tuned.benchmarks)
                assert all({name: x for name, x in cut.items() if name != "most"} in tuned.candidates for cut in cuts)


def test_every_kernel_is_measured_by_lines_of_the_benchmark():
    lines = {work.name for work in benchmarks()}
    for tuned in tune.TUNING_SPACES:
        assert all(set(names) <= lines for names in tuned.benchmarks.values())


def test_the_file_is_as_the_tuner_writes_it(tmp_path):
    write(tmp_path / "table.json", read(FILE))
    assert (tmp_path / "table.json").read_text() == FILE.read_text()


def test_a_device_without_an_entry_takes_the_nearest(monkeypatch):
    table = {
        "hopper": {kind: {"x": [{"most": 8, "n": n}, {"n": -n}]} for n, kind in enumerate(("NVIDIA H200", "NVIDIA H100"), 1)}
    }
    found = {}
    for kind in ("NVIDIA H100 80GB HBM3", "NVIDIA H200", "NVIDIA GH200 480GB", "cpu"):
        monkeypatch.setattr(tuning, "device_kind", lambda kind=kind: kind)
        with tuning.using(table):
            found[kind] = tuned_config("hopper", "x", 8).n, tuned_config("hopper", "x", 9).n
    assert found == {
        "NVIDIA H100 80GB HBM3": (2, -2),
        "NVIDIA H200": (1, -1),
        "NVIDIA GH200 480GB": (1, -1),
        "cpu": (1, -1),
    }


@pytest.mark.parametrize("bounds", [[], [8], [8, 8, None], [None, None], [9, 8, None]])
def test_bounds_must_go_up_and_end_in_none(tmp_path, bounds):
    path = tmp_path / "table.json"
    cuts = [{"n": 1} if most is None else {"most": most, "n": 1} for most in bounds]
    path.write_text(json.dumps({"hopper": {"NVIDIA H200": {"x": cuts}}}))
    with pytest.raises(
        ValueError, match=r"table.json: hopper, NVIDIA H200, x has bounds \[.*\], which must go up and end in none"
    ):
        read(path)


def test_the_tuner_takes_the_fastest_of_each_class(monkeypatch):
    tuned = TuningSpace("hopper", "x", ({"n": 1}, {"n": 2}, {"n": 3}), {127: ("small",), None: ("large", "larger")})
    best, calls = {"small": 3, "large": 2, "larger": 2}, []

    def run(name, backend):  # what is chosen is asked for where the call is made, as in a kernel
        calls.append((name, backend))
        return lambda: abs(tuned_config("hopper", "x", 500).n - best[name])

    lines = [Benchmark(name, functools.partial(run, name), 1, 1) for name in best]
    monkeypatch.setattr(tune, "benchmarks", lambda: lines)
    table = {"hopper": {"NVIDIA H200": {"x": [{"n": 1}], "y": [{"n": 5}]}}}
    cuts = tune.tune(tuned, "NVIDIA H100", table, timer=lambda call: call())
    assert cuts == [{"most": 127, "n": 3}, {"n": 2}]
    assert set(calls) == {(name, "hopper") for name in best}


def test_what_has_been_measured_is_kept_when_the_tuner_is_stopped(monkeypatch, tmp_path):
    path, kind = tmp_path / "tuning.json", "NVIDIA H200 NVL"
    write(path, read(FILE))

    def measured(tuned, *_):
        if tuned.kernel != "gated_delta_scan":
            raise KeyboardInterrupt
        return [{"groups": 7}]

    monkeypatch.setattr(tune, "FILE", path)
    monkeypatch.setattr(tune, "tune", measured)
    monkeypatch.setattr(tune.jax, "devices", lambda: [SimpleNamespace(device_kind=kind)])
    monkeypatch.setattr("sys.argv", ["tune"])
    with pytest.raises(KeyboardInterrupt):
        tune.main()
    found, before = json.loads(path.read_text())["hopper"], read(FILE)["hopper"]
    assert found == before | {kind: before["NVIDIA H200"] | {"gated_delta_scan": [{"groups": 7}]}}
