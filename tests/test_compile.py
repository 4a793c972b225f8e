"""The HLO parser on small texts, arithmetic by hand, the batch search, one real compilation."""

import importlib.util
import json
import os
import types

import jax
import jax.numpy as jnp
import pytest
from helpers import forked, tiny_config

from configs import digits
from nvg_jax.aot import batch, chips, hlo, lowering, report
from nvg_jax.errors import UserError
from nvg_jax.runtime import hardware, sharding

# A loop with five trips. Each reads one row of a stack of five in a fusion, multiplies 8 x 16 by
# 16 x 32, and sums the product over 4 devices.
LOOP = """\
HloModule loop, is_scheduled=true

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%row (stack: f32[5,8,16], at: s32[]) -> f32[8,16] {
  %stack = f32[5,8,16]{2,1,0} parameter(0)
  %at = s32[] parameter(1)
  %zero = s32[] constant(0)
  %slice = f32[1,8,16]{2,1,0} dynamic-slice(%stack, %at, %zero, %zero), dynamic_slice_sizes={1,8,16}
  ROOT %flat = f32[8,16]{1,0} bitcast(%slice)
}

%body (state: (s32[], f32[5,8,16], f32[16,32], f32[8,32])) -> (s32[], f32[5,8,16], f32[16,32], f32[8,32]) {
  %state = (s32[], f32[5,8,16]{2,1,0}, f32[16,32]{1,0}, /*index=3*/f32[8,32]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%state), index=0
  %one = s32[] constant(1)
  %next = s32[]{:S(6)} add(%i, %one)
  %xs = f32[5,8,16]{2,1,0} get-tuple-element(%state), index=1
  %w = f32[16,32]{1,0} get-tuple-element(%state), index=2
  %x = f32[8,16]{1,0:S(1)} fusion(%xs, %i), kind=kLoop, calls=%row
  %y = f32[8,32]{1,0:S(1)} dot(%x, %w), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  %all = f32[8,32]{1,0} all-reduce(%y), replica_groups={{0,1,2,3}}, to_apply=%add, metadata={op_name="jit(f)/grad" x=1}
  ROOT %out = (s32[], f32[5,8,16]{2,1,0}, f32[16,32]{1,0}, f32[8,32]{1,0}) tuple(%next, %xs, %w, %all)
}

%condition (state: (s32[], f32[5,8,16], f32[16,32], f32[8,32])) -> pred[] {
  %state = (s32[], f32[5,8,16]{2,1,0}, f32[16,32]{1,0}, f32[8,32]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%state), index=0
  %limit = s32[] constant(5)
  ROOT %less = pred[] compare(%i, %limit), direction=LT
}

ENTRY %main (xs: f32[5,8,16], w: f32[16,32], y: f32[8,32]) -> f32[8,32] {
  %xs = f32[5,8,16]{2,1,0} parameter(0)
  %w = f32[16,32]{1,0} parameter(1)
  %y = f32[8,32]{1,0} parameter(2)
  %start = s32[] constant(0)
  %state = (s32[], f32[5,8,16]{2,1,0}, f32[16,32]{1,0}, f32[8,32]{1,0}) tuple(%start, %xs, %w, %y)
  %loop = (s32[], f32[5,8,16]{2,1,0}, f32[16,32]{1,0}, f32[8,32]{1,0}) while(%state), condition=%condition, body=%body
  ROOT %result = f32[8,32]{1,0} get-tuple-element(%loop), index=3
}
"""  # noqa: E501


def test_the_body_of_a_loop_counts_once_per_trip():
    cost = hlo.cost(hlo.parse(LOOP))
    assert cost.flops == 5 * 2 * 8 * 16 * 32
    assert cost.unknown_loops == [] and not cost.custom_calls
    (reduced,) = cost.collectives
    assert reduced.kind == "all-reduce" and reduced.count == 5 and reduced.group == 4
    assert reduced.bytes == 8 * 32 * 4 and reduced.op_name == "jit(f)/grad"
    assert reduced.bytes_sent == 5 * 2 * 3 / 4 * 1024  # a ring: scatter-reduce, then gather


def test_memory_traffic_of_a_loop():
    # A trip reads one row (not the stack) and w. The row and the product stay in fast memory (S);
    # the all-reduce reads the product there and writes to main memory. Then the counter's reads,
    # and the reads and the result of the test.
    row, w, summed = 8 * 16 * 4, 16 * 32 * 4, 8 * 32 * 4
    counter = (4 + 4) + 4  # next = i + one; the fusion's index
    test = 4 + 4 + 1  # i, limit, result
    assert hlo.cost(hlo.parse(LOOP)).hbm_bytes == 5 * (row + w + summed + counter + test)


def test_work_belongs_to_the_outermost_module_it_comes_from():
    dot = "rhs_contracting_dims={0}"
    name = 'op_name="jit(f)/while/body/transpose(jvp(Decoder.run))/Layer.add/dot_general"'
    cost = hlo.cost(hlo.parse(LOOP.replace(dot, f"{dot}, metadata={{{name}}}")))
    assert cost.flops_by_module == {"Decoder.run": cost.flops}
    assert cost.bytes_by_module["Decoder.run"] == 5 * 16 * 32 * 4  # w; the rest stays in S
    assert cost.bytes_by_module["other"] == cost.hbm_bytes - 5 * 16 * 32 * 4


def test_a_loop_with_a_data_dependent_trip_count_counts_once_and_is_named():
    text = LOOP.replace("compare(%i, %limit), direction=LT", "compare(%i, %limit), direction=NE")
    text = text.replace("body=%body", 'body=%body, metadata={op_name="clustering"}')
    cost = hlo.cost(hlo.parse(text))
    assert cost.unknown_loops == ["clustering"] and cost.flops == 2 * 8 * 16 * 32
    known = text.replace("body=%body", 'body=%body, backend_config={"known_trip_count":{"n":"7"}}')
    assert hlo.cost(hlo.parse(known)).flops == 7 * 2 * 8 * 16 * 32


def test_trip_count_with_another_start_or_step():
    module = hlo.parse(LOOP.replace("%start = s32[] constant(0)", "%start = s32[] constant(2)"))
    assert hlo.cost(module).flops == 3 * 2 * 8 * 16 * 32
    module = hlo.parse(LOOP.replace("%one = s32[] constant(1)", "%one = s32[] constant(2)"))
    assert hlo.cost(module).flops == 3 * 2 * 8 * 16 * 32  # at 0, 2 and 4


@pytest.mark.parametrize(
    ("groups", "size"),
    [
        ("{{0,1},{2,3}}", 2),
        ("[2,8]<=[16]", 8),
        ("[4,4]<=[4,4]T(1,0)", 4),
        ("mesh['axis_0'=8,'axis_1'=4] {'axis_1'}", 4),
        ("mesh['axis_0'=8,'axis_1'=4] {'axis_0','axis_1'}", 32),
        ("mesh['axis_0'=8] {'axis_0':(2)4}", 4),
    ],
)
def test_group_size_of_a_collective(groups, size):
    module = hlo.parse(LOOP.replace("{{0,1,2,3}}", groups))
    assert hlo.cost(module).collectives[0].group == size


def test_all_gather_and_reduce_scatter():
    text = """\
HloModule m
ENTRY %main (x: bf16[4,8]) -> bf16[2,8] {
  %x = bf16[4,8]{1,0} parameter(0)
  %begin = (bf16[4,8]{1,0}, bf16[16,8]{1,0}) all-gather-start(%x), replica_groups=[2,4]<=[8], dimensions={0}
  %whole = bf16[16,8]{1,0} all-gather-done(%begin)
  ROOT %part = bf16[4,8]{1,0} reduce-scatter(%whole), replica_groups=[2,4]<=[8], dimensions={0}, to_apply=%add
}
"""  # noqa: E501
    cost = hlo.cost(hlo.parse(text))
    gather, scatter = cost.collectives
    assert (gather.kind, gather.bytes, gather.bytes_sent) == ("all-gather", 256, 3 / 4 * 256)
    assert gather.shapes == ("bf16[16,8]",)
    assert (scatter.kind, scatter.bytes, scatter.bytes_sent) == ("reduce-scatter", 256, 192)
    assert cost.hbm_bytes == 2 * (64 + 256)


def test_a_collective_that_overlaps_with_arithmetic_counts_once():
    """As on TPUs: started in one fusion and continued in another, on the same channel."""
    text = """\
HloModule m
%begin (x: bf16[1,8]) -> (bf16[1,8], bf16[4,8]) {
  %x = bf16[1,8]{1,0} parameter(0)
  %all = bf16[4,8]{1,0} all-gather(%x), channel_id=3, replica_groups=mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'a'}
  ROOT %on = (bf16[1,8]{1,0}, bf16[4,8]{1,0}) custom-call(%all), custom_call_target="AsyncCollectiveStart"
}
%beside (x: bf16[1,8], to: bf16[4,8], y: f32[8]) -> (f32[8], bf16[1,8], bf16[4,8]) {
  %x = bf16[1,8]{1,0} parameter(0)
  %to = bf16[4,8]{1,0} parameter(1)
  %y = f32[8]{0} parameter(2)
  %z = f32[8]{0} negate(%y)
  %all = bf16[4,8]{1,0} all-gather(%x), channel_id=3, replica_groups=mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'a'}
  ROOT %out = (f32[8]{0}, bf16[1,8]{1,0}, bf16[4,8]{1,0}) tuple(%z, %x, %all)
}
ENTRY %main (x: bf16[1,8], y: f32[8]) -> f32[8] {
  %x = bf16[1,8]{1,0} parameter(0)
  %y = f32[8]{0} parameter(1)
  %start = (bf16[1,8]{1,0}, bf16[4,8]{1,0}) fusion(%x), kind=kCustom, calls=%begin
  %a = bf16[1,8]{1,0} get-tuple-element(%start), index=0
  %b = bf16[4,8]{1,0} get-tuple-element(%start), index=1
  %next = (f32[8]{0}, bf16[1,8]{1,0}, bf16[4,8]{1,0}) fusion(%a, %b, %y), kind=kLoop, calls=%beside
  ROOT %z = f32[8]{0} get-tuple-element(%next), index=0
}
"""  # noqa: E501
    cost = hlo.cost(hlo.parse(text))
    (gather,) = cost.collectives
    assert (gather.kind, gather.count, gather.bytes, gather.group) == ("all-gather", 1, 64, 4)
    assert cost.hbm_bytes == (16 + 64) + (32 + 32) and not cost.custom_calls


def test_calls_and_every_branch_of_a_conditional_count():
    text = """\
HloModule m
product.1 {
  x.2 = f32[4,4]{1,0} parameter(0)
  ROOT dot.3 = f32[4,4]{1,0} dot(x.2, x.2), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}
same.4 {
  ROOT x.5 = f32[4,4]{1,0} parameter(0)
}
ENTRY main.6 {
  x.7 = f32[4,4]{1,0} parameter(0)
  called.8 = f32[4,4]{1,0} call(x.7), to_apply=product.1
  which.9 = s32[] constant(0)
  ROOT chosen.10 = f32[4,4]{1,0} conditional(which.9, x.7, x.7), branch_computations={product.1, same.4}
}
"""  # noqa: E501
    assert hlo.cost(hlo.parse(text)).flops == 2 * (2 * 4 * 4 * 4)


def test_size_with_tile_padding_and_memory_space():
    (array,) = hlo.parse_arrays("f32[2,257,5]{0,1,2:T(8,128)}")  # axis 0 is the fastest
    assert array.bytes(padded=False) == 4 * 2 * 257 * 5
    assert array.bytes() == 4 * 128 * 264 * 5
    (fast, slow) = hlo.parse_arrays("(bf16[3]{0:S(1)}, /*index=1*/pred[3]{0:T(512)(128)(4,1)})")
    assert not fast.in_hbm and slow.in_hbm and slow.bytes() == 512


@pytest.mark.parametrize(
    ("sizes", "options", "expected"),
    [
        # Five inputs, kernel of three, padding of one on each side: all but the two corners.
        ((5, 3, 5), {"low": 1}, 3 * 5 - 2),
        ((5, 3, 3), {}, 9),
        ((6, 3, 2), {"stride": 2}, 6),
        # A batch of four products written as a dilated window: one product each.
        ((4, 4, 4), {"stride": 3, "input_dilation": 4}, 4),
        ((5, 2, 3), {"kernel_dilation": 2}, 6),
    ],
)
def test_products_of_a_convolution_window(sizes, options, expected):
    assert hlo.window_products(*sizes, **options) == expected


def test_flops_of_a_program_as_written():
    """Counted by hand: a product and a convolution in a loop with three trips, and the gradient."""

    def f(w, kernel, x):
        def step(x, _):
            y = jax.lax.conv_general_dilated(
                x, kernel, (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
            )
            return x @ w + jnp.pad(y, ((0, 0), (1, 1), (1, 1), (0, 0))), None

        return jax.lax.scan(step, x, length=3)[0].sum()

    shapes = [(6, 6), (3, 3, 6, 6), (2, 8, 8, 6)]
    args = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    product, convolution = 2 * (2 * 8 * 8) * 6 * 6, 2 * (2 * 6 * 6) * 9 * 6 * 6
    text = jax.jit(f).lower(*args).as_text("hlo")
    assert hlo.cost(hlo.parse(text)).flops == 3 * (product + convolution)
    gradient = jax.jit(jax.grad(f, argnums=(0, 1, 2))).lower(*args).as_text("hlo")
    assert hlo.cost(hlo.parse(gradient)).flops == 3 * 3 * (product + convolution)


# As XLA prints them, shortened.
KERNELS = """\
HloModule kernels
ENTRY %main (x: bf16[8,6], w: bf16[6,10], q: bf16[2,258,8,64], i: f32[2,8,8,3], k: f32[3,3,3,16], z: f32[2,4,4,16]) -> bf16[8,10] {
  %x = bf16[8,6]{1,0} parameter(0)
  %w = bf16[6,10]{1,0} parameter(1)
  %q = bf16[2,258,8,64]{3,2,1,0} parameter(2)
  %i = f32[2,8,8,3]{3,2,1,0} parameter(3)
  %k = f32[3,3,3,16]{3,2,1,0} parameter(4)
  %z = f32[2,4,4,16]{3,2,1,0} parameter(5)
  %product = (bf16[8,10]{1,0}, s8[4096]{0}) custom-call(%x, %w), custom_call_target="__cublas$lt$matmul", backend_config={"gemm_backend_config":{"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"],"rhs_contracting_dimensions":["0"]}}}
  %forward = (bf16[2,8,258,64]{3,1,2,0}, f32[2,8,258]{2,1,0}) custom-call(%q, %q, %q), custom_call_target="__cudnn$fmhaSoftmax", backend_config={"cudnn_fmha_backend_config": {"fmha_scale": 0.125, "intermediate_tensor_shape": {"element_type": "BF16", "dimensions": ["2", "8", "258", "258"], "tuple_shapes": []}}}
  %convolved = (f32[2,4,4,16]{3,2,1,0}, u8[0]{0}) custom-call(%i, %k), window={size=3x3 stride=2x2 pad=0_1x0_1}, dim_labels=b01f_01io->b01f, custom_call_target="__cudnn$convForward"
  %for_input = (f32[2,8,8,3]{3,2,1,0}, u8[0]{0}) custom-call(%z, %k), window={size=3x3 stride=2x2 pad=0_1x0_1}, dim_labels=b01f_01io->b01f, custom_call_target="__cudnn$convBackwardInput"
  %for_kernel = (f32[3,3,3,16]{3,2,1,0}, u8[0]{0}) custom-call(%i, %z), window={size=3x3 stride=2x2 pad=0_1x0_1}, dim_labels=b01f_01io->b01f, custom_call_target="__cudnn$convBackwardFilter"
  %pallas = bf16[8,6]{1,0} custom-call(%x), custom_call_target="tpu_custom_call", metadata={op_name="jit(f)/shard_map/forward_kernel/pallas_call"}, backend_config={"custom_call_config":{"cost_estimate":{"flops":"1234","transcendentals":"5"}}}
  %unknown = bf16[8,6]{1,0} custom-call(%x), custom_call_target="theirs"
  ROOT %result = bf16[8,10]{1,0} get-tuple-element(%product), index=0
}
"""  # noqa: E501


def test_flops_of_the_kernels_of_libraries_and_of_our_own():
    cost = hlo.cost(hlo.parse(KERNELS))
    convolution = 2 * (2 * 4 * 4) * 16 * (3 * 3) * 3  # of each output: taps times channels
    scores = 2 * 8 * 258 * 258
    assert cost.flops == 2 * 8 * 10 * 6 + 2 * 2 * scores * 64 + 3 * convolution + 1234
    assert cost.kernels == {
        "__cublas$lt$matmul": 1,
        "__cudnn$fmhaSoftmax": 1,
        "__cudnn$convForward": 1,
        "__cudnn$convBackwardInput": 1,
        "__cudnn$convBackwardFilter": 1,
        "forward_kernel": 1,
    }
    assert cost.custom_calls == {"theirs": 1}


def test_text_that_is_not_hlo():
    with pytest.raises(UserError, match="no ENTRY"):
        hlo.parse("module @jit_f {\n}\n")


# The arithmetic of the report.

CHIP = chips.Chip(flops=100.0, hbm=1000, hbm_bandwidth=10.0, link_bandwidth=5.0)


def test_roofline_by_hand():
    times = report.roofline(
        flops=400.0, hbm_bytes=50.0, link_bytes=5.0, model_flops=300.0, device=CHIP
    )
    assert (times["compute"], times["hbm"], times["links"]) == (4.0, 5.0, 1.0)
    assert times["seconds"] == 5.0 and times["bound"] == "hbm"
    assert times["mfu"] == 300 / (5 * 100)
    assert times["seconds_no_overlap"] == 10.0 and times["mfu_no_overlap"] == 0.3


@pytest.mark.parametrize("part", ["generators", "tokenizer"])
def test_the_peak_depends_on_the_precision(part):
    config, mesh = tiny_config(part=part), sharding.make_mesh(devices=jax.devices()[:1])

    def teraflops(name, program="train"):
        target = chips.Target(f"{name}:1", mesh, (chips.GPUS | chips.TPUS)[name])
        return lowering.Compiler(config, target, program).device.flops / 1e12

    # NVIDIA's data sheets: TF32 is half of bfloat16 (989); a T4 has only float32 and float16.
    assert [teraflops(name) for name in ("h100", "v5e", "t4")] == [494.5, 197, 8.1]
    config.dtype = "bfloat16"
    assert [teraflops(name) for name in ("h100", "v5e", "t4")] == [989, 197, 8.1]
    config.tokenizer_training.dtype = "float32"
    assert teraflops("h100") == (494.5 if part == "tokenizer" else 989)
    config.dtype = "float16"
    assert [teraflops(name, "sample") for name in ("h100", "v5e", "t4")] == [989, 197, 65]
    config.tokenizer_training.dtype = ""
    with pytest.raises(UserError, match="must be float32 or bfloat16, got 'float16'"):
        teraflops("t4")


def test_an_output_that_reuses_an_argument_counts_once():
    class Stats:
        argument_size_in_bytes = 100
        output_size_in_bytes = 90
        alias_size_in_bytes = 80
        temp_size_in_bytes = 30
        generated_code_size_in_bytes = 5

    memory = hardware.device_memory(Stats)
    assert memory["outputs"] == 10 and memory["total"] == 145


# The batch search, with a fake compiler whose programs take a known number of bytes.


class FakeCompiler:
    """A compiler for four batch shards.

    Args:
        used: samples per shard -> bytes of the program.
        hbm: memory of a device.
        raises: fail above 96% of the memory, like the TPU compiler.
        tells: the error says how much memory is missing.
    """

    def __init__(self, used, hbm: float = 1000.0, raises: bool = False, tells: bool = True):
        mesh = jax.sharding.AbstractMesh((2, 2, 1), ("data", "fsdp", "tensor"))
        self.target = chips.Target("v5e:2x2", mesh, CHIP._replace(hbm=hbm))
        self.used, self.raises, self.tells, self.tried = used, raises, tells, []

    def fits(self, size: int) -> bool:
        return self.used(size) <= self.target.device.hbm * (0.96 if self.raises else 1)

    def compile(self, batch_size: int):
        assert batch_size > 0 and batch_size % 4 == 0
        size = batch_size // 4
        assert size not in self.tried  # each compilation takes minutes
        self.tried.append(size)
        if self.raises and not self.fits(size):
            missing = self.used(size) - 0.96 * self.target.device.hbm
            raise lowering.DoesNotFitError("", *([missing] if self.tells else []))
        stats = types.SimpleNamespace(
            argument_size_in_bytes=100,
            output_size_in_bytes=100,
            alias_size_in_bytes=100,
            temp_size_in_bytes=self.used(size) - 100,
            generated_code_size_in_bytes=0,
        )
        program = types.SimpleNamespace(memory_analysis=lambda: stats)
        return lowering.Compiled(program, {}, 1.0)


def test_the_largest_batch_of_affine_memory_takes_three_compilations():
    compiler = FakeCompiler(lambda size: 300 + 33 * size)  # 21 samples take 993 bytes, 22 1026
    assert batch.find_batch(compiler) == 4 * 21
    assert compiler.tried == [1, 2, 21]


@pytest.mark.parametrize(
    "used",
    [
        lambda size: 300 + 33 * size,
        lambda size: 300 + 20 * size + size**2,  # convex: the line promises too much
        lambda size: 300 + 60 * size - size**2 / 2,  # concave: too little
        lambda size: 300 + 40 * -(-size // 8) * 8,  # padded: one and two samples take the same
        lambda size: 300 + 33 * size + 100 * (size > 2),  # a step
        lambda size: 300 + 2.9 * size,
    ],
)
@pytest.mark.parametrize(
    "errors",
    [{}, {"raises": True}, {"raises": True, "tells": False}],
    ids=["none", "tells", "mute"],
)
def test_the_largest_batch_that_fits(used, errors):
    compiler = FakeCompiler(used, **errors)
    found = batch.find_batch(compiler, max_compilations=12) // 4
    assert compiler.fits(found) and not compiler.fits(found + 1)
    assert found in compiler.tried


def test_a_batch_of_one_or_two_samples_per_shard():
    compiler = FakeCompiler(lambda size: 600 * size)
    assert batch.find_batch(compiler) == 4 and compiler.tried == [1, 2]
    compiler = FakeCompiler(lambda size: 450 * size)
    assert batch.find_batch(compiler) == 8 and compiler.tried == [1, 2]
    for raises in (False, True):
        compiler = FakeCompiler(lambda size: 1001 * size, raises=raises)
        with pytest.raises(lowering.DoesNotFitError, match="batch of 4 .one sample per shard."):
            batch.find_batch(compiler)
        assert compiler.tried == [1]


def test_the_search_for_a_batch_is_bounded(caplog):
    compiler = FakeCompiler(lambda size: 500)  # any batch fits
    assert batch.find_batch(compiler) == 4 * 2**7
    assert len(compiler.tried) == 8 and "larger ones may fit" in caplog.text


def test_what_the_compiler_says_about_memory():
    error = lowering.does_not_fit("RESOURCE_EXHAUSTED: Used 20.5G of 15.75G hbm.", 64, "v5e:2x2")
    assert error.missing == 4.75 * 2**30
    assert "batch of 64 does not fit" in str(error) and "needs 20.5G of 15.75G" in str(error)
    same = lowering.does_not_fit("Used 15.75G of 15.75G hbm.", 64, "v5e:2x2")  # rounded
    assert same.missing > 0
    assert lowering.does_not_fit("Ran out of vmem.", 64, "v5e:2x2").missing == float("inf")


def run(*arguments: str, **environment):
    return forked("-m", "nvg_jax.compile", *arguments, env=os.environ | environment)


def test_error_messages():
    with pytest.raises(UserError, match="Unknown topology 'v5p'.*v5e:16x16"):
        chips.find_target("v5p", {})
    with pytest.raises(UserError, match="Unknown topology 'v9:2x2'"):
        chips.find_target("v9:2x2", {})
    for wrong in ("h100:9", "h100:2x9", "h100", "h100:0", "v5e:8"):
        with pytest.raises(UserError, match="h100:4x8"):
            chips.find_target(wrong, {})
    with pytest.raises(UserError, match="No network between hosts is known for t4"):
        chips.find_target("t4:2x4", {})
    result = run("--config=configs/digits.py:runlocal", "--topology=v5e")
    assert result.returncode == 2 and result.stderr.startswith("error: Unknown topology 'v5e'")
    assert result.stderr.count("\n") == 1
    with pytest.raises(UserError, match="A batch of 0 does not split .* such as 4"):
        sharding.check_batch(0, 4)
    with pytest.raises(UserError, match="multiple of 4, such as 8"):
        sharding.check_batch(11, 4)
    sharding.check_batch(12, 4)


def test_without_the_compiler(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r'pip install "jax\[tpu\]"'):
        chips.find_target("v5e:2x2", {})
    with pytest.raises(UserError, match=r'pip install "jax\[cuda13\]"'):
        chips.find_target("h100:8", {})


def test_parts_are_single_programs():
    config = type("Config", (), {"part": "all"})
    assert lowering.training_part(config).networks == ("content", "structure")
    config.part = "separate"
    with pytest.raises(UserError, match="part=separate is not a single program"):
        lowering.training_part(config)


def test_an_unknown_dtype_is_refused():
    for program in ("train", "sample"):
        with pytest.raises(UserError, match="dtype must be float32 or bfloat16.*, got 'half'"):
            lowering.Compiler(tiny_config(dtype="half"), None, program)


def test_the_remat_policy_with_the_shortest_step_that_fits(monkeypatch, caplog):
    times = {"none": 1.0, "linears": 2.0, "blocks": 3.0}
    used = {"none": None, "linears": 5.0, "blocks": 1.0}  # GiB; the first does not compile

    def fake(compiler, batch_size, model_flops):
        assert model_flops == 42  # counted once for all policies
        remat = compiler.config.content.remat
        assert batch_size == 8 and compiler.config.structure.remat == remat
        if used[remat] is None:
            raise lowering.DoesNotFitError("too large")
        memory = {"total": used[remat] * chips.GIB, "hbm": limit * chips.GIB}
        seconds = {"seconds_no_overlap": times[remat]}
        return {"memory": memory, "roofline": seconds, "fits": used[remat] <= limit}

    monkeypatch.setattr(report, "make_report", fake)
    counted = []
    monkeypatch.setattr(
        lowering.Compiler, "model_flops", lambda compiler, size: counted.append(size) or 42
    )
    target = chips.Target("cpu:1", sharding.make_mesh(devices=jax.devices()[:1]), CHIP)
    find = lambda: report.best_remat(digits.get_config("runlocal"), target, 8)["remat"]
    limit = 6.0
    assert find() == "linears" and counted == [8]
    times["blocks"] = 1.5
    assert find() == "blocks"
    times["blocks"], limit = 3.0, 4.0
    assert find() == "blocks"
    limit = 0.5
    with pytest.raises(lowering.DoesNotFitError, match="too large"):
        find()


@pytest.mark.slow
def test_the_report_of_a_training_step_names_its_part():
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    target = chips.Target("cpu:1", mesh, CHIP._replace(hbm=2**30))
    config = digits.get_config("runlocal")
    config.part = "structure"
    found = report.make_report(lowering.Compiler(config, target, "train"), 2)
    assert json.loads(json.dumps(found))["part"] == "structure"
    text = report.format_report(found)
    assert text.startswith("training step (structure), cpu:1 ")
    # 12 steps; measured steps took 1.14 to 1.28 times the sum of the three times.
    hours = 12 * found["roofline"]["seconds_no_overlap"] / 3600
    assert found["steps"] == 12
    assert found["hours"] == pytest.approx([1.14 * hours, 1.28 * hours])
    assert found["chip_hours"] == found["hours"]  # of one device
    assert "The configured length, 12 steps" in text


@pytest.mark.slow
def test_the_report_of_the_sampler():
    """Compiled for the CPU, so that it runs without the TPU compiler."""
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    target = chips.Target("cpu:1", mesh, CHIP._replace(hbm=2**30))
    compiler = lowering.Compiler(digits.get_config("runlocal"), target, "sample")
    found = json.loads(json.dumps(report.make_report(compiler, 2)))
    assert found["part"] is None and found["batch_size"] == 2 and found["devices"] == 1
    assert found["fits"] and found["collectives"] == [] and found["custom_calls"] == {}
    assert set(found["parameters"]) == {"tokenizer", "content", "structure", "total"}
    # Arguments in float32: both generators and the decoder, but not the encoder.
    sizes = found["parameters"]
    generators = sizes["content"] + sizes["structure"]
    assert 4 * generators < found["memory"]["arguments"] < 4 * sizes["total"]
    assert 0.9 < found["executed_flops"] / found["model_flops"] < 1.1
    seconds = found["seconds_by_module"]
    assert sum(seconds.values()) == pytest.approx(found["roofline"]["seconds_no_overlap"])
    names = {"ContentGenerator.predict_canvas", "StructureGenerator.velocity", "Tokenizer.decode"}
    assert seconds.keys() >= names and seconds["other"] < min(seconds[name] for name in names)
    text = report.format_report(found)
    assert "  StructureGenerator.velocity  " in text
    assert text.startswith("sampler, cpu:1 (1 devices: data 1 x fsdp 1 x tensor 1), global batch 2")
    assert report.ESTIMATE in text and "images per second" in text and "epochs" not in text
    # Of a GPU's memory, JAX takes three quarters.
    total = found["memory"]["total"]
    for topology, hbm, warned in (
        ("h100:1", 1.3, True),
        ("h100:1", 1.4, False),
        ("v5e:1x1", 1.3, 0),
    ):
        other = found | {"topology": topology, "memory": found["memory"] | {"hbm": hbm * total}}
        assert ("XLA_CLIENT_MEM_FRACTION" in report.format_report(other)) == warned


@pytest.fixture(scope="module")
def libtpu():
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip('the TPU compiler is not installed: pip install "jax[tpu]"')


def test_the_training_step_for_a_topology(libtpu, tmp_path):
    file = tmp_path / "report.json"
    args = ["--config=configs/digits.py:runlocal", "--topology=v5e:2x2"]
    result = run(
        *args, f"--json={file}", "--config.mesh.fsdp=2", "--config.generator_training.batch_size=8"
    )
    assert result.returncode == 0, result.stderr
    assert report.ESTIMATE in result.stdout and "MFU" in result.stdout
    found = json.loads(file.read_text())
    assert found["mesh"] == {"data": 2, "fsdp": 2, "tensor": 1} and found["batch_size"] == 8
    assert found["fits"] and found["memory"]["hbm"] == 16 * 2**30
    assert set(found["parameters"]) == {"content", "structure", "tokenizer", "total"}
    # No product is recomputed in this preset; the compiler may merge some small ones.
    assert 0.9 < found["executed_flops"] / found["model_flops"] < 1.1
    assert set(found["collectives_by_kind"]) >= {"all-reduce"}
    wrong = run(*args, "--batch_size=6")
    assert wrong.returncode == 2 and "such as 4" in wrong.stderr
    slices = run(args[0], "--topology=2xv5e:2x2", "--config.mesh.fsdp=2", "--batch_size=8")
    assert slices.returncode == 0, slices.stderr
    assert "2xv5e:2x2 (8 devices: data 4 x fsdp 2 x tensor 1)" in slices.stdout
    across = run(args[0], "--topology=2xv5e:2x2", "--config.mesh.fsdp=8")
    assert across.returncode == 2 and "multiple of the number of slices, 2" in across.stderr
    single = run(args[0], "--topology=v5e:1x1", "--program=sample", "--batch_size=2")
    assert single.returncode == 0, single.stderr
    missing = run(*args[:1], "--topology=v5e:3x7")
    assert missing.returncode == 2 and "no topology 'v5e:3x7'" in missing.stderr


def test_the_training_step_for_gpus(tmp_path):
    """bfloat16 on two hosts: attention in cuDNN, and links as fast as the network."""
    if importlib.util.find_spec("jax_cuda13_plugin") is None:
        pytest.skip('the GPU compiler is not installed: pip install "jax[cuda13]"')
    file = tmp_path / "report.json"
    result = run(
        "--config=configs/digits.py:runlocal", "--topology=h100:2x2", "--config.dtype=bfloat16",
        "--batch_size=8", f"--json={file}",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    found = json.loads(file.read_text())
    assert found["devices"] == 4 and found["memory"]["hbm"] == 80e9
    assert found["kernels"]["__cudnn$fmhaSoftmax"] and found["kernels"]["__cublas$lt$matmul"]
    assert found["custom_calls"] == {}
    assert found["collectives_by_kind"]["all-reduce"]["bytes_sent"] == pytest.approx(
        found["roofline"]["links"] * 50e9
    )
