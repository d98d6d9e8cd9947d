"""The README's example runs as it is printed, where the README says so."""

import re
from pathlib import Path

import torch
from compare import DEVICE
from torch import nn

README = (Path(__file__).parent.parent / "README.md").read_text()


def test_the_example_in_your_own_code(capsys):
    example, after = re.search(r"```python\n(.*?)```\n\n(.*?)\n\n", README, re.DOTALL).groups()
    assert "set `TRITON_INTERPRET=1`" in after
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()).to(DEVICE)
    names = {"model": model, "images": torch.randn(2, 3, 8, 8, device=DEVICE)}
    exec(example, names)
    assert "swapped to Triton: 1 conv2d, 1 relu" in capsys.readouterr().out
    torch.testing.assert_close(names["logits"], model(names["images"]))
