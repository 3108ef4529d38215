"""The HLO parser: on small texts with known results, and on real compiled programs."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spectral_pod.analysis import hlo, hlo_cost
from spectral_pod.analysis.hardware import CHIPS
from spectral_pod.analysis.hlo import Array, Collective
from spectral_pod.analysis.provenance import describe, parameter_shapes

MESH = {"data": 4, "fsdp": 2}


def program(body, others="", partitions=8):
    """The text of a module whose entry computation is `body`, given without indentation."""
    lines = "\n".join(f"  {line}" for line in body.strip().splitlines())
    entry = f"ENTRY %main () -> f32[] {{\n{lines}\n}}\n"
    return f"HloModule m, num_partitions={partitions}\n{others}\n{entry}"


def only(text, **options):
    (found,) = hlo.collectives(text, **options)
    return found


# ---- groups of devices


@pytest.mark.parametrize(
    ("groups", "axes", "members"),
    [
        ("replica_groups={{0,1},{2,3},{4,5},{6,7}}", ("fsdp",), 2),
        ("replica_groups={{0,2,4,6},{1,3,5,7}}", ("data",), 4),
        ("replica_groups={{0,1,2,3,4,5,6,7}}", ("data", "fsdp"), 8),
        ("replica_groups={}", ("data", "fsdp"), 8),
        ("replica_groups=[4,2]<=[8]", ("fsdp",), 2),
        ("replica_groups=[2,4]<=[4,2]T(1,0)", ("data",), 4),
        ("replica_groups=[1,8]<=[8]", ("data", "fsdp"), 8),
        ("replica_groups=mesh['axis_0'=4,'axis_1'=2] {'axis_1'}", ("fsdp",), 2),
        ("replica_groups=mesh['axis_0'=4,'axis_1'=2] {'axis_0'}", ("data",), 4),
        ("replica_groups=mesh['axis_0'=8] {'axis_0'}", ("data", "fsdp"), 8),
        ("replica_groups=mesh['axis_0'=8] {'axis_0':(4)2}", ("fsdp",), 2),
        ("replica_groups=mesh['axis_0'=8] {'axis_0':(1)4}", ("data",), 4),
        ("replica_groups=mesh['a'=2,'b'=4] {'b':(2)2,'a'}", ("data", "fsdp"), 4),
        ("replica_groups=mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'a'}", ("fsdp",), 2),
        ("replica_groups=mesh['a'=2,'b'=4], device_ids=(0,2,4,6,1,3,5,7) {'b'}", ("data",), 4),
    ],
)
def test_every_notation_of_groups(groups, axes, members):
    text = program(f"%x = f32[4]{{0}} all-reduce(%y), channel_id=1, {groups}, to_apply=%add")
    found = only(text, mesh_shape=MESH)
    assert (found.axes, found.group_size) == (axes, members)


def test_mesh_groups_are_the_iota_groups():
    for axes, iota in (("'a'", "[12,2]<=[2,12]T(1,0)"), ("'c','a'", "[3,8]<=[2,3,4]T(1,0,2)")):
        mesh = hlo.replica_groups(f"replica_groups=mesh['a'=2,'b'=3,'c'=4] {{{axes}}}", 24)
        listed = hlo.replica_groups(f"replica_groups={iota}", 24)
        assert {frozenset(g) for g in mesh.tolist()} == {frozenset(g) for g in listed.tolist()}


def test_an_unknown_spelling_is_an_error():
    with pytest.raises(ValueError, match="unknown spelling"):
        hlo.replica_groups("replica_groups=ring(0,1)", 2)


def test_a_permute_has_pairs():
    text = program("%x = f32[4]{0} collective-permute(%y), source_target_pairs={{0,2},{2,4},{4,6}}")
    found = only(text, mesh_shape=MESH)
    assert (found.axes, found.bytes, found.sent) == (("data",), 16, 16)


@pytest.mark.parametrize(
    ("groups", "link"),
    [("{{0,1},{2,3},{4,5},{6,7}}", "ICI"), ("{{0,1,2,3},{4,5,6,7}}", "ICI"),
     ("{{0,4},{1,5},{2,6},{3,7}}", "DCN")],
)  # fmt: skip
def test_a_group_over_slices_uses_dcn(groups, link):
    text = program(f"%x = f32[4]{{0}} all-gather(%y), replica_groups={groups}, dimensions={{0}}")
    assert only(text, mesh_shape=MESH, num_slices=2).link == link


@pytest.mark.parametrize(
    ("kind", "groups", "sharers"),
    [
        ("all-reduce", "{{0,1,2,3,4,5,6,7}}", 4),
        ("all-gather", "{{0,2,4,6},{1,3,5,7}}", 2),
        ("all-reduce", "{{0,4},{1,5},{2,6},{3,7}}", 1),
        ("all-reduce", "{{0,1,2,3},{4,5,6,7}}", 1),
        ("all-to-all", "{{0,1,2,3,4,5,6,7}}", 1),
    ],
)
def test_the_chips_of_a_slice_share_what_crosses_once(kind, groups, sharers):
    text = program(f"%x = f32[4]{{0}} {kind}(%y), replica_groups={groups}, dimensions={{0}}")
    assert only(text, mesh_shape=MESH, num_slices=2).sharers == sharers


def test_the_program_of_one_slice_reaches_others_by_sends():
    attributes = (
        'is_host_transfer=true, frontend_attributes={_xla_megascale_transfer_type="ALL_REDUCE"}'
    )
    text = program(
        f"""
%x = bf16[64]{{0}} reduce-scatter(%y), replica_groups={{{{0,2}},{{1,3}}}}, dimensions={{0}}
%send = (bf16[64]{{0}}, u32[], token[]) send(%x, %after-all), channel_id=3, {attributes}
%other = (f32[8]{{0}}, u32[], token[]) send(%x, %after-all), channel_id=4, is_host_transfer=true""",
        partitions=4,
    )
    dcn, ici = sorted(hlo.collectives(text, MESH, num_slices=2), key=lambda c: c.link)
    assert (dcn.kind, dcn.bytes, dcn.axes, dcn.link) == ("all-reduce", 128, ("data",), "DCN")
    assert (ici.kind, ici.bytes, ici.axes, ici.link) == ("reduce-scatter", 256, ("data",), "ICI")


# ---- sizes and counts


@pytest.mark.parametrize(
    ("line", "size", "sent"),
    [
        ("%x = f32[8,4]{1,0} all-reduce(%y), replica_groups={{0,1}}", 128, 128),
        ("%x = f32[8,4]{1,0} all-gather(%y), replica_groups={{0,1}}, dimensions={0}", 128, 64),
        ("%x = (f32[4]{0}, f32[16]{0}) all-gather-start(%y), replica_groups={{0,1,2,3}}", 64, 48),
        ("%x = bf16[2]{0} reduce-scatter(%y), replica_groups={{0,1,2,3}}", 16, 12),
        ("%x = (f32[4]{0:T(128)S(1)}, /*index=1*/pred[8]{0}) all-reduce(%y, %z), "
         "replica_groups={{0,1}}", 24, 24),
        ("%x = c64[8]{0} all-to-all(%y), replica_groups={{0,1}}", 64, 32),
        ("%x = (f32[8]{0}, f32[8]{0}, u32[], u32[]) collective-permute-start(%y), "
         "source_target_pairs={{0,1}}", 32, 32),
    ],
)  # fmt: skip
def test_bytes_are_those_of_the_whole_array(line, size, sent):
    found = only(program(line))
    assert (found.bytes, found.sent) == (size, sent)


def loop(name, turns, body, start=0, known=False):
    """The computations of a loop, and the lines that call it."""
    config = f"body=%{name}_body"
    if known:
        config += f', backend_config={{"known_trip_count":{{"n":"{turns}"}}}}'
    computations = f"""
%{name}_body (p: (s32[], f32[4])) -> (s32[], f32[4]) {{
{body}
}}

%{name}_condition (p: (s32[], f32[4])) -> pred[] {{
  %bound = s32[]{{:T(128)}} constant({start + turns})
  %p = (s32[]{{:T(128)}}, f32[4]{{0:T(128)}}) parameter(0)
  %counter = s32[]{{:T(128)}} get-tuple-element(%p), index=0
  ROOT %less = pred[]{{:T(512)}} compare(%counter, %bound), direction=LT
}}
"""
    call = f"""
  %{name}_zero = s32[] constant({start})
  %{name}_first = s32[] copy(%{name}_zero)
  %{name}_state = (s32[], f32[4]{{0}}) tuple(%{name}_first, %x)
  %{name} = (s32[], f32[4]{{0}}) while(%{name}_state), condition=%{name}_condition, {config}
"""
    return computations, call


REDUCE = "  %r = f32[4]{0} all-reduce(%x), replica_groups={{0,1}}, to_apply=%add"


@pytest.mark.parametrize("known", [False, True])
def test_loops_multiply(known):
    inner, call_inner = loop("inner", 5, REDUCE, start=2, known=known)
    outer, call_outer = loop("outer", 3, f"{call_inner}{REDUCE}")
    assert only(program(call_outer, inner + outer)).count == 3 * 5 + 3


def test_a_loop_that_ends_on_its_data_counts_once_and_says_so():
    body, call = loop("search", 7, REDUCE)
    read = hlo.Program(program(call, body.replace("direction=LT", "direction=GT")))
    assert only(read).count == 1
    assert any("search" in note for note in read.notes)


def test_of_a_conditional_the_costliest_branch_counts():
    branches = """
%small (p: f32[4]) -> f32[4] {
  %r = f32[4]{0} all-gather(%p), replica_groups={{0,1}}
}

%large (p: f32[4]) -> f32[4] {
  %r = f32[64]{0} all-gather(%p), replica_groups={{0,1}}
}
"""
    call = "%c = f32[4]{0} conditional(%i, %x, %x), branch_computations={%small, %large}"
    read = hlo.Program(program(call, branches))
    assert only(read).bytes == 256


def test_the_steps_of_an_asynchronous_collective_are_one():
    # As the TPU compiler prints it: a start, steps fused with other work, and the end.
    gather = (
        '%g = f32[8]{0} all-gather(%p), replica_groups={{0,1}}, frontend_attributes={chain_id="9"}'
    )
    fused = "".join(
        f"""
%{name} (p: f32[4]) -> f32[8] {{
  {gather}
  ROOT %c = f32[8]{{0}} {root}
}}
"""
        for name, root in (
            ("start", 'custom-call(%g), custom_call_target="AsyncCollectiveStart"'),
            ("step", "add(%g, %g)"),
            ("done", 'custom-call(%g), custom_call_target="AsyncCollectiveDone"'),
        )
    )
    calls = "\n".join(
        f"%{n}.1 = f32[8]{{0}} fusion(%x), kind=kCustom, calls=%{n}"
        for n in ("start", "step", "done")
    )
    assert only(program(calls, fused)).count == 1


def test_an_unnamed_collective_has_the_name_of_what_it_uses():
    text = program(
        """
%p = f32[4]{0} parameter(0), metadata={op_name="state.params[\\'head\\'][\\'kernel\\']"}
%c = f32[4]{0} copy(%p)
%x = f32[8]{0} all-gather(%c), replica_groups={{0,1}}"""
    )
    assert only(text).source == "state.params['head']['kernel']"


# ---- growth


def moved(kind, *sizes, count=1, source="", link="ICI"):
    arrays = tuple(Array("f32", (size,), True) for size in sizes)
    return Collective(kind, sum(a.bytes for a in arrays), arrays, source, count, link=link)


def test_growth_is_what_the_smaller_mesh_does_not_account_for():
    parameters = [moved("all-reduce", 10, 20, count=6), moved("all-gather", 30)]
    small = [*parameters, moved("all-gather", 40, source="fft")]
    assert hlo.grown(small, small) == []
    large = [*parameters, moved("all-gather", 80, source="fft")]
    assert hlo.grown(small, large) == [(large[-1], small[-1])]
    assert hlo.grown(large, small) == []
    assert len(hlo.grown(small, [*small, moved("all-to-all", 30)])) == 1


def test_merging_and_splitting_is_no_growth():
    apart = [moved("reduce-scatter", 10, count=3), moved("all-reduce", 20)]
    together = [moved("all-reduce", 10, 10, 10, 20)]
    assert hlo.grown(apart, together) == []
    assert hlo.grown(together, apart) == []
    assert hlo.grown(apart, [moved("all-reduce", 10, 10, 10, 10, 20)]) != []


def test_the_stage_between_slices_is_no_growth_where_that_within_them_is_none():
    """libtpu on two slices of 32 and of 64 chips: on the larger, a chip sends half a gradient."""
    small = [moved("all-reduce", 1600, source="a"), moved("all-gather", 800)]
    within = [moved("all-reduce", 1600, source="a"), moved("all-reduce", 800)]

    def between(size, **options):
        return moved("all-reduce", size, **{"source": "a", "link": "DCN"} | options)

    assert hlo.grown(small, [*within, between(812)]) == []
    assert hlo.grown(small, [*within, between(1601)]) != []
    assert hlo.grown(small, [*within, between(812, source="b")]) != []
    assert hlo.grown(small, [*within, between(812, link="ICI")]) != []
    assert hlo.grown(small, [moved("all-reduce", 3200, source="a"), between(1600)]) != []


def test_pieces_of_a_stage_between_slices_count_together():
    """libtpu on two slices of 16 and of 64 chips cuts one buffer into other pieces."""

    def pieces(*sizes, **options):
        return [moved("all-reduce", n, **{"source": "a", "link": "DCN"} | options) for n in sizes]

    small, large = pieces(9000, 1000, 500), pieces(4500, 1024, 1024, 1024, 1024)
    assert hlo.grown(small, large) == []
    assert hlo.grown(small, [*large, *pieces(4500)]) != []
    assert hlo.grown(small, pieces(1024, 1024, source="b")) != []
    assert hlo.grown(pieces(9000, 1, link="ICI"), pieces(4500, 1024, link="ICI")) != []


# ---- descriptions


def test_names_say_what_travels():
    parameters = parameter_shapes(
        {"blocks/block_0/gate/kernel": (12, 64, 96), "encoder/embedding": (260, 16)}, {"fsdp": 4}
    )

    def name(source, *shape, kind="all-gather", **options):
        arrays = (Array("bf16", shape, True),)
        return describe(Collective(kind, 0, arrays, source, **options), parameters)

    step = "jit(train_step)"
    forward = f"{step}/jvp(SpectralModel)/while/body/closed_call/blocks/block_0/block_0._residual"
    backward = forward.replace("jvp(SpectralModel)", "transpose(jvp(SpectralModel))")
    again = backward.replace("closed_call", "closed_call/checkpoint/rematted_computation")
    gate = "blocks/block_0/gate/kernel bf16"
    assert name("state.params['head']['kernel']", 64, 10) == "parameter head/kernel bf16[64,10]"
    assert name("params['head']['kernel']", 64, 10) == "parameter head/kernel bf16[64,10]"
    assert name(f"{forward}/gate/convert", 1, 64, 96) == f"parameter {gate}[1,64,96]"
    assert name(f"{again}/gate/convert", 64, 96).startswith(f"parameter {gate}[64,96], again")
    assert name(f"{backward}/gate/dot_general", 16, 96) == f"gradient of {gate}[16,96]"
    in_fft = "in blocks/block_0/spectral (fft) bf16[128,257,64]"
    assert name(f"{forward}/spectral/jit(fft)/fft", 128, 257, 64) == f"activation {in_fft}"
    gradient = name(f"{backward}/spectral/jit(fft)/fft", 128, 257, 64)
    assert gradient == f"activation's gradient {in_fft}"
    assert name(f"{step}/(blocks/norm/add:encoder/add)", 7).startswith("activation in blocks/norm")
    assert name(f"{step}/reduce_sum", kind="all-reduce") == "scalars (reduce_sum)"


# ---- costs


def compiled(fn, *shapes, dtype=jnp.float32):
    return jax.jit(fn).lower(*(jax.ShapeDtypeStruct(s, dtype) for s in shapes)).compile()


@pytest.mark.parametrize(
    ("fn", "shapes", "want"),
    [
        (jnp.matmul, ((48, 32), (32, 80)), 2 * 48 * 32 * 80),
        (lambda a, b: jnp.einsum("bij,bjk->bik", a, b), ((5, 8, 6), (5, 6, 7)), 2 * 5 * 8 * 6 * 7),
        (lambda x, k: jax.lax.conv(x, k, (1, 1), "VALID"), ((2, 3, 9, 9), (4, 3, 3, 3)),
         2 * 2 * 4 * 7 * 7 * 3 * 3 * 3),
        (lambda x: jnp.fft.rfft(x), ((6, 64),), 6 * 2.5 * 64 * 6),
        (lambda a, b: jax.lax.scan(lambda c, _: (jnp.tanh(c @ b), None), a, length=9)[0],
         ((16, 16), (16, 16)), 9 * 2 * 16**3),
        (lambda a, b: jax.lax.fori_loop(0, 4, lambda _, c: jax.lax.scan(
            lambda d, _: (jnp.tanh(d @ b), None), c, length=3)[0], a),
         ((16, 16), (16, 16)), 12 * 2 * 16**3),
    ],
)  # fmt: skip
def test_flops_of_real_programs(fn, shapes, want):
    assert hlo_cost.flops(hlo.Program(compiled(fn, *shapes).as_text())) == want


@pytest.mark.parametrize(
    "options",
    [
        {"padding": "SAME"},
        {"padding": [(5, 2)], "window_strides": (2,)},
        {"padding": [(3, 3)], "lhs_dilation": (4,)},
        {"padding": [(0, 1)], "rhs_dilation": (3,)},
        {"padding": "VALID", "feature_group_count": 2},
    ],
)
def test_a_convolution_counts_taps_that_meet_data_as_xla_does(options):
    def convolve(x, k):
        options.setdefault("window_strides", (1,))
        return jax.lax.conv_general_dilated(x, k, **options)

    groups = options.get("feature_group_count", 1)
    shapes = ((2, 4, 20), (6, 4 // groups, 3))
    executable = compiled(convolve, *shapes)
    text = executable.as_text()
    assert "convolution(" in text
    assert hlo_cost.flops(hlo.Program(text)) == executable.cost_analysis()["flops"]


def test_batched_products_that_tpus_spell_as_convolutions():
    line = (
        "%a = f32[4,2,32,32]{3,2,1,0} parameter(0)\n%b = f32[4,2,32,32]{3,2,1,0} parameter(1)\n"
        "%c = f32[4,2,32,32]{3,2,1,0} convolution(%a, %b), window={size=4x2 stride=3x1 "
        "pad=0_0x0_0 lhs_dilate=4x2}, dim_labels=01bf_01oi->01bf, "
        "operand_precision={highest,highest}"
    )
    read = hlo.Program(program(line))
    assert hlo_cost.flops(read) == 4 * 2 * 2 * 32**3
    assert hlo_cost.matrix_work(read, CHIPS["v4"]) == 6 * hlo_cost.flops(read)


def test_traffic_is_what_crosses_the_memory_bus():
    fused = """
%slice_one (a: f32[12,64], i: s32[]) -> f32[64] {
  %a = f32[12,64]{1,0} parameter(0)
  %i = s32[] parameter(1)
  ROOT %d = f32[1,64]{1,0} dynamic-slice(%a, %i, %i), dynamic_slice_sizes={1,64}
}

%update_one (a: f32[12,64], i: s32[], u: f32[1,64]) -> f32[12,64] {
  %a = f32[12,64]{1,0} parameter(0)
  %i = s32[] parameter(1)
  %u = f32[1,64]{1,0} parameter(2)
  ROOT %d = f32[12,64]{1,0} dynamic-update-slice(%a, %u, %i, %i)
}
"""
    given = "%w = f32[12,64]{1,0} parameter(0)\n%i = s32[]{:S(6)} parameter(1)\n"
    for line, want in (
        ("%x = f32[12,64]{1,0} copy(%w)", 2 * 12 * 256),
        ("%x = f32[12,64]{1,0:S(1)} copy(%w)", 12 * 256),  # into on-chip memory
        ("%x = f32[1,64]{1,0} fusion(%w, %i), kind=kLoop, calls=%slice_one", 2 * 256),
        ("%u = f32[1,64]{1,0} constant({...})\n"
         "%x = f32[12,64]{1,0} fusion(%w, %i, %u), kind=kLoop, calls=%update_one", 2 * 256),
        ("%x = f32[12,64]{1,0} bitcast(%w)", 0),
    ):  # fmt: skip
        assert hlo_cost.traffic(hlo.Program(program(given + line, fused))) == want, line


def test_a_real_scan_reads_each_layers_weights_once():
    L, n = 6, 256

    def layers(x, w):
        return jax.lax.scan(lambda c, w: (jnp.tanh(c @ w), None), x, w)[0]

    text = compiled(layers, (8, n), (L, n, n)).as_text()
    assert re.search("while", text)
    weights = L * n * n * 4
    assert weights <= hlo_cost.traffic(hlo.Program(text)) <= 4 * weights
    assert np.isclose(hlo_cost.flops(hlo.Program(text)), L * 2 * 8 * n * n)
