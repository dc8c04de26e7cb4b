"""The product, the bias and their gradients, against numpy in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm.kernels.dense import matmul
from lm.kernels.elementwise import add_bias

T, D, F = 6, 5, 7
DTYPES = {jnp.float32: 1e-6, jnp.bfloat16: 2e-2}


@pytest.fixture(params=[False, True], ids=["plain", "transposed"])
def transposed(request):
    return request.param


def operands(transposed):
    rng = np.random.default_rng(0)
    x, kernel, g = rng.normal(size=(T, D)), rng.normal(size=(D, F)), rng.normal(size=(T, F))
    return [np.float32(a) for a in (x, kernel.T if transposed else kernel, g)]


def rounded(array, dtype):
    return np.asarray(jnp.asarray(array, dtype), np.float64)


def product_and_gradients(x, kernel, g, dtype, transposed):
    y, pull = jax.vjp(lambda x, kernel: matmul(x, kernel, dtype, transposed), x, kernel)
    return y, *pull(g)


@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES.items())
def test_values_and_gradients_match_float64(transposed, dtype, tolerance):
    x, kernel, g = operands(transposed)
    found = product_and_gradients(*map(jnp.asarray, (x, kernel, g)), dtype, transposed)
    w = np.float64(kernel.T if transposed else kernel)
    of_kernel = np.float64(x).T @ g
    expected = (x @ w, g @ w.T, of_kernel.T if transposed else of_kernel)
    for array, exact in zip(found, expected, strict=True):
        assert array.shape == exact.shape
        np.testing.assert_allclose(array, exact, atol=tolerance * abs(exact).max())


def test_only_the_operands_are_rounded(transposed):
    """With operands that bfloat16 holds exactly nothing but float32's own rounding is left."""
    x, kernel, g = (np.float32(rounded(a, jnp.bfloat16)) for a in operands(transposed))
    found = product_and_gradients(*map(jnp.asarray, (x, kernel, g)), jnp.bfloat16, transposed)
    w = np.float64(kernel.T if transposed else kernel)
    of_kernel = np.float64(x).T @ g
    for array, exact in zip(
        found, (x @ w, g @ w.T, of_kernel.T if transposed else of_kernel), strict=True
    ):
        np.testing.assert_allclose(array, exact, atol=1e-6 * abs(exact).max())


def test_product_and_the_gradient_of_the_kernel_are_float32(transposed):
    x, kernel, g = map(jnp.asarray, operands(transposed))
    for x_type in (jnp.float32, jnp.bfloat16):
        y, dx, dkernel = product_and_gradients(
            x.astype(x_type), kernel, g, jnp.bfloat16, transposed
        )
        assert (y.dtype, dx.dtype, dkernel.dtype) == (jnp.float32, x_type, jnp.float32)


def test_no_product_has_an_operand_in_float32(transposed):
    """Neither forwards nor backwards: such a product would leave the matrix unit."""
    x, kernel, g = map(jnp.asarray, operands(transposed))

    def program(x, kernel, g):
        return product_and_gradients(x, kernel, g, jnp.bfloat16, transposed)

    text = jax.jit(program).lower(x.astype(jnp.bfloat16), kernel, g).as_text()
    products = [line for line in text.splitlines() if "dot_general" in line]
    assert len(products) == 3
    for line in products:  # operands (bf16, bf16), sums f32
        operands_, result = line.rsplit(" : ", 1)[1].split("->")
        assert "xf32" not in operands_, line
        assert "xf32" in result, line


def test_bias_is_added_and_its_gradient_is_summed_over_rows():
    rng = np.random.default_rng(0)
    x, weights = np.float32(rng.normal(size=(2, 2, 3, 4)))
    bias = np.float32(rng.normal(size=4))
    np.testing.assert_array_equal(add_bias(x, bias), x + bias)
    of_x, of_bias = jax.grad(lambda x, b: (add_bias(x, b) * weights).sum(), (0, 1))(x, bias)
    np.testing.assert_array_equal(of_x, weights)
    np.testing.assert_allclose(of_bias, weights.sum((0, 1)), rtol=1e-6)
