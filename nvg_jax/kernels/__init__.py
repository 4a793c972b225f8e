"""How each platform computes the parts of the networks fastest.

Attention (`cpu_attention`, `tpu_attention`; GPUs use cuDNN's), the rotary embedding (`rotary`) and
the linear layers (`block_linears`) of a transformer block; convolutions (`convolution`). Results
are the same up to rounding.
"""
