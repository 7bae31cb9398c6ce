"""The peers' sides: our PyTorch networks in three forms, and MONAI's UNet."""

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn

from benchmarks.case import Case, inputs
from benchmarks.peer import PeerUNet, count_parameters
from benchmarks.profiles import profile_torch
from benchmarks.workers import Side
from kafjax.cores import usable_cores

FORMS = ("eager", "channels_last", "compiled")


def make_side(case: Case, form: str = "eager") -> Side:
    """The peer's `step` and `forward` on the GPU, if there is one, else the CPU.

    `form` is 'eager', 'channels_last' (with autocast to bfloat16 where the case computes in it), or
    'compiled' (the same by `torch.compile`). float32 on a GPU may use TF32, as JAX does.
    """
    copies = case.network == "unet_c2"
    sizes = case.filters, case.layers, case.num_classes
    return _side(case, form, lambda: PeerUNet(*sizes, copies=copies))


def make_monai_side(case: Case, form: str = "eager") -> Side:
    """MONAI's UNet of the plain network's widths, with batch norm."""
    from monai.networks.nets import BasicUNet

    f = case.filters
    widths = (f, 2 * f, 4 * f, 8 * f, 16 * f, f)

    def build() -> nn.Module:
        return _WithoutKeypoints(
            BasicUNet(2, 1, case.num_classes, widths, norm=("batch", {"affine": True}))
        )

    return _side(case, form, build)


def make_profiled_side(case: Case, form: str) -> Side:
    """The peer's side of a comparison on a GPU, with its kernels."""
    side = make_side(case, form)
    side.calls["profile"] = lambda: profile_torch(side.calls["step"])
    return side


class _WithoutKeypoints(nn.Module):
    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network

    def forward(self, image: torch.Tensor, keypoints: torch.Tensor) -> torch.Tensor:
        return self.network(image)


def _side(case: Case, form: str, build: Callable[[], nn.Module]) -> Side:
    if form not in FORMS:
        raise ValueError(f"form is {form!r}, expected one of {', '.join(FORMS)}")
    torch.set_num_threads(len(usable_cores()))
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    torch.backends.cudnn.benchmark = True
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    begin = time.perf_counter()
    network: Any = build().to(device)
    facts = {"init": time.perf_counter() - begin, "parameters": float(count_parameters(network))}
    image, keypoints, label = _batch(case, device)
    if form != "eager":
        network = network.to(memory_format=torch.channels_last)
        image = image.contiguous(memory_format=torch.channels_last)
    run: Callable[..., Any] = torch.compile(network) if form == "compiled" else network
    optimizer = torch.optim.Adam(network.parameters(), lr=5e-5, weight_decay=1e-5)
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=case.dtype == "bfloat16")

    def step() -> float:
        network.train()
        optimizer.zero_grad(set_to_none=True)
        with autocast:
            loss = nn.functional.cross_entropy(run(image, keypoints).float(), label)
        loss.backward()
        optimizer.step()
        return loss.item()  # waits for the device

    @torch.inference_mode()
    def forward() -> None:
        network.eval()
        with autocast:
            run(image, keypoints)
        if device.type == "cuda":
            torch.cuda.synchronize()

    begin = time.perf_counter()
    step()  # compiles, where there is something to compile, and fills caches
    facts["first_step"] = time.perf_counter() - begin
    return Side({"step": step, "forward": forward, "device_peak": device_peak}, facts)


def device_peak() -> float:
    """Most bytes of device memory ever in use, or NaN without a GPU."""
    return float(torch.cuda.max_memory_allocated()) if torch.cuda.is_available() else np.nan


def _batch(case: Case, device: torch.device) -> tuple[torch.Tensor, ...]:
    batch = inputs(case)
    image = torch.tensor(batch["image"], device=device).permute(0, 3, 1, 2).contiguous()
    integers = (torch.tensor(batch[n], device=device).long() for n in ("keypoints", "label"))
    return image, *integers
