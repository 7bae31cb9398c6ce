"""The peer: KAF-UNet and UNet in PyTorch, as a user of PyTorch would write them (docs/method.md).

Shape for shape our networks, with the names that `kafjax.torch_import` reads, so that a state dict
of the one gives the outputs of the other (`tests/test_benchmarks.py`). Layout is NCHW; keypoints
are (row, col) in pixels of the image. Every keypoint is real: no masks, which spares the peer work
that ours does. The scattered map is dense, and attention is PyTorch's fused one.
"""

import itertools
import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from kafjax.models.attention import KEYPOINT_FEATURES, POSITION_MLP_FEATURES
from kafjax.models.kaf import FUSION_FEATURES
from kafjax.models.layers import LEAKY_SLOPE
from kafjax.models.unet import NUM_LEVELS

NUM_HEADS = 4


def conv_norm(channels: int, features: int) -> nn.Sequential:
    """Half a block: 3x3 convolution, batch norm, leaky ReLU."""
    return nn.Sequential(
        nn.Conv2d(channels, features, 3, padding=1),
        nn.BatchNorm2d(features),
        nn.LeakyReLU(LEAKY_SLOPE, inplace=True),
    )


def keypoint_mlp(sizes: list[int]) -> nn.Sequential:
    """Linear maps of keypoint features [b, c, k], with batch norm and ReLU between them."""
    layers: list[nn.Module] = []
    for c, features in itertools.pairwise(sizes[:-1]):
        layers += [nn.Conv1d(c, features, 1), nn.BatchNorm1d(features), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers, nn.Conv1d(sizes[-2], sizes[-1], 1))


class PositionalCode(nn.Module):
    """The MLP of normalised positions (docs/method.md 4.2)."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = keypoint_mlp([2, *POSITION_MLP_FEATURES, KEYPOINT_FEATURES])

    def forward(self, keypoints: Tensor, h: int, w: int) -> Tensor:
        """Codes keypoints [b, k, 2] of an h x w map as [b, 256, k]."""
        points = keypoints.to(next(self.parameters()).dtype)
        centered = torch.stack([points[..., 0] - h / 2, points[..., 1] - w / 2], dim=1)
        return self.encoder(centered / (0.7 * max(h, w)))


class Attention(nn.Module):
    """Multi-head self-attention; channel c belongs to head c mod 4."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.proj = nn.ModuleList(nn.Conv1d(features, features, 1) for _ in range(3))
        self.merge = nn.Conv1d(features, features, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Maps [b, c, k] to the message [b, c, k]."""
        query, key, value = (
            project(x).unflatten(1, (-1, NUM_HEADS)).permute(0, 2, 3, 1) for project in self.proj
        )
        message = functional.scaled_dot_product_attention(query, key, value)
        return self.merge(message.permute(0, 3, 1, 2).flatten(1, 2))


class AttentionLayer(nn.Module):
    """Residual attention and MLP (docs/method.md 4.3)."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.attn = Attention(features)
        self.mlp = keypoint_mlp([2 * features, 2 * features, features])

    def forward(self, x: Tensor) -> Tensor:
        """Maps [b, c, k] to [b, c, k]."""
        return x + self.mlp(torch.cat([x, self.attn(x)], dim=1))


class Context(nn.Module):
    """Positional code and the stack of attention layers."""

    def __init__(self, num_layers: int) -> None:
        super().__init__()
        self.kenc = PositionalCode()
        layers = nn.ModuleList(AttentionLayer(KEYPOINT_FEATURES) for _ in range(num_layers))
        self.gnn = nn.ModuleDict({"layers": layers})

    def forward(self, points: Tensor, keypoints: Tensor, h: int, w: int) -> Tensor:
        """Maps keypoint features [b, 256, k] to [b, 256, k]."""
        points = points + self.kenc(keypoints, h, w)
        for layer in self.gnn["layers"].children():
            points = layer(points)
        return points


class KAF(nn.Module):
    """The keypoint-augmented fusion layer: [b, c, h, w] -> [b, 2c, h, w] (docs/method.md 4)."""

    def __init__(self, channels: int, num_layers: int) -> None:
        super().__init__()
        self.feature_mlp = nn.Conv1d(channels, KEYPOINT_FEATURES, 1)
        self.superglue = Context(num_layers)
        self.diffusion_cnn = nn.Sequential(
            nn.Conv2d(KEYPOINT_FEATURES, FUSION_FEATURES, 3, padding=1),
            nn.BatchNorm2d(FUSION_FEATURES),
            nn.ReLU(inplace=True),
            nn.Conv2d(FUSION_FEATURES, channels, 3, padding=1),
        )

    def forward(self, x: Tensor, keypoints: Tensor) -> Tensor:
        """Adds keypoint context; keypoints [b, k, 2] in pixels of x."""
        b, c, h, w = x.shape
        pixel = (keypoints[..., 0] * w + keypoints[..., 1])[:, None]
        gathered = x.flatten(2).gather(2, pixel.expand(-1, c, -1))
        points = self.superglue(self.feature_mlp(gathered), keypoints, h, w)
        # On CPU the last of those at a pixel wins; each receives the pixel's gradient.
        if x.is_contiguous():
            dense = points.new_zeros(b, KEYPOINT_FEATURES, h * w)
            dense = dense.scatter_(2, pixel.expand(-1, KEYPOINT_FEATURES, -1), points)
            dense = dense.view(b, -1, h, w)
        else:  # channels_last
            dense = points.new_zeros(b, h * w, KEYPOINT_FEATURES)
            dense = dense.scatter_(1, pixel.mT.expand(-1, -1, KEYPOINT_FEATURES), points.mT)
            dense = dense.view(b, h, w, -1).permute(0, 3, 1, 2)
        return torch.cat([x, self.diffusion_cnn(dense)], dim=1)


class Encoder(nn.Module):
    """Four blocks, widened by KAF layers, by copies or not at all, and the centre."""

    def __init__(self, filters: int, num_layers: int, *, copies: bool) -> None:
        super().__init__()
        self.copies = copies
        channels, widening = 1, 2 if num_layers or copies else 1
        for level in range(NUM_LEVELS):
            features = filters * 2**level
            setattr(self, f"contr_{level + 1}_1", conv_norm(channels, features))
            setattr(self, f"contr_{level + 1}_2", conv_norm(features, features))
            if num_layers:
                setattr(self, f"graph_{level + 1}", KAF(features, num_layers))
            channels = widening * features
        self.features = 2 * channels  # of the centre
        self.center = nn.Sequential(
            nn.Conv2d(channels, self.features, 3, padding=1),
            nn.ReLU(inplace=True),
            nn.Conv2d(self.features, self.features, 3, padding=1),
            nn.ReLU(inplace=True),
        )

    def forward(self, x: Tensor, keypoints: Tensor) -> tuple[list[Tensor], Tensor]:
        """Gives the levels' features, finest first, and the centre's."""
        levels = []
        for level in range(NUM_LEVELS):
            x = getattr(self, f"contr_{level + 1}_1")(x)
            x = getattr(self, f"contr_{level + 1}_2")(x)
            if hasattr(self, f"graph_{level + 1}"):
                x = getattr(self, f"graph_{level + 1}")(x, keypoints // 2**level)
            elif self.copies:
                x = torch.cat([x, x], dim=1)
            levels.append(x)
            x = functional.max_pool2d(x, 2)
        return levels, self.center(x)


class Decoder(nn.Module):
    """From the centre, of `channels`, back to the image's size, and to logits."""

    def __init__(self, channels: int, num_classes: int) -> None:
        super().__init__()
        for level in reversed(range(1, NUM_LEVELS + 1)):
            features = channels // 2
            setattr(self, f"upscale{level + 1}", nn.ConvTranspose2d(channels, features, 2, 2))
            setattr(self, f"expand_{level}_1", conv_norm(2 * features, features))
            setattr(self, f"expand_{level}_2", conv_norm(features, features))
            channels = features
        self.head = nn.Sequential(nn.Conv2d(channels, num_classes, 1, bias=False))

    def forward(self, levels: list[Tensor], x: Tensor) -> Tensor:
        """Gives logits [b, d, h, w]."""
        for level in reversed(range(1, NUM_LEVELS + 1)):
            x = getattr(self, f"upscale{level + 1}")(x)
            x = torch.cat([x, levels[level - 1]], dim=1)
            x = getattr(self, f"expand_{level}_1")(x)
            x = getattr(self, f"expand_{level}_2")(x)
        return self.head(x)


class PeerUNet(nn.Module):
    """KAF-UNet; without attention layers UNet (c1), or with `copies` UNet (c2)."""

    def __init__(
        self, filters: int, num_attention_layers: int, num_classes: int, *, copies: bool = False
    ) -> None:
        super().__init__()
        self.encoder = Encoder(filters, num_attention_layers, copies=copies)
        self.decoder = Decoder(self.encoder.features, num_classes)
        self.apply(_initialize)

    def forward(self, image: Tensor, keypoints: Tensor) -> Tensor:
        """Gives logits [b, d, h, w] of images [b, 1, h, w] with keypoints int64 [b, k, 2]."""
        return self.decoder(*self.encoder(image, keypoints))


def _initialize(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
        fan_in = module.weight[0].numel()
        nn.init.normal_(module.weight, std=math.sqrt(2 / (1 + LEAKY_SLOPE**2) / fan_in))
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def count_parameters(network: nn.Module) -> int:
    """How many numbers are learnt."""
    return sum(p.numel() for p in network.parameters())
