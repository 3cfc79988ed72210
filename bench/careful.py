"""A careful plain PyTorch loop for bench_peers.py: what FedAvg costs who knows PyTorch well.

A ViT of plain modules under autocast, images resized on the device, one local model, fused SGD, an
average by `_foreach`. Nothing of this project's model, optimiser or loop takes part; who takes part
and which images make a batch are given. Float32 weights, as autocast wants them; GradScaler for
fp16.
"""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Layer(nn.Module):
    """A pre-norm transformer layer."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = (nn.LayerNorm(width, eps=1e-6) for _ in range(2))
        self.attn = nn.ModuleDict(
            {"qkv": nn.Linear(width, 3 * width), "proj": nn.Linear(width, width)}
        )
        self.mlp = nn.ModuleDict(
            {"fc1": nn.Linear(width, 4 * width), "fc2": nn.Linear(4 * width, width)}
        )

    def forward(self, x: Tensor) -> Tensor:
        n, t, d = x.shape
        qkv = self.attn["qkv"](self.norm1(x)).view(n, t, 3, self.heads, -1)
        attended = F.scaled_dot_product_attention(*qkv.permute(2, 0, 3, 1, 4))
        x = x + self.attn["proj"](attended.transpose(1, 2).reshape(n, t, d))
        return x + self.mlp["fc2"](F.gelu(self.mlp["fc1"](self.norm2(x))))


class PlainViT(nn.Module):
    """A ViT of these sizes, with DINO's names."""

    def __init__(self, width: int, depth: int, heads: int, patch: int, grid: int, classes: int):
        super().__init__()
        self.grid = grid
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + grid**2, width))
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, width, patch, patch)})
        self.blocks = nn.Sequential(*(Layer(width, heads) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width, eps=1e-6), nn.Linear(width, classes)

    def positions(self, side: int) -> Tensor:
        """Return the positions of side x side patches, interpolated as DINO does."""
        if side == self.grid:
            return self.pos_embed
        token, grid = self.pos_embed[:, :1], self.pos_embed[:, 1:].transpose(1, 2)
        grid = grid.unflatten(2, (self.grid, self.grid))
        factor = (side + 0.1) / self.grid
        grid = F.interpolate(grid, scale_factor=(factor, factor), mode="bicubic")
        return torch.cat([token, grid.flatten(2).transpose(1, 2)], dim=1)

    def forward(self, images: Tensor) -> Tensor:
        patches = self.patch_embed["proj"](images)
        side = patches.shape[-1]
        tokens = [self.cls_token.expand(len(images), -1, -1), patches.flatten(2).transpose(1, 2)]
        x = self.blocks(torch.cat(tokens, dim=1) + self.positions(side))
        return self.head(self.norm(x[:, 0]))


def plain_model(work) -> PlainViT:
    """Return the plain model with the weights that all methods begin with, on the device."""
    start = work.workspace.build_model()
    s, classes = start.shape, len(start.head.bias)
    model = PlainViT(s.width, s.depth, s.heads, s.patch, s.grid, classes)
    model.load_state_dict(start.state_dict())
    return model.to(work.workspace.device)


def pixels_of(work, images: Tensor) -> Tensor:
    """Return uint8 images (B, 3, H, W) resized on their device and normalised."""
    from training.workspace import NORMALISATIONS

    size = (work.options.backbone.image_size,) * 2
    mean, std = NORMALISATIONS[work.workspace.normalisation()]
    x = images.float()
    if x.shape[-2:] != size:
        x = F.interpolate(x, size=size, mode="bicubic", antialias=True).clamp(0, 255)
    mean, std = (torch.tensor(v, device=x.device).view(3, 1, 1) for v in (mean, std))
    return (x / 255 - mean) / std


def careful(work) -> dict[str, Tensor]:
    """Run the careful plain loop."""
    torch.use_deterministic_algorithms(False)  # which the project pays for, and this need not
    device, dtype = work.workspace.device, work.workspace.dtype
    model = plain_model(work)
    local = copy.deepcopy(model)
    ours, theirs = list(model.parameters()), list(local.parameters())
    half = dtype != torch.float32
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    work.tick()
    for round in range(1, work.rounds + 1):
        total, clients = [torch.zeros_like(p) for p in ours], work.clients(round)
        for client in clients:
            with torch.no_grad():
                torch._foreach_copy_(theirs, ours)
            optimiser = work.optimiser(theirs)
            for x, y in work.batches(client, round):
                optimiser.zero_grad(set_to_none=True)
                pixels = pixels_of(work, x)
                with torch.autocast(device.type, dtype=dtype if half else None, enabled=half):
                    loss = F.cross_entropy(local(pixels), y)
                scaler.scale(loss).backward()
                scaler.step(optimiser)
                scaler.update()
            with torch.no_grad():
                torch._foreach_add_(total, theirs, alpha=1 / len(clients))
        with torch.no_grad():
            torch._foreach_copy_(ours, total)
        work.tick()
    return model.state_dict()
