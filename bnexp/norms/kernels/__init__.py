"""Triton kernels: batch normalization, residual addition and activation in one operator.

``tiling`` decides how a shape is cut into programs, ``blocks`` addresses and combines tiles, ``forward`` and
``backward`` hold the kernels, ``launch`` starts them, ``batch_norm`` is what the rest of bnexp calls.
Only ``blocks``, ``forward``, ``backward`` and ``launch`` import triton, and only when something is launched.
"""
