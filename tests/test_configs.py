"""The presets: each loads with each of its variants, and the published sizes are the published."""

import dataclasses
import importlib
import math
import os
from pathlib import Path

import jax
import pytest
from helpers import forked, optimizer_config

from configs import common
from nvg_jax import Pipeline, cli, layers, models, presets
from nvg_jax.errors import UserError
from nvg_jax.parts import BOTH_GENERATORS, CONTENT
from nvg_jax.runtime.sharding import unbox
from nvg_jax.sampling.settings import Settings
from nvg_jax.tokenizer import TokenizerConfig
from nvg_jax.training import generators, tokenizer
from nvg_jax.training.checks import check_config
from nvg_jax.training.length import resolved, training_length
from nvg_jax.training.optimizers import OptimizerConfig, learning_rate_schedule
from nvg_jax.training.registry import pretrained_names

FOLDER = Path(__file__).resolve().parents[1] / "configs"
VARIANTS = {
    "digits": ("demo", "runlocal"),
    "emoji": ("small", "runlocal"),
    "fashion_mnist": ("fine", "adversarial", "runlocal"),
    "image_folder": ("small", "64", "128", "256", "finetune", "runlocal"),
    "imagenet256": ("d16", "d20", "d24", "runlocal"),
}
EVERY = [(name, arg) for name, args in VARIANTS.items() for arg in (None, *args)]
EVERY += [("image_folder", "128,runlocal"), ("imagenet256", "d24,runlocal")]


def load(name, arg=None):
    return importlib.import_module(f"configs.{name}").get_config(arg)


def keys(config, prefix="") -> set[str]:
    """Dotted names of all settings of a configuration."""
    found = set()
    for key, value in config.items():
        found |= keys(value, f"{prefix}{key}.") if hasattr(value, "items") else {prefix + key}
    return found


def parameters(init, model) -> dict:
    """Shapes of a model's parameters; nothing is computed."""
    return unbox(jax.eval_shape(lambda key: init(model, key), jax.random.key(0)))


def count(tree) -> int:
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def generator(name, config, num_classes):
    return models.ModelConfig.from_config(config, num_classes).make_generator(name)


def test_no_preset_is_left_out():
    files = {path.stem for path in FOLDER.glob("*.py")} - {"__init__", "common"}
    assert files == set(VARIANTS)


def recipes(config):
    return config.tokenizer_training, config.generator_training, config.distillation


@pytest.mark.parametrize("name, arg", EVERY)
def test_every_variant_is_a_whole_configuration(name, arg):
    config = load(name, arg)
    check_config(config)
    assert keys(config) == keys(importlib.import_module("configs.common").base())
    sizes = TokenizerConfig(**config.tokenizer)
    for training in (resolved(recipe, 1000) for recipe in recipes(config)):
        OptimizerConfig(**training.optimizer)
        assert training_length(training.length, 1000, training.batch_size) > 0
    for part in models.GENERATORS:
        transformer = layers.TransformerConfig(**config[part])
        layers.rope_split(transformer.head_dim, sizes.num_stages - 1)
    Settings(**config.sampling).expand(sizes.num_stages, sizes.codebook_size)
    assert config.data.name and config.part == ("generators" if arg == "finetune" else "all")
    resize = config.data.resize or round(min(sizes.image_size) * 288 / 256)
    assert resize >= min(sizes.image_size)


@pytest.mark.slow
@pytest.mark.parametrize("name, arg", [(n, a) for n, a in EVERY if a and "runlocal" in a])
def test_runlocal_is_tiny(name, arg):
    config = load(name, arg)
    assert tuple(config.tokenizer.image_size) == (8, 8) and config.dtype == "float32"
    for training in recipes(config):
        assert training_length(training.length, 10**6, training.batch_size) <= 20
        assert training.batch_size <= 16
    for part in models.GENERATORS:
        model = generator(part, config, num_classes=10)
        assert count(parameters(models.init_generator, model)) < 100_000


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("arg, wrong", [("d99", "d99"), ("runlocal,tiny,big", "tiny, big")])
def test_an_unknown_variant_gets_the_known_ones(name, arg, wrong):
    sentence = f"Unknown variant '{wrong}'; choose from {', '.join(VARIANTS[name])} "
    with pytest.raises(ValueError) as error:
        load(name, arg)
    assert str(error.value).startswith(sentence)


@pytest.mark.parametrize(
    "name, arg, sentence",
    [
        ("imagenet256", "d16,d24", "Choose one model size, got d16, d24."),
        ("image_folder", "64,256", "Choose one size, got 64, 256."),
        ("image_folder", "finetune,64", "finetune has the sizes of d16; give it alone."),
    ],
)
def test_two_sizes_are_one_too_many(name, arg, sentence):
    with pytest.raises(ValueError, match=sentence):
        load(name, arg)


def test_the_first_size_is_the_default():
    assert load("imagenet256") == load("imagenet256", "d16") == load("imagenet256", "")
    assert load("image_folder") == load("image_folder", "64")


def test_changing_one_configuration_leaves_the_next_alone():
    changed = load("digits")
    changed.generator_training.optimizer.clip = 7.0
    assert changed.tokenizer_training.optimizer.clip == 1.0
    assert load("digits").generator_training.optimizer.clip == 1.0


# The published models.


@pytest.mark.slow
@pytest.mark.parametrize(
    "size, width, content, structure",
    [
        ("d16", 1024, 255_183_904, 64_369_672),
        ("d20", 1280, 496_602_912, 124_972_808),
        ("d24", 1536, 856_271_392, 215_176_712),
    ],
)
def test_published_generators(size, width, content, structure):
    config = load("imagenet256", size)
    depth = int(size[1:])
    for name, expected, wide in (("content", content, width), ("structure", structure, width // 2)):
        assert (config[name].width, config[name].depth, config[name].head_dim) == (wide, depth, 64)
        assert layers.TransformerConfig(**config[name]).drop_path == pytest.approx(0.1 * depth / 24)
        model = generator(name, config, num_classes=1000)
        assert count(parameters(models.init_generator, model)) == expected


@pytest.mark.parametrize(
    "size, epochs, batch_size, iterations, rate",
    [
        ("d16", 200, 768, 333_000, 3e-4),
        ("d20", 250, 720, 444_000, 2.8125e-4),
        ("d24", 350, 864, 519_000, 3.375e-4),
    ],
)
def test_published_batch_sizes(size, epochs, batch_size, iterations, rate):
    """They make the iterations of the paper, which are given in thousands, and the rates."""
    training = load("imagenet256", size).generator_training
    assert (training.length, training.batch_size) == (f"{epochs} epochs", batch_size)
    steps = training_length(training.length, 1_281_167, training.batch_size)
    assert abs(steps - iterations) < 1000
    optimizer = OptimizerConfig(**training.optimizer)
    schedule = learning_rate_schedule(optimizer, training.batch_size, steps)
    assert schedule(steps // 2) == pytest.approx(rate)
    if size != "d24":  # constant for 80% of all steps after the warm-up
        assert optimizer.decay_start * steps == pytest.approx(1000 + 0.8 * steps, abs=1)


@pytest.mark.slow
def test_published_tokenizer():
    sizes = TokenizerConfig(**load("imagenet256").tokenizer)
    assert sizes.num_stages == 9
    found = parameters(models.init_tokenizer, models.ModelConfig(sizes).make_tokenizer())
    assert {name: count(tree) for name, tree in found.items()} == {
        "encoder": 45_025_696,
        "decoder": 65_092_355,
        "quantizer": 214_304,
    }


def test_the_documentation_names_every_sampling_setting():
    page = (FOLDER.parent / "docs" / "sampling.md").read_text()
    for name in Settings.specs():
        assert f"`{name}`" in page
        assert name in Pipeline.sample.__doc__


@pytest.mark.slow
def test_help_shows_the_flags_that_commands_share():
    shown = forked("-m", "nvg_jax.sample", "--help").stdout
    for name in ("workdir", "seed", "dtype", *Settings.specs()):
        assert f"--{name}:" in shown or f"--[no]{name}:" in shown
    assert "--config:" in forked("-m", "nvg_jax.train", "--help").stdout


def test_published_recipe():
    config = load("imagenet256", "d16")
    optimizer = OptimizerConfig(**config.generator_training.optimizer)
    # The values of `base`, which tests/test_optimizers.py checks, except the start of the decay:
    # the rate is constant for 80% of the steps after the warm-up (200 epochs at batch 768).
    steps = 200 * 1_281_167 / 768
    assert optimizer.decay_start * steps == pytest.approx(1000 + 0.8 * steps)
    assert dataclasses.replace(optimizer, decay_start=0.8) == optimizer_config()
    assert config.class_dropout == 0.1 and config.dtype == "bfloat16"
    assert config.tokenizer_training.dtype == "float32"
    assert config.data.resize_filter == "published" and config.data.resize == 0
    # Trained for more than 300 epochs: decay from epoch 200 of 350 to 0.01.
    long = load("imagenet256", "d24").generator_training.optimizer
    assert long.decay_start * 350 == pytest.approx(200) and long.final == 0.01
    sampling = Settings(**config.sampling).expand(9, 4096)
    assert sampling.content_guidance[0] == 1 and sampling.content_guidance[-1] == 3.5
    assert sampling.structure_guidance[0] == 1 and sampling.structure_guidance[-1] == 2.5
    assert sampling.top_p[0] == 1 and sampling.top_p[-1] == 0.5 and sampling.flow_steps == 25


def test_the_losses_that_need_other_networks():
    """All of the paper's for ImageNet; none where a laptop or one's own images are the aim."""
    published = tokenizer.loss_config(load("imagenet256"))
    assert (published.perceptual_weight, published.adversarial_weight) == (1.0, 0.1)
    assert published.pretrained_names == ("lpips", "dino")
    repa = generators.repa_config(load("imagenet256"), CONTENT)
    assert (repa.weight, repa.block) == (0.5, 8)
    for name, arg in EVERY:
        if name != "imagenet256" or "runlocal" in (arg or ""):
            config = load(name, arg)
            assert tokenizer.loss_config(config).pretrained_names == ()
            assert pretrained_names((BOTH_GENERATORS,), config) == set()
    assert tokenizer.loss_config(load("fashion_mnist", "adversarial")).adversarial_weight > 0


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(part="content"), "trained together .* and this is part=content; set it to 0"),
        (dict(part="separate"), "this is part=separate; set it to 0"),
        (dict(evaluation=dict(judge="me")), "efficientnet or classifier, got 'me'"),
        (dict(evaluation=dict(reference="test")), "judge=classifier compares with"),
        (dict(part="generators", data=dict(name="sequences")), "no images to compare samples"),
    ],
)
def test_an_fid_that_cannot_be_measured_is_refused_at_once(changes, message):
    config = load("digits", "runlocal")
    config.generator_training.fid_every = 5
    check_config(config)
    config.update(changes)
    with pytest.raises(UserError, match=message):
        check_config(config)


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(data=dict(name="cats")), "There is no data set 'cats'; choose digits"),
        (dict(tokenizer_training=dict(reconstruction="l3")), "reconstruction must be one of l1"),
        (dict(data=dict(on_bad="skp")), "on_bad must be 'error' or 'skip', not 'skp'"),
        (dict(data=dict(resize_filter="bicubic")), "data.resize_filter must be one of lanczos"),
        (dict(data=dict(resize=4)), "cannot be cropped"),
        (dict(generator_training=dict(repa_weight=0.5, repa_block=40)), "repa_block must be one"),
        (
            dict(
                generator_training=dict(fid_every=4),
                evaluation=dict(judge="inception", reference="tarin"),
            ),
            "evaluation.reference must be train, test or an .npz file, got 'tarin'",
        ),
    ],
)
def test_what_is_wrong_without_data_is_refused_before_any_machine_is_asked_for(changes, message):
    config = load("digits", "runlocal")
    check_config(config)
    config.update(changes)
    with pytest.raises(UserError, match=message):
        check_config(config)


def numbers(config, path=()):
    """(path, value) of every number of a config and every tuple of numbers."""
    for name, value in config.items():
        if hasattr(value, "items"):
            yield from numbers(value, (*path, name))
        elif not isinstance(value, (str, bool)):
            yield (*path, name), value


def with_value(path, value):
    config = common.base()
    config.data.name = "digits"
    section = config
    for name in path[:-1]:
        section = section[name]
    with section.unlocked(), section.ignore_type():
        section[path[-1]] = value
    return config


@pytest.mark.slow
def test_every_number_has_a_range_without_nan_and_infinity():
    check_config(with_value(["seed"], 0))
    for path, default in numbers(common.base()):
        for wrong in (math.nan, math.inf, -math.inf, -2):
            if path[0] == "sampling" or (wrong == -2 and path[-1] == "structure_guidance"):
                continue  # the ranges of `Settings`; any finite number
            value = (wrong,) * max(len(default), 1) if isinstance(default, tuple) else wrong
            with pytest.raises(UserError, match=f"^{'.'.join(path)} must be .*got"):
                check_config(with_value(path, value))


@pytest.mark.parametrize(
    "path, value, message",
    [
        ("seed", 2**32, "seed must be 0 or more and at most 4294967295, got 4294967296"),
        ("generator_training.optimizer.clip", 0.0, "clip must be above 0, got 0.0"),
        (
            "tokenizer_training.optimizer.ema_decay",
            1.0,
            "must be 0 or more and below 1, or -1, got",
        ),
        ("distillation.fid_samples", 1, "fid_samples must be 2 or more, got 1"),
        ("tokenizer.image_size", (64, 0), "image_size must be 1 or more, got .64, 0."),
        ("profile_steps", (5.5, 6), "profile_steps takes whole numbers, got .5.5, 6."),
        ("stall_timeout", 1e30, "stall_timeout must be 0 or more and at most 100000000, got"),
        ("tokenizer.image_size", ("64x64",), "takes numbers, such as 64,64; got '64x64'"),
        ("tokenizer.image_size", (64,), "image_size is a height and a width, such as 64,64; got"),
    ],
)
def test_ranges(path, value, message):
    with pytest.raises(UserError, match=message):
        check_config(with_value(path.split("."), value))


@pytest.mark.parametrize(
    "change, message",
    [
        ("config.tokenizer_training.lenght = '2 steps'", "tokenizer_training.lenght. Did you mean"),
        ("config.data.augment = True", "There is no setting data.augment."),
        ("config.content.widht = 3", "There is no setting content.widht. Did you mean 'width'"),
        ("config.seed = None", "seed must be a whole number, got None"),
        ("config.keep = 3", "There is no setting keep"),
        ("config.tokenizer_training.keep = 2.5", "keep must be a whole number, got 2.5"),
        ("config.tokenizer_training.keep = True", "keep must be a whole number, got True"),
        ("config.generator_training.optimizer.clip = None", "clip must be a number, got None"),
        ("config.generator_training.optimizer.clip = '1'", "clip must be a number, got '1'"),
        ("config.tokenizer.image_size = None", "image_size must be numbers, such as"),
        ("config.part = 3", "part must be text, got 3"),
        ("config.fast_compile = 1", "fast_compile must be True or False, got 1"),
        ("config.mesh = dict(data=1)", "has no mesh.fsdp: begin it with base"),
        ("config.lora = 4", "lora must be a section, as in configs/common.py, not int"),
        ("del config.data.on_bad", "has no data.on_bad"),
        ("config = config.to_dict()", "The config must be a ConfigDict, as in .*, not dict"),
    ],
)
def test_a_config_file_has_settings_that_exist_and_of_their_kinds(change, message):
    """Overrides are checked by ml_collections; what a file sets is not."""
    config = load("digits", "runlocal")
    names = {"config": config}
    with config.ignore_type():
        exec(change, names)
    with pytest.raises(UserError, match=message):
        check_config(names["config"])


def test_configs_of_several_folders_are_loaded_in_one_process(tmp_path):
    for name in ("one", "two"):
        folder = tmp_path / name / "configs"
        folder.mkdir(parents=True)
        (folder / f"shared_{name}.py").write_text("SEED = 5\n")
        (folder / "mine.py").write_text(
            f"from configs import common, shared_{name}\n\n"
            "def get_config():\n    config = common.base()\n"
            f"    config.seed = shared_{name}.SEED\n    return config\n"
        )
        assert presets.load(str(folder / "mine.py")).seed == 5
    (tmp_path / "mine.txt").write_text("")
    with pytest.raises(UserError, match=r"mine.txt must be a Python file, whose name ends in .py"):
        presets.load(str(tmp_path / "mine.txt"))


@pytest.mark.parametrize("returned", ["None", "{'part': 'all'}"])
def test_a_config_file_returns_a_config(tmp_path, returned):
    (tmp_path / "mine.py").write_text(f"def get_config():\n    return {returned}\n")
    for override in ([], ["--config.seed=3"]):
        done = forked(
            *("-m", "nvg_jax.train", f"--config={tmp_path}/mine.py", f"--workdir={tmp_path}/run"),
            *override,
        )
        assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
        assert "mine.py must return a ConfigDict, not" in done.stderr


def test_a_file_without_its_function_is_named(tmp_path):
    (tmp_path / "mine.py").write_text("config = 3\n")
    with pytest.raises(UserError, match="mine.py: it has no function get_config"):
        presets.load(str(tmp_path / "mine.py"))


def test_a_process_starts_only_with_a_whole_config(tmp_path):
    """These settings are needed before anything is checked in training."""
    flags = ["-m", "nvg_jax.train", f"--workdir={tmp_path}/run"]
    (tmp_path / "mine.py").write_text(
        "import ml_collections\n\ndef get_config():\n"
        "    return ml_collections.ConfigDict({'part': 'all'})\n"
    )
    for given, message in (
        ([f"--config={tmp_path}/mine.py"], "begin it with base() of configs/common.py"),
        (["--config=configs/digits.py", "--config.stall_timeout=1e12"], "at most 100000000"),
        (["--config=configs/digits.py", "--price=3"], "--price needs --check"),
    ):
        done = forked(*flags, *given)
        assert done.returncode == 2 and message in done.stderr, done.stderr
        assert "Traceback" not in done.stderr


def test_fid_is_checked_of_what_is_trained_and_lengths_of_all():
    config = load("digits", "runlocal")
    config.update(part="generators", data={"name": "sequences"})
    config.tokenizer_training.fid_every = 100
    check_config(config)
    config.distillation.length = "foo"
    with pytest.raises(UserError, match="foo"):
        check_config(config)


def test_flags_of_xla_are_set_once(monkeypatch):
    """Their text is part of the key of the compilation cache: twice is another program."""
    monkeypatch.setenv("XLA_FLAGS", " --xla_a=1  --xla_b=2 ")
    cli.add_xla_flags("--xla_b=2", "--xla_c=3")
    assert os.environ["XLA_FLAGS"] == "--xla_a=1 --xla_b=2 --xla_c=3"
