import jax
import numpy as np

from lm.kernels.bias import add_bias


def test_a_bias_is_added_and_its_gradient_is_summed_over_rows():
    rng = np.random.default_rng(0)
    x, weights = np.float32(rng.normal(size=(2, 2, 3, 4)))
    bias = np.float32(rng.normal(size=4))
    np.testing.assert_array_equal(add_bias(x, bias), x + bias)
    of_x, of_bias = jax.grad(lambda x, b: (add_bias(x, b) * weights).sum(), (0, 1))(x, bias)
    np.testing.assert_array_equal(of_x, weights)
    np.testing.assert_allclose(of_bias, weights.sum((0, 1)), rtol=1e-6)
