"""Triton kernels: batch normalization, residual addition and activation in one operator.

``tiling`` chooses how a shape is cut into programs, ``blocks`` holds what the kernels in ``forward`` and
``backward`` share, ``launch`` starts them, ``batch_norm`` is the operator that the rest of bnexp calls.
Only ``blocks``, ``forward``, ``backward`` and ``launch`` import triton, and only when something is launched.
"""
