"""Reading a zoo's torch module into parameters, each exactly once.

The bookkeeping that makes a translation trustworthy: only classes that vitfold knows, every parameter used once,
one LayerNorm epsilon, and shared memory where possible.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from torch import Tensor, nn

from vitfold.errors import SourceError, UnsupportedError
from vitfold.model import Array, ViTSpec
from vitfold.model.spec import Activation

Value = TypeVar("Value")
_BODY = re.compile(r"(For[A-Z]\w*|Model|ModelWithProjection|Backbone|PreTrainedModel)$")
Facts = dict[str, Any]  # what a zoo said about a model beside its module: processor files, weight enums
Built = tuple[nn.Module, Facts]

ACTIVATIONS: dict[str, Activation] = {
    "timm.GELU": "gelu_erf",
    "timm.GELUTanh": "gelu_tanh",
    "timm.QuickGELU": "quick_gelu",
    "timm.Swish": "silu",
    "open_clip.QuickGELU": "quick_gelu",
    "transformers.GELUActivation": "gelu_erf",
    "transformers.GELUTanh": "gelu_tanh",
    "transformers.PytorchGELUTanh": "gelu_tanh",
    "transformers.NewGELUActivation": "gelu_tanh",
    "transformers.QuickGELUActivation": "quick_gelu",
    "transformers.SiLUActivation": "silu",
    "torch.SiLU": "silu",
    "torch.ReLU": "relu",
}
LAYER_NORMS = frozenset(
    {"torch.LayerNorm", "timm.LayerNorm", "timm.LayerNormFp32", "open_clip.LayerNorm", "open_clip.LayerNormFp32"}
)
LINEARS = frozenset({"torch.Linear", "torch.NonDynamicallyQuantizableLinear"})
INERT = frozenset(
    {
        "torch.Identity",
        "torch.Dropout",
        "timm.DropPath",
        "timm.PatchDropout",
        "open_clip.PatchDropout",
        "transformers.Dinov2DropPath",
        "transformers.Dinov2WithRegistersDropPath",
    }
)
CONTAINERS = frozenset({"torch.Sequential", "torch.ModuleList", "torch.Conv2d", "torch.Embedding", "torch.GELU"})
LEAVES = (
    frozenset(ACTIVATIONS) | LAYER_NORMS | LINEARS | INERT | CONTAINERS | {"torch.MultiheadAttention", "torch.Tanh"}
)

# What is known not to fit, by class: the reason in a user's words.
REFUSED = {
    "timm.Eva": "rotary position embeddings (RoPE)",
    "timm.AttentionRope": "rotary position embeddings (RoPE)",
    "timm.NaFlexVit": "variable-resolution input (NaFlex)",
    "timm.SwinTransformer": "windowed attention",
    "timm.SwinTransformerV2": "windowed attention",
    "timm.Beit": "relative position bias",
    "timm.VisionTransformerRelPos": "relative position bias",
    "timm.VisionTransformerSAM": "windowed attention with relative position bias",
    "timm.Cait": "talking-heads attention",
    "timm.ResPostBlock": "norms behind the residual branches (ResPostBlock)",
    "timm.ParallelScalingBlock": "attention and MLP in parallel (ParallelScalingBlock)",
    "timm.DiffParallelScalingBlock": "differential attention in parallel with the MLP",
    "timm.ParallelThingsBlock": "several attentions in parallel (ParallelThingsBlock)",
    "timm.DiffAttention": "differential attention",
    "timm.RmsNorm": "RMSNorm",
    "timm.RmsNormFp32": "RMSNorm",
    "timm.SimpleNorm": "a norm without centering (SimpleNorm)",
    "timm.AttentionPoolPrr": "the pooling 'prr'",
    "timm.HybridEmbed": "a convolutional network as patch embedding (hybrid ViT)",
    "torch.Sigmoid": "a sigmoid gate",
    "torchvision.SwinTransformer": "windowed attention",
    "torchvision.Conv2dNormActivation": "a convolutional stem",
    "open_clip.CustomResidualAttentionBlock": "cosine attention, scaled heads or extra norms (block type 'custom')",
    "open_clip.AttentionalPooler": "an attentional pooler (CoCa)",
    "open_clip.ModifiedResNet": "a ResNet image tower",
    "open_clip.AbsAttentionPool2d": "attention pooling over a feature map",
    "open_clip.RotAttentionPool2d": "attention pooling over a feature map",
    "transformers.BeitModel": "relative position bias",
    "transformers.BeitForImageClassification": "relative position bias",
    "transformers.SwinModel": "windowed attention",
    "transformers.SwinForImageClassification": "windowed attention",
    "transformers.DINOv3ViTModel": "rotary position embeddings (RoPE)",
    "transformers.DINOv3ViTForImageClassification": "rotary position embeddings (RoPE)",
    "transformers.Siglip2VisionModel": "variable-resolution input (NaFlex)",
    "transformers.CLIPModel": "a text tower beside the image tower; load its CLIPVisionModelWithProjection",
    "transformers.SiglipModel": "a text tower beside the image tower; load its SiglipVisionModel",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Translation:
    """A zoo's module as spec and parameters, with what the parity check needs of the original."""

    spec: ViTSpec
    params: dict[str, Array]
    forward: Callable[[Tensor], Tensor]
    blocks: tuple[nn.Module, ...]


def class_name(module: nn.Module) -> str:
    """Return "package.Class", the name by which classes are checked."""
    kind = type(module)
    return f"{kind.__module__.partition('.')[0]}.{kind.__qualname__}"


def refuse(found: str, instead: str) -> UnsupportedError:
    """Return the error for a feature that the program does not run."""
    return UnsupportedError(f"this model has {found}, which vitfold does not run; {instead}")


PLAIN = "use a plain ViT such as timm:vit_base_patch16_224 or timm:vit_small_patch14_dinov2"


def why_not(part: nn.Module) -> str:
    """Return why a part is not run, in a user's words."""
    name = class_name(part)
    if name == "timm.Eva" and getattr(part, "rope", None) is None:
        return "EVA's own blocks, whose queries and values alone have a bias"
    return REFUSED.get(name, "an unknown part")


def same_body(name: str, known: Iterable[str]) -> str:
    """Return a hint at classes of the same body with another head, such as ViTModel for ViTForMaskedImageModeling."""
    body = _BODY.sub("", name)
    near = [one for one in known if body and one != name and _BODY.sub("", one) == body]
    return f"its body is read as {' or '.join(near)}; " if near else ""


def single_linear(layer: nn.Module) -> nn.Module:
    """Return the one layer of a Sequential whose others do nothing once trained, such as a dropout before a head."""
    while class_name(layer) == "torch.Sequential":
        parts = [part for part in layer.children() if class_name(part) not in INERT]
        if len(parts) != 1:
            return layer
        layer = parts[0]
    return layer


class Reader:
    """Takes tensors out of a module under vitfold's names and knows which are left."""

    def __init__(self, module: nn.Module, *, classes: Iterable[str]) -> None:
        """Check that every submodule is one of `classes` or a known leaf.

        Raises:
            SourceError: naming the first submodule of another class, and why it is not run if that is known.
        """
        allowed = LEAVES | set(classes)
        for path, part in module.named_modules():
            name = class_name(part)
            if name not in allowed:
                where = f" at {path}" if path else ""
                raise refuse(f"{why_not(part)} ({name}{where})", PLAIN)
        tensors = [*module.named_parameters(), *module.named_buffers()]
        self._names = {id(tensor): name for name, tensor in tensors}
        self._left = dict(self._names)
        self._eps: dict[str, float] = {}
        self.params: dict[str, Array] = {}

    def take(self, tensor: Tensor) -> Array:
        """Return a tensor as float32, C-contiguous, sharing its memory where it already is that.

        Raises:
            SourceError: if it was taken before (tied weights) or holds no data (meta device).
        """
        name = self._names[id(tensor)]
        if self._left.pop(id(tensor), None) is None:
            raise refuse(f"weights that two layers share ({name})", "use a model without tied weights")
        if tensor.is_meta:
            raise SourceError(f"weight {name} holds no data (device 'meta'); load the weights first")
        array: Array = np.ascontiguousarray(tensor.detach().cpu().float().numpy())
        return array

    def ignore(self, *parts: nn.Module | Tensor | None) -> None:
        """Mark what the forward pass of the original does not use either, such as a mask token."""
        for part in parts:
            if isinstance(part, nn.Module):
                self.ignore(*part.parameters(), *part.buffers())
            elif part is not None:
                self._left.pop(id(part), None)

    def put(self, name: str, *tensors: Tensor | None) -> None:
        """Store tensors, stacked along the first axis, under one name; absent ones are rows of zeros."""
        arrays = [self.take(t) for t in tensors if t is not None]
        self.params[name] = arrays[0] if len(arrays) == 1 else np.ascontiguousarray(np.concatenate(arrays))

    def linear(self, name: str, *layers: nn.Module) -> None:
        """Store one linear layer, or several that read the same input as one with stacked outputs."""
        layers = tuple(single_linear(layer) for layer in layers)
        for layer in layers:
            if class_name(layer) == "torch.Sequential":
                shown = ", ".join(class_name(part) for part in layer.children())
                raise refuse(f"several layers ({shown}) where one linear layer belongs ({name})", PLAIN)
            if class_name(layer) not in LINEARS:
                raise refuse(f"{class_name(layer)} where a linear layer belongs ({name})", PLAIN)
        self.put(f"{name}.weight", *(self._weight(layer) for layer in layers))
        biases = [layer.bias for layer in layers]
        if any(bias is not None for bias in biases):
            parts = [
                np.zeros(int(layer.out_features), np.float32) if bias is None else self.take(bias)  # type: ignore[arg-type]
                for layer, bias in zip(layers, biases, strict=True)
            ]
            self.params[f"{name}.bias"] = parts[0] if len(parts) == 1 else np.concatenate(parts)

    @staticmethod
    def _weight(layer: nn.Module) -> Tensor:
        weight = layer.weight
        assert isinstance(weight, Tensor)
        return weight

    def norm(self, name: str, layer: nn.Module) -> None:
        """Store a LayerNorm; a missing scale or shift becomes ones or zeros."""
        if class_name(layer) not in LAYER_NORMS:
            found = REFUSED.get(class_name(layer), class_name(layer))
            raise refuse(f"{found} where a LayerNorm belongs ({name})", "use a model with LayerNorm")
        assert isinstance(layer, nn.LayerNorm)
        width = layer.normalized_shape[-1]
        scale, shift = layer.weight, layer.bias
        self.params[f"{name}.weight"] = np.ones(width, np.float32) if scale is None else self.take(scale)
        self.params[f"{name}.bias"] = np.zeros(width, np.float32) if shift is None else self.take(shift)
        self._eps[name] = layer.eps

    def patch_embed(self, layer: nn.Module) -> None:
        """Store the convolution that cuts patches; it must read RGB without overlap or padding."""
        if class_name(layer) != "torch.Conv2d" or not isinstance(layer, nn.Conv2d):
            raise refuse(f"{class_name(layer)} as patch embedding", PLAIN)
        if layer.stride != layer.kernel_size or layer.groups != 1 or layer.dilation != (1, 1):
            raise refuse(f"overlapping patches (stride {layer.stride}, kernel {layer.kernel_size})", PLAIN)
        if layer.padding not in ("valid", 0, (0, 0)):
            raise refuse(f"a padded patch embedding (padding {layer.padding})", PLAIN)
        if layer.in_channels != 3:
            raise refuse(f"{layer.in_channels} input channels", "use a model for RGB images")
        self.put("patch_embed.weight", layer.weight)
        if layer.bias is not None:
            self.put("patch_embed.bias", layer.bias)

    def attention(self, layer: nn.Module, *, qkv: tuple[str, ...], proj: str) -> None:
        """Store a torch.nn.MultiheadAttention; its packed rows are cut in equal parts for the names in `qkv`.

        The cut is in thirds: one name takes q, k and v, two names take q and (k, v).
        """
        if class_name(layer) != "torch.MultiheadAttention" or not isinstance(layer, nn.MultiheadAttention):
            raise refuse(f"{class_name(layer)} where torch.nn.MultiheadAttention belongs", PLAIN)
        if layer.in_proj_weight is None or layer.bias_k is not None or layer.add_zero_attn:
            raise refuse("an attention with added keys or with its own widths for keys and values", PLAIN)
        width = layer.embed_dim
        cuts = [(0, 3 * width)] if len(qkv) == 1 else [(0, width), (width, 3 * width)]
        weight = self.take(layer.in_proj_weight)
        bias = None if layer.in_proj_bias is None else self.take(layer.in_proj_bias)
        for name, (start, stop) in zip(qkv, cuts, strict=True):
            self.params[f"{name}.weight"] = weight[start:stop]
            if bias is not None:
                self.params[f"{name}.bias"] = bias[start:stop]
        self.linear(proj, layer.out_proj)

    def layer_scale(self, name: str, layer: nn.Module, attribute: str, width: int) -> None:
        """Store a LayerScale; a block that has none while others do gets ones."""
        gamma = getattr(layer, attribute, None)
        self.params[name] = np.ones(width, np.float32) if gamma is None else self.take(gamma).reshape(-1)

    def eps(self) -> float:
        """Return the epsilon that all LayerNorms share.

        Raises:
            SourceError: if they differ, naming two that do.
        """
        values = {eps: name for name, eps in reversed(self._eps.items())}
        if len(values) > 1:
            shown = ", ".join(f"{name} has {eps:g}" for eps, name in sorted(values.items())[:3])
            raise refuse(f"LayerNorms with different eps ({shown})", "use a model with one eps")
        return next(iter(values))

    def finish(self) -> None:
        """Check that nothing is left over.

        Raises:
            SourceError: naming parameters and buffers that the translation did not use.
        """
        if self._left:
            names = sorted(self._left.values())
            more = f" and {len(names) - 4} more" if len(names) > 4 else ""
            raise refuse(f"parameters without a place in the program: {', '.join(names[:4])}{more}", PLAIN)


def activation_name(layer: Any) -> Activation:
    """Return vitfold's name of an activation module.

    Raises:
        SourceError: if the program has no such function.
    """
    name = class_name(layer)
    if name == "torch.GELU":
        return "gelu_tanh" if layer.approximate == "tanh" else "gelu_erf"
    if name not in ACTIVATIONS:
        known = sorted(set(ACTIVATIONS.values()))
        raise refuse(f"the activation {name}", f"activations that it runs: {', '.join(known)}")
    return ACTIVATIONS[name]


def require(layer: nn.Module | None, found: str, *, at: str) -> None:
    """Check that an optional part of a zoo's module is absent.

    Raises:
        SourceError: saying what was found.
    """
    if layer is not None and class_name(layer) not in INERT:
        raise refuse(f"{found} ({class_name(layer)} at {at})", PLAIN)


def same(values: Iterable[Value], what: str) -> Value:
    """Return the value that all blocks share.

    Raises:
        SourceError: if blocks differ.
    """
    listed = list(values)
    if not listed:
        raise refuse("no transformer blocks", PLAIN)
    for block, value in enumerate(listed):
        if value != listed[0]:
            raise refuse(f"blocks that differ in {what} (block 0: {listed[0]}, block {block}: {value})", PLAIN)
    return listed[0]


def with_register_rows(positions: Array, *, after: int, registers: int) -> Array:
    """Return positions (1, N, D) with rows of zeros for register tokens that have none, behind row `after`."""
    zeros = np.zeros((1, registers, positions.shape[2]), positions.dtype)
    return np.concatenate((positions[:, :after], zeros, positions[:, after:]), axis=1)
