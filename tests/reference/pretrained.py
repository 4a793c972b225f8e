"""Makes pretrained.npz: outputs of PyTorch's implementations for weights drawn by name.

    pip install torch torchvision lpips==0.1.4 timm
    python tests/reference/pretrained.py

The tests draw the same weights and images, so only outputs are stored, with the names and shapes
of the reference's tensors. The tests import this file; only `main` imports PyTorch.
`lpips_vgg.pth` and `lpips_alex.pth` are the unchanged LPIPS heads of the package lpips 0.1.4
(lpips/weights/v0.1/vgg.pth and alex.pth); their license is in LICENSE-lpips.
"""

import json
import zlib
from pathlib import Path

import numpy as np

FOLDER = Path(__file__).parent


def seeded(name: str, shape) -> np.ndarray:
    """The tensor called `name`, float32, at a scale that keeps activations in range."""
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    x = rng.standard_normal(shape, dtype=np.float32)
    if "running_var" in name:
        return 2 * np.exp(x)
    if ".bn.weight" in name:
        return 1 + 0.2 * x
    if "gamma" in name:
        return 0.5 + 0.2 * x
    if "norm" in name and name.endswith("weight"):
        return 1 + 0.2 * x
    if name.startswith("features") and x.ndim == 4:  # keeps the variance through a ReLU
        return x * np.float32((2 / x[0].size) ** 0.5)
    if x.ndim in (2, 4):
        return x * np.float32(1.5 * x[0].size ** -0.5)
    return 0.3 * x


def images(name: str, size: int, batch: int = 1) -> np.ndarray:
    """Noise and a slope, float32 (batch, size, size, 3) in [-1, 1]."""
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    slope = np.linspace(-0.7, 0.7, size, dtype=np.float32)[:, None]
    return slope + rng.uniform(-0.3, 0.3, (batch, size, size, 3)).astype(np.float32)


def sample(tokens: np.ndarray) -> np.ndarray:
    """Tokens (1, N, C) -> (10, C): nine of them, and the mean of all."""
    return np.stack([*tokens[0, :: tokens.shape[1] // 8][:9], tokens[0].mean(0)])


def main():
    import lpips
    import timm
    import torch
    import torchvision
    from torch.nn import functional

    def channels_first(x):
        return torch.from_numpy(np.ascontiguousarray(x)).permute(0, 3, 1, 2)

    def fill(model):
        state = {name: torch.from_numpy(seeded(name, x.shape)) for name, x in shapes(model).items()}
        model.load_state_dict(state)
        return model.eval()

    def shapes(model):
        return {name: x for name, x in model.state_dict().items() if "classifier" not in name}

    def table(model):
        return json.dumps({name: list(x.shape) for name, x in shapes(model).items()})

    def normalized(x):
        mean, std = timm.data.IMAGENET_DEFAULT_MEAN, timm.data.IMAGENET_DEFAULT_STD
        return torchvision.transforms.functional.normalize((x + 1) / 2, mean, std)

    out = {}

    # LPIPS with its real heads.
    vgg = torchvision.models.vgg16(weights=None)
    out["lpips_names"] = table(vgg)
    model = lpips.LPIPS(net="vgg", pnet_rand=True, verbose=False)
    heads = model.state_dict()
    for i in range(5):
        head = heads[f"lin{i}.model.1.weight"].double()
        out[f"lpips_head{i}"] = np.array([head.sum(), (head**2).sum(), head.max()])
    trunk = {name: torch.from_numpy(seeded(name, x.shape)) for name, x in shapes(vgg).items()}
    for part in (getattr(model.net, f"slice{i}") for i in range(1, 6)):
        for number, layer in part.named_children():
            if isinstance(layer, torch.nn.Conv2d):
                layer.weight.data = trunk[f"features.{number}.weight"]
                layer.bias.data = trunk[f"features.{number}.bias"]
    first = channels_first(images("first", 64, 2))
    second = channels_first(images("second", 64, 2)).requires_grad_()
    distance = model(first, second)[:, 0, 0, 0]
    out["lpips"] = distance.detach().numpy()
    distance[0].backward()
    out["lpips_gradient"] = second.grad[:1].permute(0, 2, 3, 1).numpy()

    # DINO ViT-S/16, with the published discriminator's tanh approximation of GELU.
    model = fill(timm.create_model("vit_small_patch16_224", num_classes=0, act_layer="gelu_tanh"))
    out["dino_names"] = table(model)
    x = normalized(channels_first(images("first", 224)))
    with torch.no_grad():
        x = model.norm_pre(model.patch_drop(model._pos_embed(model.patch_embed(x))))
        taps = [x]
        for block in model.blocks:
            x = block(x)
            taps.append(x)
    out["dino"] = np.stack([sample(taps[i].numpy()) for i in (0, 3, 6, 9, 12)])

    # DINOv2 ViT-B/14: timm resamples the position embedding when it loads the weights.
    large = timm.create_model("vit_base_patch14_dinov2", num_classes=0)
    out["dinov2_names"] = table(large)
    state = fill(large).state_dict()
    model = timm.create_model("vit_base_patch14_dinov2", num_classes=0, img_size=224).eval()
    model.load_state_dict(timm.models.vision_transformer.checkpoint_filter_fn(state, model))
    x = functional.interpolate(channels_first(images("first", 256)), (224, 224), mode="bicubic")
    out["dinov2_input"] = x[:, :, ::32, ::32].permute(0, 2, 3, 1).numpy()
    with torch.no_grad():
        tokens = model.forward_features(normalized(x))
    out["dinov2"] = sample(tokens[:, 1:].numpy())

    np.savez_compressed(FOLDER / "pretrained.npz", **out)


if __name__ == "__main__":
    main()
