"""Next Visual Granularity (arXiv 2508.12811) in JAX: an image as stages of ever more tokens.

    image --autoencoder--> latent --clustering--> structure maps
          --quantizer--> visual granularity sequence: (structure, tokens) of K+1 stages
    class --content--> tokens of stage i --quantizer.add_stage--> canvas
          --structure--> maps of stage i+1 ... --> final canvas --autoencoder--> image

Axes: B batch; H W image; h w latent grid; L = h*w positions; D latent channels; S = K+1 stages
(numbered 0..K, stage i has 2**i unique tokens); N_i unique tokens of stage i; V codebook; C model
width; K bits of a structure embedding. N counts the tokens of a transformer, or clusters.
Signatures show shapes with jaxtyping: `Float[Array, "B L D"]`, and "*batch" for any number of axes.
"""

import os
import re
import sys

if os.name == "nt":
    raise ImportError(
        "nvg_jax runs on Linux and macOS; on Windows, use it in WSL 2 (wsl --install)."
    )

from nvg_jax.runtime import interrupts  # noqa: E402

# `python -m nvg_jax.COMMAND`: Ctrl-C may come during the imports. Not another package's command.
if sys.argv[:1] == ["-m"] and any(
    re.match(r"(-m)?nvg_jax(\.|$)", argument) for argument in sys.orig_argv
):
    interrupts.listen()

from etils import epy  # noqa: E402

# Silences TensorFlow's notices, where it is installed and a library imports it.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")

# Imported on first use, so that a command that only reports an error starts fast.
with epy.lazy_api_imports(globals()):
    from nvg_jax import clustering, evaluation
    from nvg_jax.pipeline import Pipeline, SampleOutput
    from nvg_jax.tokenizer import GranularitySequence
    from nvg_jax.workdir import Adapters

__version__ = "0.1.0"
__all__ = [
    "Adapters",
    "GranularitySequence",
    "Pipeline",
    "SampleOutput",
    "clustering",
    "evaluation",
]
