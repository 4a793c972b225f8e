"""All settings with their defaults: the published recipe (paper, Section 4.1 and Appendix).

Each preset is base() with a few changes. Any setting can be overridden on the command line:

    --config.generator_training.length="800 steps" --config.content.depth=8
"""

import ml_collections


def base() -> ml_collections.ConfigDict:
    """Every setting; sizes and recipes are those published for ImageNet at 256 pixels (d16)."""
    optimizer = dict(
        learning_rate=1e-4,  # at batch size 256; scales linearly with it
        schedule="linear",  # constant, then linear decay; or "cosine", "constant"
        warmup_steps=1000,  # -1: follows from the length (nvg_jax/training/length.py)
        warmup_start=0.005,
        decay_start=0.8,  # fraction of the steps
        final=0.1,  # final rate as a fraction of the peak
        b1=0.9,
        b2=0.95,
        weight_decay=0.05,
        clip=1.0,
        ema_decay=0.9999,  # -1: follows from the length
        ema_warmup=False,  # True: the decay starts as (1 + step) / (10 + step)
    )
    run = dict(
        log_every=100,  # in steps, like eval_every and save_every; -1: follows from the length
        eval_every=5000,
        eval_images=0,  # evenly spaced in the test split; 0: all
        save_every=5000,
        keep=2,  # number of checkpoints to keep
        max_skipped_steps=0,  # steps in a row that may be left out for bad gradients; 0: none
        fid_every=0,  # steps between FID measurements; the best model is kept; 0: never
        fid_samples=10_000,
    )
    # ema_decay: checkpoints keep the tokenizer's average; as published, its raw weights are used.
    tokenizer_optimizer = optimizer | dict(
        schedule="cosine", warmup_steps=0, final=0.0, weight_decay=0.0
    )
    return ml_collections.ConfigDict(
        dict(
            part="all",  # tokenizer, structure, content, generators, separate, all
            seed=0,
            tokenizer_workdir="",  # a run, export, bundled or hub model; "": --workdir
            init_from="",  # model to start from; its data and classes may differ
            lora=dict(rank=0),  # the adapters' rank; 0: no adapters, all weights are trained
            pretrained_dir="",  # folder of LPIPS, DINO, ...; "": $NVG_CACHE or ~/.cache/nvg_jax
            dtype="float32",  # dtype of the computation; "bfloat16" on accelerators
            fast_compile=False,  # compile with little optimization: for runs of a few steps
            wandb_project="",  # also write metrics to this project of Weights & Biases; "": do not
            profile_steps=(),  # (first, last) step of each part to trace, for XProf and TensorBoard
            stall_timeout=0.0,  # seconds without a step after which a process is ended; 0: never
            mesh=dict(data=-1, fsdp=1, tensor=1),  # -1: all remaining devices
            data=dict(
                name="",  # digits, fashion_mnist, image_folder, tfds:NAME, sequences
                data_dir="",
                credits="",  # whom to name where samples are shown; exports, cards and the page do
                resize=0,  # short side before the crop; 0: image size * 288 / 256
                resize_filter="",  # lanczos, published; "": as the model to build on, else lanczos
                pad=0,  # random shifts by up to this many pixels
                on_bad="error",  # what to do with unreadable images; or "skip": skip and count them
                num_threads=2,
                num_workers=0,  # processes that decode images; 0: threads only
                prefetch=4,
            ),
            tokenizer=dict(
                image_size=(256, 256),
                latent_size=(16, 16),
                latent_dim=32,
                codebook_size=4096,
                base_channels=128,
                channel_multipliers=(1, 2, 4, 4, 4),
                blocks_per_level=2,
                structure="latent",  # the maps; "grid": halves the grid, for all images alike
            ),
            content=transformer(1024, 16),
            structure=transformer(512, 16),
            evaluation=dict(  # what fid_every measures
                judge="inception",  # or "efficientnet", or "classifier": trained when a run starts
                reference="train",  # compared with the samples: train, test or an .npz file
            ),
            class_dropout=0.1,  # share of labels replaced by the null class, for guidance
            tokenizer_training=run
            | dict(
                length="100 epochs",  # or "800 steps", "9 epochs, at least 800 steps"
                batch_size=256,
                dtype="",  # dtype of the computation of this part; "": config.dtype
                reconstruction="l1",  # or "l2"
                perceptual_weight=1.0,  # LPIPS; 0: off
                adversarial_weight=0.1,  # 0: no discriminator
                lecam_weight=0.001,
                discriminator="dino",  # or "small": for small images, needs no pretrained weights
                discriminator_weight_decay=5e-4,  # decays all its parameters
                discriminator_sees_generator_loss=False,  # True: as in the published code
                index_backprop_epochs=1.0,  # the first, with gradients through the token choice
                optimizer=tokenizer_optimizer,
            ),
            generator_training=run
            | dict(
                length="200 epochs",  # or "800 steps"
                batch_size=768,
                repa_weight=0.5,  # REPA: alignment of the content generator with DINOv2; 0: off
                repa_block=8,  # aligns the hidden states after this number of blocks
                optimizer=optimizer | dict(name="adamw"),  # or "muon" (docs/training.md)
            ),
            distillation=run  # nvg_jax.distill: fewer steps for the structure generator
            | dict(
                length="10 epochs",
                batch_size=768,
                reflow=True,  # False: only build the guidance in
                eval_images=500,  # for each, the teacher's flow is solved
                flow_steps=4,  # the student's steps; it also supports any divisor of them
                teacher_steps=0,  # the teacher's steps; 0: as its folder recommends
                structure_guidance=(),  # the teacher's guidance; (): as its folder recommends
                optimizer=optimizer | dict(ema_decay=0.999),
            ),
            sampling=dict(
                temperature=1.0,
                top_k=0,
                top_p=(1.0, 0.5),  # one number, (first, last) stage, or one number per stage
                content_guidance=(1.0, 3.5),
                structure_guidance=(1.0, 2.5),
                flow_steps=25,
                solver="euler",  # solver of the structure flow; or "heun", "multistep"
                flow_shift=0.0,  # 0: the published time shift
                structure_solves=(),  # stages whose splits are solved; (): all
                flow_restart=1.0,  # time at which later solves start, from the last solution
                gumbel=False,
            ),
        )
    )


def transformer(width: int, depth: int, head_dim: int = 64, drop_path: float = -1.0) -> dict:
    """Sizes of a generator; drop_path=-1 means the published 0.1 * depth / 24."""
    return dict(
        width=width, depth=depth, head_dim=head_dim, mlp_ratio=4, drop_path=drop_path, remat="none"
    )


def without_pretrained(config: ml_collections.ConfigDict):
    """Turns off what needs pretrained networks: perceptual and adversarial losses, REPA, FID."""
    config.tokenizer_training.update(perceptual_weight=0.0, adversarial_weight=0.0)
    config.generator_training.repa_weight = 0.0
    config.evaluation.judge = "classifier"


def follow_length(training: ml_collections.ConfigDict):
    """Lets warm-up, averaging and intervals follow from the length, in a folder of any size."""
    training.update(log_every=-1, eval_every=-1, save_every=-1)
    training.optimizer.update(warmup_steps=-1, ema_decay=-1.0, ema_warmup=True)


def small_models(config: ml_collections.ConfigDict):
    """Training and sampling settings for models that a CPU trains in minutes or hours."""
    config.content.remat = config.structure.remat = "blocks"  # also faster on a CPU
    config.tokenizer_training.update(
        batch_size=16, log_every=50, save_every=500, index_backprop_epochs=0.0
    )
    config.tokenizer_training.optimizer.update(
        learning_rate=2e-2, warmup_steps=100, final=0.02, ema_decay=0.99
    )
    config.generator_training.optimizer.update(
        learning_rate=1.6e-2, warmup_steps=200, decay_start=0.5, final=0.02, ema_decay=0.998
    )
    config.distillation.update(batch_size=16, log_every=50, save_every=200)
    config.distillation.optimizer.update(
        learning_rate=4e-3, warmup_steps=50, decay_start=0.5, final=0.02, ema_decay=0.99
    )
    config.sampling.update(
        content_guidance=(2.0, 2.0), structure_guidance=(1.0, 1.0), top_p=(0.9, 0.9)
    )


def choose(arg: str | None, variants) -> list[str]:
    """The variants named by a comma-separated argument.

    Raises:
        ValueError: an unknown variant; the message lists the known ones.
    """
    names = [name for name in (arg or "").split(",") if name]
    unknown = [name for name in names if name not in variants]
    if unknown:
        raise ValueError(
            f"Unknown variant {', '.join(unknown)!r}; choose from {', '.join(variants)} "
            "(--config=FILE.py:VARIANT; separate several by commas)."
        )
    return names


def run_locally(config: ml_collections.ConfigDict):
    """Shrinks a preset to 8 x 8 images and a few steps of tiny models: takes seconds on a CPU."""
    without_pretrained(config)
    config.dtype = "float32"
    config.fast_compile = True
    config.data.update(resize=8, pad=0, num_workers=0, num_threads=1)
    config.tokenizer.update(
        image_size=(8, 8),
        latent_size=(4, 4),
        latent_dim=4,
        codebook_size=16,
        base_channels=32,
        channel_multipliers=(1, 1),
        blocks_per_level=1,
    )
    config.content = transformer(32, 2, head_dim=16)
    config.structure = transformer(32, 2, head_dim=16)
    for training in (config.tokenizer_training, config.generator_training, config.distillation):
        training.update(length="12 steps", batch_size=16)
        training.update(log_every=2, save_every=4, eval_every=12, eval_images=100)
        training.optimizer.update(warmup_steps=2, learning_rate=1e-3, ema_decay=0.8)
    config.tokenizer_training.index_backprop_epochs = 0.0
    config.sampling.flow_steps = 2
