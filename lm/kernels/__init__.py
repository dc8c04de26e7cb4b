"""Kernels: array functions with custom backward passes or layouts, independent of any model.

Read `dense`, `elementwise` (activations, biases) and `dot_product_attention` first, which every
Transformer uses, and `tiled_attention` for CPUs; then `blockwise_attention`, `ring_attention` and
`splash_attention` for long sequences, `mask_ranges`, `gpu_attention` and `triton_attention` for
GPUs, `grouped_matmul` for experts and `lstm_scan` for recurrent models. Every function without a
leading underscore is public.
"""
