"""How each platform computes the parts of a transformer block fastest.

Attention (`cpu_attention`, `tpu_attention`; GPUs use cuDNN's), the rotary embedding (`rotary`) and
the linear layers (`block_linears`). The results are the same up to rounding.
"""
