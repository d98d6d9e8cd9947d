"""Networks in eval mode whose batch norms change something, and one that torch.fx cannot trace."""

import torch
from torch import Tensor, nn

from helpers.compare import DEVICE


def trained(model: nn.Module, dtype: torch.dtype = torch.float64) -> nn.Module:
    """The model in eval mode, with batch norms that change something."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            if module.running_var is not None:
                module.running_mean.normal_(0, 0.2)
                module.running_var.uniform_(0.5, 2)
            if module.weight is not None:
                module.weight.data.uniform_(0.5, 1.5)
                module.bias.data.normal_()
    return model.eval().to(DEVICE, dtype)


def small(width: int = 8) -> nn.Module:
    torch.manual_seed(0)
    return trained(nn.Sequential(nn.Conv2d(4, width, 3), nn.BatchNorm2d(width), nn.ReLU(), nn.Conv2d(width, 4, 1)))


class Untraceable(nn.Module):
    """Control flow on values, and code that reaches into its parts."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6), nn.ReLU(inplace=True), nn.MaxPool2d(2))
        self.steps = nn.ModuleList([nn.Sequential(nn.Conv2d(6, 6, 1), nn.ReLU()) for _ in range(2)])
        self.looped = nn.Sequential(nn.Conv2d(6, 6, 1), nn.ReLU())
        self.head = nn.Linear(6 * 2 * 2, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.features(x)
        for step in self.steps:
            y = step(y)
        for layer in self.looped:
            y = layer(y) + self.looped[0].weight.mean()
        if y.sum() > 0:
            y = -y
        return self.head(y.view(len(y), -1))
