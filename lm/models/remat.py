"""Rematerialization policies: what a layer saves for its backward pass, by `train.remat`.

The output of attention over a sharded sequence is saved: it is most of the work.
"""

from __future__ import annotations

import jax

HOST = {"offload_src": "device", "offload_dst": "pinned_host"}
_policies = jax.checkpoint_policies
_keep_ring = _policies.save_only_these_names("ring_attention")
REMAT_POLICIES = {
    "dots": _policies.save_from_both_policies(
        _policies.dots_with_no_batch_dims_saveable, _keep_ring
    ),
    "full": _keep_ring,
    "offload_dots": _policies.offload_dot_with_no_batch_dims(**HOST),
    "offload": _policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=["block_input", "ring_attention"],
        **HOST,
    ),
}
