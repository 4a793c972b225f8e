"""How the two heavy parts of a transformer are computed on each platform.

Attention (`cpu_attention`, `tpu_attention`; GPUs use cuDNN's), the rotary embedding (`rotary`) and
the linear layers of a block (`block_linears`). The results are the same up to rounding.
"""
