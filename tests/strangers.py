"""Models that are written at their test, and one with every kind of parameter."""

import torch
from torch import nn


class Forward(nn.Module):
    """Modules and parameters by name, and what is done with them."""

    def __init__(self, forward, **parts):
        super().__init__()
        for name, part in parts.items():
            setattr(self, name, part)
        self.does = forward

    def forward(self, x):
        return self.does(self, x)


class Odd(nn.Module):
    """Every kind of parameter: hooked, broadcast, tied, called twice, and used without a module."""

    def __init__(self):
        super().__init__()
        self.patch = nn.Conv2d(2, 6, (2, 3), (2, 3))
        self.token = nn.Parameter(torch.randn(1, 1, 6))
        self.grid = nn.Parameter(torch.randn(1, 5, 6))
        self.norm = nn.LayerNorm(6)
        self.mix = nn.Linear(6, 6, bias=False)
        self.twice = nn.Linear(6, 6)
        self.scale = nn.Parameter(torch.randn(6))
        self.head = nn.Linear(6, 4)

    def forward(self, images):
        x = self.patch(images).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(len(x), -1, -1), x], dim=1) + self.grid
        x = self.twice(self.twice(torch.tanh(self.mix(self.norm(x))))) * self.scale
        return self.head(x.mean(dim=1))
