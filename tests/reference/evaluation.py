"""Makes evaluation.npz: outputs of PyTorch's evaluation networks for weights drawn by name, and
images resized by TensorFlow 1.

    pip install torch torchvision lpips==0.1.4 pytorch-fid==0.3.0 tensorflow-cpu
    python tests/reference/evaluation.py

As in pretrained.py, the tests draw the same weights and images; only `main` imports PyTorch and
TensorFlow.
"""

import json
from pathlib import Path

import numpy as np

FOLDER = Path(__file__).parent
RESIZED = {"down": (1, 400, 331, 3), "up": (1, 64, 96, 3)}  # images resized to 299 x 299
TF1_SIZES = [(256, 256), (400, 331), (299, 299), (32, 64), (1, 1)]  # by TensorFlow 1


def thinned(images: np.ndarray) -> np.ndarray:
    """Every 23rd pixel along each axis: 13 x 13 of 299 x 299, with the top and right borders."""
    return images[:, ::23, 22::23]


def tf1_images(size: tuple[int, int]) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (2, *size, 3), np.uint8)


def main():
    import lpips
    import tensorflow as tf
    import torch
    import torchvision
    from pretrained import images, seeded
    from pytorch_fid import inception as pytorch_fid
    from torch.nn import functional

    def channels_first(x):
        return torch.from_numpy(np.ascontiguousarray(x)).permute(0, 3, 1, 2)

    def shapes(model):
        state = model.state_dict().items()
        return {name: list(x.shape) for name, x in state if "classifier" not in name}

    def draw(model):
        return {
            name: torch.from_numpy(seeded(name, shape))
            if shape
            else torch.tensor(0)  # num_batches_tracked
            for name, shape in shapes(model).items()
        }

    out = {}

    # Inception v3 as pytorch-fid patches torchvision's; its loader gets our weights.
    plain = torchvision.models.inception_v3(
        num_classes=1008, aux_logits=False, weights=None, init_weights=False
    )
    out["inception_names"] = json.dumps(shapes(plain))
    pytorch_fid.load_state_dict_from_url = lambda *args, **kwargs: draw(plain)
    model = pytorch_fid.fid_inception_v3().eval()
    found = {}
    model.Mixed_6d.branch1x1.register_forward_hook(lambda *args: found.update(spatial=args[-1]))
    model.avgpool.register_forward_hook(lambda *args: found.update(pool=args[-1]))
    with torch.no_grad():
        logits = model(channels_first(images("first", 299))) - model.fc.bias
    out["inception_pool"] = found["pool"][:, :, 0, 0].numpy()
    out["inception_spatial"] = found["spatial"][:, :7].permute(0, 2, 3, 1).reshape(1, -1).numpy()
    out["inception_logits"] = logits.numpy()

    # The input of rFID.
    for name, shape in RESIZED.items():
        x = channels_first(np.random.default_rng(0).uniform(-1, 1, shape).astype(np.float32))
        x = functional.interpolate(
            x, (299, 299), mode="bilinear", antialias=True, align_corners=False
        )
        out[f"resized_{name}"] = thinned(x.permute(0, 2, 3, 1).numpy())

    # The input of FID with TensorFlow's Inception.
    for size in TF1_SIZES:
        x = tf.compat.v1.image.resize_bilinear(tf1_images(size), (299, 299)).numpy()
        out[f"tf1_{size[0]}x{size[1]}"] = thinned(x)

    # LPIPS on AlexNet with its real heads.
    alex = torchvision.models.alexnet(weights=None)
    out["lpips_alex_names"] = json.dumps(shapes(alex))
    model = lpips.LPIPS(net="alex", pnet_rand=True, verbose=False)
    heads = model.state_dict()
    for i in range(5):
        head = heads[f"lin{i}.model.1.weight"].double()
        out[f"lpips_alex_head{i}"] = np.array([head.sum(), (head**2).sum(), head.max()])
    trunk = draw(alex)
    for part in (getattr(model.net, f"slice{i}") for i in range(1, 6)):
        for number, layer in part.named_children():
            if isinstance(layer, torch.nn.Conv2d):
                layer.weight.data = trunk[f"features.{number}.weight"]
                layer.bias.data = trunk[f"features.{number}.bias"]
    with torch.no_grad():
        distance = model(
            channels_first(images("first", 64, 2)), channels_first(images("second", 64, 2))
        )
    out["lpips_alex"] = distance[:, 0, 0, 0].numpy()

    np.savez_compressed(FOLDER / "evaluation.npz", **out)


if __name__ == "__main__":
    main()
