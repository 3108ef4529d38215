"""The report of preflight on compiled steps, as data and as text."""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import jax

from spectral_pod.analysis import gpu_time, hardware, hlo, hlo_cost, tpu_time
from spectral_pod.analysis.estimate import Estimate, estimate
from spectral_pod.analysis.hardware import Chip
from spectral_pod.analysis.hlo import Collective
from spectral_pod.analysis.kernel_calls import Signature
from spectral_pod.analysis.kernel_schedule import Schedule
from spectral_pod.analysis.provenance import describe, parameter_shapes
from spectral_pod.analysis.roofline import Roofline, roofline
from spectral_pod.config import row_len

from .compiled_step import Compiled, Setup, bytes_per_chip

_BOUNDS = [field.name for field in dataclasses.fields(Roofline)]
_ESTIMATES = [field.name for field in dataclasses.fields(Estimate)]
_SHOWN = 5  # operations of the estimate


@dataclasses.dataclass(frozen=True)
class Report:
    text: str
    data: dict[str, Any]  # as `--json` writes it
    grows: bool  # a collective moves more bytes a chip when slice and batch grow together


def make(
    setup: Setup,
    compiled: dict[str, Compiled],
    schedules: Mapping[Signature, Schedule],
    other: tuple[Setup, dict[str, Compiled]] | None,
    price_per_chip_hour: float | None = None,
) -> Report:
    """The report on a setup's compiled steps, compared with those of another size of slice.

    In the data, sizes are bytes per chip and FLOPs those of one chip and step, or of one device of
    a chip that has two; what is unknown of a step that did not compile, or of its estimate, is
    None. Hours and cost are those of the estimate, or else at least those of the roofline.
    """
    config, topology, train = setup.config, setup.topology, compiled["train"]
    found = {name: _collectives(setup, one) for name, one in compiled.items()}
    grown = {name: _grown(setup, name, compiled, other) for name in compiled}
    rows = {
        name: _rows(setup, found[name], [one for one, _ in grown[name]]) if one.text else None
        for name, one in compiled.items()
    }
    hbm = {name: _memory(setup, one) for name, one in compiled.items()}
    notes = {_growth(name, *pair) for name, pairs in grown.items() for pair in pairs}
    if other is None:
        reason = "there is no other size to compare with" if "eval" in compiled else "--quick"
        notes.add(f"{reason}: growth of collectives isn't checked")
    else:
        notes |= {
            f"{name}: growth of collectives isn't checked, as the step did not compile for "
            f"{(setup if not compiled[name].text else other[0]).topology}"
            for name in compiled
            if not (compiled[name].text and other[1][name].text)
        }

    analytic = setup.analytic_flops / topology.num_devices
    lowered, bound, expected, hours = None, None, None, 0.0
    if train.text:
        program = hlo.Program(train.text)
        lowered = hlo_cost.flops(program, rare=False)
        bound = roofline(
            matrix_work=hlo_cost.matrix_work(program, topology.chip, rare=False),
            traffic=hlo_cost.traffic(program, rare=False),
            collectives=found["train"],
            analytic_flops=analytic,
            chip=topology.chip,
        )
        if topology.chip.platform == "gpu":
            kernels = gpu_time.kernels(setup.traced.jaxpr.jaxpr, topology.chip)
            seconds = gpu_time.seconds(program, kernels, topology.chip)
        else:
            seconds = tpu_time.seconds(program, schedules, topology.chip)
        if topology.chip.platform != "cpu":
            expected = estimate(program, seconds, bound.network_s, topology.chip)
        step_s = expected.step_s if expected else bound.step_s
        hours = config.train.total_steps * step_s / 3600
        notes |= program.notes | {one.note for one in schedules.values() if one.note}
    tokens = config.train.global_batch_size * row_len(config)
    data = {
        "fits": not any(_overflows(one) for one in hbm.values()),
        "chips": topology.num_chips,
        "devices": topology.num_devices,
        "hosts": setup.num_hosts,
        "hbm": hbm["train"],
        "collectives": rows["train"],
        "flops": {"lowered": lowered, "analytic": analytic},
        "roofline": dataclasses.asdict(bound) if bound else dict.fromkeys(_BOUNDS),
        "estimate": dataclasses.asdict(expected) if expected else dict.fromkeys(_ESTIMATES),
        "topology": str(topology),
        "mesh": dict(setup.mesh.shape),
        "parameters_per_chip": bytes_per_chip(setup.abstract.params),
        "optimizer_per_chip": bytes_per_chip(setup.abstract.opt_state),
        "tokens_per_second": tokens / bound.step_s if bound else None,
        "eval": {"hbm": hbm.get("eval"), "collectives": rows.get("eval")},
        "operations": {name: one._asdict() for name, one in setup.operations.items()},
        "notes": sorted(notes),
    }
    if price_per_chip_hour is not None and bound:
        data["cost"] = hours * topology.num_chips * price_per_chip_hour
    grows = any(grown.values())
    return Report(_text(setup, data, compiled, hours, grows), data, grows)


def _collectives(setup: Setup, compiled: Compiled) -> list[Collective]:
    if not compiled.text:
        return []
    return hlo.collectives(compiled.text, dict(setup.mesh.shape), setup.topology.num_slices)


def _grown(
    setup: Setup,
    name: str,
    compiled: dict[str, Compiled],
    other: tuple[Setup, dict[str, Compiled]] | None,
) -> list[tuple[Collective, Collective | None]]:
    """The collectives of a step that grow, each with its counterpart in the other setup."""
    if other is None or not compiled[name].text or not other[1][name].text:
        return []
    mine, theirs = _collectives(setup, compiled[name]), _collectives(other[0], other[1][name])
    if other[0].topology.num_chips < setup.topology.num_chips:
        return hlo.grown(theirs, mine)
    return [(here or larger, larger) for larger, here in hlo.grown(mine, theirs)]


def _growth(name: str, one: Collective, cover: Collective | None) -> str:
    other = f"{_size(cover.bytes)} by {cover.kind}" if cover else "nothing like it"
    return (
        f"{name}: the {one.kind} of {one.what} from {one.source or 'an unnamed operation'} scales "
        f"with the batch: {_size(one.bytes)} a chip here, {other} on the other size of slice"
    )


def _rows(setup: Setup, found: list[Collective], grown: list[Collective]) -> list[dict[str, Any]]:
    """The collectives as in the JSON report, with equal ones counted in one row."""
    leaves = jax.tree_util.tree_leaves_with_path(setup.abstract.params)
    names = {jax.tree_util.keystr(k, simple=True, separator="/"): x.shape for k, x in leaves}
    parameters = parameter_shapes(names, setup.mesh.shape)
    rows: dict[tuple[Any, ...], dict[str, Any]] = {}
    for one in found:
        row = {
            "kind": one.kind,
            "count": 0,
            "bytes": one.bytes,
            "axes": list(one.axes),
            "link": one.link,
            "what": describe(one, parameters),
            "scales_with_batch": one in grown,
        }
        key = tuple(map(str, row.values()))
        rows.setdefault(key, row)["count"] += one.count
    return list(rows.values())


def _memory(setup: Setup, compiled: Compiled) -> dict[str, int | None]:
    """Bytes of a chip's HBM; the headroom accounts for the program and undonated results.

    If memory ran out, temporaries and headroom are None unless the compiler's message says them.
    """
    capacity = hardware.memory(setup.topology)
    if compiled.out_of_memory:
        arguments = bytes_per_chip(setup.abstract)
        temporaries = _temporaries(compiled.out_of_memory)
        headroom = None if temporaries is None else capacity - arguments - temporaries
        return {
            "capacity": capacity,
            "arguments": arguments,
            "temporaries": temporaries,
            "headroom": headroom if headroom is not None and headroom < 0 else None,
        }
    return {
        "capacity": capacity,
        "arguments": compiled.memory["argument"],
        "temporaries": compiled.memory["temp"],
        "headroom": capacity - compiled.peak_bytes,
    }


def _temporaries(message: str) -> int | None:
    """Bytes of temporaries that a program which ran out needs, if the message says so."""
    match = re.search(r"HLO temporaries \(([\d.]+)([KMG])\)", message)
    return int(float(match[1]) * 1024 ** (1 + "KMG".index(match[2]))) if match else None


def _overflows(hbm: Mapping[str, int | None]) -> bool:
    """Whether a step does not fit; by how much may be unknown."""
    return hbm["headroom"] is None or hbm["headroom"] < 0


def advice(
    setup: Setup, train: Mapping[str, int | None], evaluation: Mapping[str, int | None] | None
) -> list[str]:
    """Changes that make the steps fit, the most promising first."""
    config, shape = setup.config, setup.mesh.shape
    state, found = bytes_per_chip(setup.abstract), []
    half = 0.5 * hardware.memory(setup.topology)
    if state > (half if train["temporaries"] is None else min(train["temporaries"], half)):
        found.append(
            f"config.mesh.fsdp={2 * shape['fsdp']} halves the {_size(state)} of parameters and "
            "optimizer state on each chip"
        )
    if _overflows(train):
        if config.model.remat != "full":
            found.append(
                f"config.model.remat='full' (it is {config.model.remat!r}) computes activations "
                "again instead of keeping them"
            )
        micro_batches = config.train.grad_accumulation
        if config.train.global_batch_size > shape["data"] * shape["fsdp"] * micro_batches:
            found.append(
                f"config.train.grad_accumulation={2 * micro_batches} halves the activations at the "
                "same batch"
            )
        found.append(
            "more chips, or a smaller config.train.global_batch_size or config.data.seq_len"
        )
    elif evaluation and _overflows(evaluation):
        found.append("a smaller config.train.eval_batch_size")
    return found


def axes(shape: Mapping[str, int]) -> str:
    return " ".join(f"{axis}={size}" for axis, size in shape.items() if size > 1) or "of one chip"


def _text(
    setup: Setup,
    data: dict[str, Any],
    compiled: dict[str, Compiled],
    hours: float,
    grows: bool,
) -> str:
    topology, config, bound = setup.topology, setup.config, data["roofline"]
    unit = "a chip" if topology.chip.devices == 1 else "a device"
    devices = "" if topology.chip.devices == 1 else f" of {topology.chip.devices} devices"
    lines = [
        f"{topology}  {data['chips']} chips{devices}, {data['hosts']} hosts  mesh "
        f"{axes(data['mesh'])}",
        f"parameters {_size(data['parameters_per_chip'])}, optimizer "
        f"{_size(data['optimizer_per_chip'])} {unit}",
    ]
    lines += [f"{name} by {choice}" for name, choice in setup.operations.items()]
    steps = {"train": data, "eval": data["eval"]}
    for name, hbm in ((name, steps[name]["hbm"]) for name in compiled):
        lines.append(
            f"{name} step: HBM {_size(hbm['capacity'])}, arguments {_size(hbm['arguments'])}, "
            f"temporaries {_size(hbm['temporaries'])}, headroom {_size(hbm['headroom'])}"
            + (", ran out of memory" if compiled[name].out_of_memory else "")
        )
    for name, rows in ((name, steps[name]["collectives"]) for name in compiled):
        lines += ["", f"{name} step: {_total(rows)}"] + (_table(rows) if rows else [])
    lines.append("")
    if data["flops"]["lowered"] is not None:
        chip, rate = topology.chip, data["tokens_per_second"] or 0.0
        lines += [
            f"FLOPs {unit} and step: {data['flops']['lowered']:.3g} as lowered, "
            f"{data['flops']['analytic']:.3g} analytic",
            f"roofline at {chip.peak_flops / 1e12:.3g} TFLOP/s, HBM "
            f"{chip.hbm_bandwidth / 1e9:.0f} GB/s, {'NVLink' if chip.platform == 'gpu' else 'ICI'} "
            f"{chip.ici_bandwidth / 1e9:.0f} GB/s, DCN "
            f"{chip.dcn_bandwidth / 1e9:.3g} GB/s a host"
            + (" (nominal figures)" if chip.family == "cpu" else "")
            + f": compute {_time(bound['compute_s'])}, memory {_time(bound['memory_s'])}, "
            f"network {_time(bound['network_s'])}",
            f"a step takes at least {_time(bound['step_s'])}: MFU at most "
            f"{bound['mfu_ceiling']:.1%}, {rate:,.0f} bytes/s at most",
            *_estimated(data, chip),
            f"{config.train.total_steps:,} steps take "
            + ("about" if data["estimate"]["step_s"] else "at least")
            + f" {hours:.3g} hours"
            + (f" and cost {data['cost']:,.2f}" if "cost" in data else "")
            + (" by the estimate" if data["estimate"]["step_s"] else " by the roofline")
            + ", evaluations not counted",
        ]
    lines += [f"note: {note}" for note in data["notes"]]
    if not data["fits"]:
        for name in compiled:
            if compiled[name].out_of_memory:
                lines.append(f"{name} step: {compiled[name].out_of_memory.strip().splitlines()[0]}")
        lines.append("DOES NOT FIT. What helps:")
        lines += [f"  - {line}" for line in advice(setup, data["hbm"], data["eval"]["hbm"])]
    elif grows:
        lines.append("FITS, but a collective grows with the batch: it won't scale (see notes)")
    else:
        lines.append("FITS" if "eval" in compiled else "FITS; the evaluation step was not compiled")
    return "\n".join(lines)


def _estimated(data: dict[str, Any], chip: Chip) -> list[str]:
    found = data["estimate"]
    if found["step_s"] is None:
        return ["not estimated: only libtpu says how long its instructions take, and this is a CPU"]
    mfu = data["flops"]["analytic"] / (chip.peak_flops * found["step_s"])
    source = (
        "what was measured on one H100"
        if chip.platform == "gpu"
        else "the compiler's own estimates, never compared with hardware"
    )
    lines = [
        f"a step takes about {_time(found['step_s'])} by {source}: MFU {mfu:.1%}",
        f"  compiled {_time(found['compiled_s'])}, kernels {_time(found['kernels_s'])}, network "
        f"{_time(found['network_s'])}; HBM alone {_time(found['memory_s'])}; "
        f"{found['launches']:,} {'launches' if chip.platform == 'gpu' else 'instructions'}",
    ]
    if found["fallbacks_s"] > 0:
        lines.append(f"  if every fall-back ran, {_time(found['fallbacks_s'])} more")
    for row in found["operations"][:_SHOWN]:
        lines.append(
            f"  {row['share']:>6.1%} {_time(row['seconds']):>9}  {row['what']}, "
            f"{row['runs']:,} instructions"
        )
    return lines


def _total(rows: list[dict[str, Any]] | None) -> str:
    if rows is None:
        return "collectives unknown, as it did not compile"
    moved = {
        link: sum(row["count"] * row["bytes"] for row in rows if row["link"] == link)
        for link in ("ICI", "DCN")
    }
    count = sum(row["count"] for row in rows)
    sizes = ", ".join(f"{_size(size)} over {link}" for link, size in moved.items() if size)
    return f"{count} collectives a step, {sizes}" if sizes else "no collectives"


def _table(rows: list[dict[str, Any]]) -> list[str]:
    lines = [f"  {'kind':<18}{'count':>6}{'bytes':>10}  {'axes':<18}{'link':<5}what"]
    for row in sorted(rows, key=lambda row: -row["count"] * row["bytes"]):
        grows = "  GROWS" if row["scales_with_batch"] else ""
        lines.append(
            f"  {row['kind']:<18}{row['count']:>6}{_size(row['bytes']):>10}  "
            f"{','.join(row['axes']):<18}{row['link']:<5}{row['what']}{grows}"
        )
    return lines


def _size(count: float | None) -> str:
    if count is None:
        return "unknown"
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def _time(seconds: float) -> str:
    return f"{seconds:.3g} s" if seconds >= 1 else f"{seconds * 1e3:.3g} ms"
