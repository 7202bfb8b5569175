"""Triton kernels: batch normalization, residual addition and activation in one operator.

``tiling`` chooses how a shape is cut into programs. ``forward`` and ``backward`` hold the kernels, ``blocks`` the
functions that both use. ``launch`` starts the kernels. ``batch_norm`` is the operator that the rest of bnexp calls.
Only ``blocks``, ``forward``, ``backward`` and ``launch`` import triton, and only when a kernel is launched.
"""
