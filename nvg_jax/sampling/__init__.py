"""From class ids to images: settings, guidance, the stage loop, the compiled sampler."""
