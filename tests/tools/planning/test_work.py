"""FLOPs and memory traffic of programs with known values."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

from lm.tools.planning.hlo import parse_hlo
from lm.tools.planning.work import flops, memory_traffic


def module_of(function, *shapes):
    arguments = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    return parse_hlo(jax.jit(function).lower(*arguments).compile().as_text())


def scanned(x, weights):
    return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, weights)[0]


PRODUCT = 2 * 64 * 32 * 48


@pytest.mark.parametrize(
    ("function", "shapes", "expected"),
    [
        (jnp.matmul, [(64, 32), (32, 48)], PRODUCT),
        (jnp.matmul, [(5, 64, 32), (5, 32, 48)], 5 * PRODUCT),
        (scanned, [(64, 32), (9, 32, 32)], 9 * 2 * 64 * 32 * 32),
        # Forward, and two products a layer backward; the first input needs no gradient.
        (
            jax.grad(lambda w, x: scanned(x, w).sum()),
            [(9, 32, 32), (64, 32)],
            9 * 3 * 2 * 64 * 32 * 32,
        ),
    ],
)
def test_products_of_matrices_count_in_loops_and_gradients(function, shapes, expected):
    assert flops(module_of(function, *shapes)) == expected


KERNEL = """
ENTRY %main (m: s8[{tiles}], q: bf16[{shape}], k: bf16[{shape}], s: s32[64]) -> bf16[{shape}] {{
  %m = s8[{tiles}]{{2,1,0}} parameter(0)
  %q = bf16[{shape}]{{0}} parameter(1)
  %k = bf16[{shape}]{{0}} parameter(2)
  %s = s32[64]{{0}} parameter(3)
  ROOT %{name} = bf16[{shape}]{{0}} custom-call({operands}), custom_call_target="{target}"{config}
}}
"""


def kernel_flops(shape, name, operands, tiles="1,1,1", target="tpu_custom_call", config=""):
    return flops(parse_hlo(KERNEL.format(**locals())))


@pytest.mark.parametrize(("way", "products"), [("fwd", 2), ("dq", 3), ("dkv", 4)])
@pytest.mark.parametrize("shape", ["2,64,8", "5,2,64,8"])
def test_splash_does_the_causal_half_or_all_without_a_mask(way, products, shape):
    """By hand: 2 heads, 64 × 64 / 2 pairs, 8 numbers a head, twice (product and sum)."""
    rows = 5 if shape.startswith("5") else 1
    causal = products * rows * 2 * (64 * 64 // 2) * 8 * 2
    name = f"splash_mha_{way}"
    assert kernel_flops(shape, name, "%m, %q, %k, %s", "1,4,4") == causal
    assert kernel_flops(shape, name, "%m, %q, %k", "1,4,4") == 2 * causal
    assert kernel_flops(shape, f"{name}_segmented", "%m, %q, %k, %s, %s, %s", "1,4,4") == causal
    assert kernel_flops(shape, f"{name}_segmented", "%m, %q, %k, %s, %s", "1,4,4") == 2 * causal


@pytest.mark.parametrize(
    ("way", "products", "tiles"), [("fwd", 2, "1,8,2"), ("dq", 3, "1,8,2"), ("dkv", 4, "1,2,8")]
)
def test_splash_with_a_window_does_its_tiles(way, products, tiles):
    """By hand: 8 blocks of 8 queries, each with 2 tiles of 8 × 8 pairs."""
    done = kernel_flops("2,64,8", f"splash_mha_{way}", "%m, %q, %k, %s", tiles)
    assert done == products * 2 * (8 * 2 * 8 * 8) * 8 * 2


@pytest.mark.parametrize(("mask", "part"), [("CAUSAL", 2), ("PADDING_CAUSAL", 2), ("NO_MASK", 1)])
def test_cudnn_says_whether_its_attention_is_causal(mask, part):
    config = f', backend_config={{"mask_type":"{mask}"}}'
    target = "__cudnn$fmhaSoftmax"
    done = kernel_flops("2,64,8", "fmha", "%q, %k", target=target, config=config)
    assert done == 2 * 2 * (64 * 64 // part) * 8 * 2


def stated(pairs):
    return f', metadata={{op_name="jit(f)/attention_pairs_{pairs}/call"}}'


HALF, BAND, ALL = 64 * 64 // 2, 700, 64 * 64


@pytest.mark.parametrize(
    ("target", "operands", "pairs", "expected"),
    [
        ("__cudnn$fmhaSoftmax", "%q, %k, %k", BAND, 2 * BAND),
        ("__cudnn$fmhaSoftmaxBackward", "%q, %k, %k, %q, %q", BAND, 5 * BAND),
        ("mosaic_gpu_v2", "%q, %k, %k, %s", BAND, 2 * BAND),
        # The backward pass skips only what a causal mask does: here dq's three products.
        ("mosaic_gpu_v2", "%q, %k, %k, %q, %q, %s", BAND, 3 * HALF),
        ("mosaic_gpu_v2", "%q, %k, %k, %q, %q, %s", ALL, 3 * ALL),
        ("__gpu$xla.gpu.triton", "%s, %q, %k, %k", BAND, 2 * BAND),
        ("__gpu$xla.gpu.triton", "%s, %q, %k, %k, %q, %q", BAND, 3 * BAND),
    ],
)
def test_gpu_kernels_compute_the_pairs_that_the_model_states(target, operands, pairs, expected):
    done = kernel_flops("2,64,8", "call", operands, target=target, config=stated(pairs))
    assert done == expected * 2 * 8 * 2


def test_kernel_may_state_its_cost_in_its_name():
    """As grouped products do; other operations of their scope do not repeat it."""
    scope = "jit(step)/experts/cost_flops_700_bytes_90/jit(gmm)"
    for operation, expected in ((f"{scope}/pallas_call", (700, 90)), (f"{scope}/gather", None)):
        estimate = 'backend_config={"cost_estimate":{"flops":"5"}}'
        config = f', metadata={{op_name="{operation}"}}, {estimate}'
        text = KERNEL.format(
            shape="2,64,8", tiles="1,1,1", name="gmm", operands="%q, %k",
            target="tpu_custom_call", config=config,
        )  # fmt: skip
        module = parse_hlo(text)
        arrays = 3 * 2 * 64 * 8 * 2
        assert (flops(module), memory_traffic(module)) == (expected or (5, arrays))


CONVOLUTION = """
ENTRY %main (a: bf16[{lhs}], b: bf16[{rhs}]) -> f32[{out}] {{
  %a = bf16[{lhs}]{{0}} parameter(0)
  %b = bf16[{rhs}]{{0}} parameter(1)
  ROOT %c = f32[{out}]{{0}} convolution(%a, %b){window}, dim_labels={labels}
}}
"""


@pytest.mark.parametrize(
    ("lhs", "rhs", "out", "window", "labels", "expected"),
    [
        ("64,32", "32,48", "64,48", "", "bf_io->bf", PRODUCT),
        # How a TPU writes the batch of products [4]×[64,32]×[32,48]: each window meets one element.
        (
            "4,64,32",
            "4,32,48",
            "4,64,48",
            ", window={size=4 stride=3 pad=0_0 lhs_dilate=4}",
            "0bf_0io->0bf",
            4 * PRODUCT,
        ),
        # A convolution over 10 places with a window of 3, padded by 1: 28 of 30 pairs meet.
        (
            "2,10,8",
            "3,8,16",
            "2,10,16",
            ", window={size=3 pad=1_1}",
            "b0f_0io->b0f",
            2 * 2 * 8 * 16 * 28,
        ),
    ],
)
def test_convolutions_count_the_pairs_that_meet(lhs, rhs, out, window, labels, expected):
    text = CONVOLUTION.format(lhs=lhs, rhs=rhs, out=out, window=window, labels=labels)
    assert flops(parse_hlo(text)) == expected


TRAFFIC = """
%fused (p0: f32[10,100], p1: s32[], p2: f32[100]) -> f32[10,100] {
  %p0 = f32[10,100]{1,0} parameter(0)
  %p1 = s32[] parameter(1)
  %p2 = f32[100]{0} parameter(2)
  %zero = s32[] constant(0)
  %row = f32[1,100]{1,0} dynamic-slice(%p0, %p1, %zero), dynamic_slice_sizes={1,100}
  %flat = f32[100]{0} bitcast(%row)
  %sum = f32[100]{0} add(%flat, %p2)
  %new = f32[1,100]{1,0} bitcast(%sum)
  ROOT %updated = f32[10,100]{1,0} dynamic-update-slice(%p0, %new, %p1, %zero)
}

ENTRY %main (x: f32[10,100], i: s32[], y: f32[100]) -> f32[10,100] {
  %x = f32[10,100]{1,0} parameter(0)
  %i = s32[] parameter(1)
  %y = f32[100]{0} parameter(2)
  %near = f32[100]{0:S(1)} copy(%y)
  ROOT %fusion = f32[10,100]{1,0} fusion(%x, %i, %near), kind=kLoop, calls=%fused
}
"""


def test_fusion_moves_the_slice_that_it_reads_and_the_update_that_it_writes():
    """The copy reads 400 bytes into near memory; the fusion reads and writes a row of 400 and
    reads the index of 4."""
    assert memory_traffic(parse_hlo(TRAFFIC)) == 400 + 400 + 4 + 400


NESTED = """
%inner (q0: f32[10,100], q1: s32[]) -> f32[100] {
  %q0 = f32[10,100]{1,0} parameter(0)
  %q1 = s32[] parameter(1)
  %zero = s32[] constant(0)
  %row = f32[1,100]{1,0} dynamic-slice(%q0, %q1, %zero), dynamic_slice_sizes={1,100}
  ROOT %flat = f32[100]{0} bitcast(%row)
}

%outer (p0: f32[10,100], p1: s32[]) -> f32[100] {
  %p0 = f32[10,100]{1,0} parameter(0)
  %p1 = s32[] parameter(1)
  %taken = f32[100]{0} fusion(%p0, %p1), kind=kLoop, calls=%inner
  ROOT %sum = f32[100]{0} add(%taken, %taken)
}

ENTRY %main (i: s32[]) -> f32[100] {
  %i = s32[] parameter(0)
  %x = f32[10,100]{1,0} custom-call(), custom_call_target="AllocateBuffer"
  ROOT %fusion = f32[100]{0} fusion(%x, %i), kind=kOutput, calls=%outer
}
"""


def test_slice_in_a_fusion_inside_another_moves_no_more():
    """A row of 400 bytes, an index of 4 and a result of 400; to reserve memory moves nothing."""
    assert memory_traffic(parse_hlo(NESTED)) == 400 + 4 + 400


STEP = """
%step (p0: f32[10,100], p1: f32[100]) -> (f32[100], f32[10,100]) {
  %p0 = f32[10,100]{1,0} parameter(0)
  %p1 = f32[100]{0} parameter(1)
  %twice = f32[100]{0} add(%p1, %p1)
  ROOT %both = (f32[100]{0}, f32[10,100]{1,0}) tuple(%twice, %p0)
}

ENTRY %main (x: f32[10,100], y: f32[100]) -> (f32[100], f32[10,100]) {
  %x = f32[10,100]{1,0} parameter(0)
  %y = f32[100]{0} parameter(1)
  ROOT %async = (f32[100]{0}, f32[10,100]{1,0}) fusion(%x, %y), kind=kOutput, ALIASING, calls=%step
}
""".replace("ALIASING", "output_to_operand_aliasing={{1}: (0, {})}")


def test_step_of_a_collective_does_not_move_the_whole_array():
    """It passes the array on, and moves 400 bytes twice."""
    assert memory_traffic(parse_hlo(STEP)) == 400 + 400
