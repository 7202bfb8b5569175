"""Triton kernels: batch normalization, residual addition and activation in one operator.

``plan`` decides how a shape is cut into programs, ``tiles`` addresses and combines tiles, ``forward`` and
``backward`` hold the kernels, ``launch`` starts them, ``batch_norm`` is what the rest of the world calls.
Only the files from ``tiles`` to ``launch`` import triton, and only when something is launched.
"""
