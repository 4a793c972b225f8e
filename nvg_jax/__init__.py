"""Next Visual Granularity (arXiv 2508.12811) in JAX: an image as stages of ever more tokens.

    image --autoencoder--> latent --clustering--> structure maps
          --quantizer--> visual granularity sequence: (structure, tokens) of K+1 stages
    class --content--> tokens of stage i --quantizer.add_stage--> canvas
          --structure--> maps of stage i+1 ... --> final canvas --autoencoder--> image

Axes: B batch; H W image; h w latent grid; L = h*w positions; D latent channels; S = K+1 stages
(numbered 0..K, stage i has 2**i unique tokens); N_i unique tokens of stage i; V codebook; C model
width; K bits of a structure embedding.
"""

import os

# Before anything imports TensorFlow (clu does): no notices on the terminal.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")

from nvg_jax import clustering  # noqa: E402
from nvg_jax.pipeline import Output, Pipeline  # noqa: E402
from nvg_jax.tokenizer import GranularitySequence  # noqa: E402

__all__ = ["Output", "Pipeline", "GranularitySequence", "clustering"]
