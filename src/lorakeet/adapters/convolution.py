"""LoRA beside nn.Conv2d: a convolution to r channels, then a 1 x 1 convolution.

    y = conv(x, W0) + (alpha / r) conv_1x1(conv(x, A), B)

With the kernel unfolded into columns, W0 [out, in h w], A [r, in h w] and B [out, r], this
is the linear case.  PEFT 0.21 leaves out the base's dilation and padding mode in A's
convolution, so it fails on such layers; here A reads the same pixels as W0.

Source: arXiv:2106.09685, section 4.1, as PEFT extends it.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from lorakeet.adapters.bias import call_base
from lorakeet.adapters.layer import LoraLayer
from lorakeet.base.errors import RequestError


class LoraConv2d(LoraLayer):
    """LoRA beside nn.Conv2d.

    Raises:
        RequestError: the convolution has groups, whose change is no product B A.
    """

    def __init__(self, base_layer: nn.Conv2d) -> None:
        if base_layer.groups != 1:
            raise RequestError(
                f"a convolution with {base_layer.groups} groups cannot be adapted, as its change "
                "would be no product B A. Leave it out of targets, or name it in modules_to_save."
            )
        super().__init__(base_layer)
        self.lora_A = nn.ModuleDict()
        self.lora_B = nn.ModuleDict()

    def create(self, name: str, sizes: tuple[int, int, int], seed: int) -> None:
        """A uniform with bound 1 / sqrt(in h w) (Kaiming with a = sqrt(5)), B zero."""
        r, num_in, num_out = sizes
        base, place = self.base_layer, {"device": self.weight.device, "dtype": torch.float32}
        A = nn.utils.skip_init(
            nn.Conv2d, base.in_channels, r, base.kernel_size, base.stride, base.padding,
            base.dilation, bias=False, padding_mode=base.padding_mode, **place,
        )  # fmt: skip
        B = nn.utils.skip_init(nn.Conv2d, r, num_out, 1, bias=False, **place)
        generator = torch.Generator().manual_seed(seed)
        drawn = torch.rand(A.weight.shape, generator=generator)
        with torch.no_grad():
            A.weight.copy_((drawn * 2 - 1) / math.sqrt(num_in))
            B.weight.zero_()
        self.lora_A[name], self.lora_B[name] = A, B

    def factors(self, name: str) -> tuple[Tensor, Tensor]:
        """(A [r, in h w], B [out, r]), views of the kernels."""
        return self.lora_A[name].weight.flatten(1), self.lora_B[name].weight.flatten(1)

    def to_magnitude(self, norm: Tensor) -> Tensor:
        """DoRA's m as [1, out, 1, 1], PEFT's shape."""
        return norm.view(1, -1, 1, 1)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """W0 * x + scale B * A * dropout(x), in the dtype of the base's answer."""
        h = call_base(self, (x, *args), kwargs)
        if self.active not in self.ranks or self.merged is not None:
            return h
        name = self.active
        conv_A, conv_B = self.lora_A[name], self.lora_B[name]
        x = x.to(conv_A.weight.dtype)
        dropped = self.dropouts[name](x)
        change = conv_B(conv_A(dropped))
        if name in self.start_A:
            A0, B0 = self.start_A[name], self.start_B[name]
            low = conv_A._conv_forward(x, A0.view_as(conv_A.weight), None)
            change = change - nn.functional.conv2d(low, B0.view_as(conv_B.weight))
        change = change * self.scales[name]
        if name not in self.lora_magnitude_vector:
            return h + change.to(h.dtype)
        gain = self.lora_magnitude_vector[name] / self.to_magnitude(self.norm(name))
        if dropped is x:
            direct = h if self.bias is None else h - self.bias.view(-1, 1, 1)
        else:
            W0 = self.base_layer.weight.detach().float()
            direct = self.base_layer._conv_forward(dropped, W0, None)
        return h + ((gain - 1) * direct + gain * change).to(h.dtype)
