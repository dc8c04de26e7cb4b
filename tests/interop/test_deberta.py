"""Buckets of relative positions against those of transformers."""

import numpy as np
import pytest
from hf_models import torch, transformers

from lm.models.disentangled_attention import log_buckets


@pytest.mark.parametrize(
    ("n_buckets", "longest"), [(256, 512), (6, 20), (4, 9), (32, 512), (128, 1024), (64, 66)]
)
def test_buckets_match_transformers(n_buckets, longest):
    module = transformers.models.deberta_v2.modeling_deberta_v2
    distances = np.arange(-1500, 1501)
    theirs = module.make_log_bucket_position(torch.tensor(distances), n_buckets, longest)
    rows = torch.clamp(theirs.to(torch.long) + n_buckets, 0, 2 * n_buckets - 1).numpy()
    found = log_buckets(distances, 2 * n_buckets, longest)
    np.testing.assert_array_equal(found, rows)
    assert (np.diff(found) >= 0).all()
    assert found[1500] == n_buckets
