"""Policies of rematerialization: what a layer keeps for its backward pass, by `train.remat`."""

from __future__ import annotations

import jax

HOST = {"offload_src": "device", "offload_dst": "pinned_host"}
REMAT_POLICIES = {
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
    "offload_dots": jax.checkpoint_policies.offload_dot_with_no_batch_dims(**HOST),
    "offload": jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[], names_which_can_be_offloaded=["block_input"], **HOST
    ),
}
