"""The table of parts: what is trained together, by which recipe, in which folder of a workdir."""

from typing import NamedTuple

# Append only: the position of a name is folded into its random key.
GENERATORS = ("content", "structure")


class Part(NamedTuple):
    """What one training trains.

    name: of the part and of its folder in the workdir.
    section: the section of the config with its recipe.
    networks: the networks that it trains.
    images: what is made to measure its FID, "reconstructions" or "samples"; "" if it is not
        measured, since a generator alone makes no image (but for a grid's content generator).
    """

    name: str
    section: str
    networks: tuple[str, ...]
    images: str


TOKENIZER = Part("tokenizer", "tokenizer_training", ("tokenizer",), "reconstructions")
CONTENT = Part("content", "generator_training", ("content",), "")
STRUCTURE = Part("structure", "generator_training", ("structure",), "")
BOTH_GENERATORS = Part("generators", "generator_training", GENERATORS, "samples")
# The folder of a student in training; it is then exported to the workdir.
DISTILLATION = Part("distillation", "distillation", ("structure",), "samples")
GENERATOR_PARTS = (BOTH_GENERATORS, CONTENT, STRUCTURE)
PARTS = {part.name: part for part in (TOKENIZER, *GENERATOR_PARTS, DISTILLATION)}

# --config.part -> the parts that `train` trains, one after the other.
CHOICES = {
    "tokenizer": (TOKENIZER,),
    **{name: (PARTS[name],) for name in GENERATORS},
    "generators": (BOTH_GENERATORS,),
    "separate": (TOKENIZER, STRUCTURE, CONTENT),
    "all": (TOKENIZER, BOTH_GENERATORS),
}
