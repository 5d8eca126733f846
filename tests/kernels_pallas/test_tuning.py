"""Tuned configurations: the file's entries are candidates, and the tuner finds the fastest."""

import functools
import json
from types import SimpleNamespace

import pytest

from kernels_pallas import tune, tuning
from kernels_pallas.backends import DEVICE_KIND_PREFIXES
from kernels_pallas.bench import benchmarks
from kernels_pallas.benchmarking import Benchmark
from kernels_pallas.tuning import FILE, TuningSpace, read, tuned_config, write

KERNELS = {(space.backend, space.kernel): space for space in tune.TUNING_SPACES}


def test_every_entry_is_a_candidate_of_its_kernel():
    for backend, kinds in read(FILE).items():
        for kind, kernels in kinds.items():
            assert kind.startswith(DEVICE_KIND_PREFIXES[backend])
            assert set(kernels) == {kernel for of, kernel in KERNELS if of == backend}
            for kernel, configs in kernels.items():
                space = KERNELS[backend, kernel]
                assert [config.get("most") for config in configs] == list(space.benchmarks)
                assert all({name: x for name, x in config.items() if name != "most"} in space.candidates for config in configs)


def test_every_tuning_space_names_existing_benchmarks():
    lines = {benchmark.name for benchmark in benchmarks()}
    for space in tune.TUNING_SPACES:
        assert all(set(names) <= lines for names in space.benchmarks.values())


def test_file_is_formatted_as_the_tuner_writes_it(tmp_path):
    write(tmp_path / "table.json", read(FILE))
    assert (tmp_path / "table.json").read_text() == FILE.read_text()


def test_device_without_an_entry_uses_the_nearest(monkeypatch):
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
def test_bounds_must_increase_and_end_in_none(tmp_path, bounds):
    path = tmp_path / "table.json"
    configs = [{"n": 1} if most is None else {"most": most, "n": 1} for most in bounds]
    path.write_text(json.dumps({"hopper": {"NVIDIA H200": {"x": configs}}}))
    with pytest.raises(
        ValueError, match=r"table.json: hopper, NVIDIA H200, x has bounds \[.*\], which must go up and end in none"
    ):
        read(path)


def test_tuner_selects_the_fastest_of_each_class(monkeypatch):
    space = TuningSpace("hopper", "x", ({"n": 1}, {"n": 2}, {"n": 3}), {127: ("small",), None: ("large", "larger")})
    best, calls = {"small": 3, "large": 2, "larger": 2}, []

    def run(name, backend):  # the configuration is read inside the call, as in a kernel
        calls.append((name, backend))
        return lambda: abs(tuned_config("hopper", "x", 500).n - best[name])

    lines = [Benchmark(name, functools.partial(run, name), 1, 1) for name in best]
    monkeypatch.setattr(tune, "benchmarks", lambda: lines)
    table = {"hopper": {"NVIDIA H200": {"x": [{"n": 1}], "y": [{"n": 5}]}}}
    configs = tune.tune(space, "NVIDIA H100", table, timer=lambda call: call())
    assert configs == [{"most": 127, "n": 3}, {"n": 2}]
    assert set(calls) == {(name, "hopper") for name in best}


def test_interrupted_tuner_keeps_its_measurements(monkeypatch, tmp_path):
    path, kind = tmp_path / "tuning.json", "NVIDIA H200 NVL"
    write(path, read(FILE))

    def measured(space, *_):
        if space.kernel != "gated_delta_scan":
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
