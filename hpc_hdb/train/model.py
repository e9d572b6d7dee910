"""Models by name: torchvision's, two small ResNets, or the user's own function."""

from __future__ import annotations

import difflib
import importlib
import inspect
import sys
from pathlib import Path

import torch
from torch import Tensor, nn

from hpc_hdb.config import Model
from hpc_hdb.errors import UserError


def build_model(settings: Model, classes: int) -> nn.Module:
    """Build the model, with dropout before its classifier (probability 0 to begin with).

    Parameters
    ----------
    settings : Model
        Name and stem.
    classes : int
        Number of outputs.

    Raises
    ------
    UserError
        If there is no such model, or it has no classifier to put dropout before.
    """
    if ":" in settings.name:
        model = _users_model(settings.name, classes)
    elif settings.name in _SMALL_RESNETS:
        model = SmallResNet(_SMALL_RESNETS[settings.name], classes)
    else:
        import torchvision  # two seconds of a core, which the small ResNets spare

        known = torchvision.models.list_models(module=torchvision.models)
        if settings.name not in known:
            near = difflib.get_close_matches(settings.name, [*_SMALL_RESNETS, *known], n=1)
            choice = (
                f"{', '.join(_SMALL_RESNETS)}, a torchvision classifier, or package.module:function"
            )
            hint = f"did you mean '{near[0]}'?" if near else f"choose {choice}"
            raise UserError(f"model.name: there is no '{settings.name}'; {hint}")
        # The auxiliary classifiers would be sent with every commit, and no loss trains them.
        more = {"aux_logits": False} if settings.name in ("googlenet", "inception_v3") else {}
        model = torchvision.models.get_model(
            settings.name, weights=None, num_classes=classes, **more
        )
        if settings.stem == "small" and isinstance(model, torchvision.models.ResNet):
            model.conv1 = nn.Conv2d(3, model.conv1.out_channels, 3, padding=1, bias=False)
            model.maxpool = nn.Identity()
    _insert_dropout(model, settings.name)
    return model


@torch.no_grad()
def check_resolution(model: nn.Module, name: str, resolution: int, classes: int) -> None:
    """Raise UserError where `model` does not turn such images into one score for each class.

    What it raises itself comes through. Only what evaluation does too is done with it: neither
    its statistics nor the random numbers of its dropout move on.
    """
    model.eval()
    device = next(model.parameters()).device
    scores = model(torch.zeros(2, 3, resolution, resolution, device=device))
    model.train()
    shape = getattr(scores, "shape", None)
    if shape != (2, classes):
        got = type(scores).__name__ if shape is None else f"a tensor of shape {tuple(shape)}"
        raise UserError(
            f"model '{name}' gives {got} for 2 images, not a tensor of shape (2, {classes}): "
            "its last layer needs one output for each class (num_classes)"
        )


def set_dropout(model: nn.Module, probability: float) -> None:
    """Set the dropout before the classifier of a model from `build_model`."""
    for module in model.modules():
        if isinstance(module, ClassifierDropout):
            module.p = probability


def set_rows(model: nn.Module, batch: int, begin: int) -> None:
    """Say which rows of a batch a model from `build_model` is given next: those from `begin` on.

    Its dropout then draws for the whole batch, whichever of its rows come.
    """
    for module in model.modules():
        if isinstance(module, ClassifierDropout):
            module.batch, module.begin = batch, begin


class ClassifierDropout(nn.Dropout):
    """The dropout whose probability follows the stage."""

    batch = begin = 0

    def forward(self, features: Tensor) -> Tensor:
        if not (self.training and self.batch):
            return super().forward(features)
        ones = torch.ones((), dtype=features.dtype, device=features.device)
        mask = super().forward(ones.expand(self.batch, *features.shape[1:]).contiguous())
        return features * mask[self.begin : self.begin + len(features)]


def _insert_dropout(model: nn.Module, name: str) -> None:
    """Put a `ClassifierDropout` before the last linear layer, in place of a dropout there.

    Where none is linear, as in SqueezeNet: in place of a dropout before the last convolution.
    """
    for kind in (nn.Linear, nn.Conv2d):
        layers = [path for path, module in model.named_modules() if isinstance(module, kind)]
        if not layers:
            continue
        parent_path, _, child = layers[-1].rpartition(".")
        parent = model.get_submodule(parent_path)
        in_order = isinstance(parent, nn.Sequential) and child.isdigit()
        before = str(int(child) - 1) if in_order else ""
        if in_order and isinstance(getattr(parent, before, None), nn.Dropout):
            setattr(parent, before, ClassifierDropout(0.0))
            return
        if kind is nn.Linear:
            setattr(parent, child, nn.Sequential(ClassifierDropout(0.0), getattr(parent, child)))
            return
    raise UserError(f"model '{name}' has no linear classifier to put dropout before")


def _users_model(name: str, classes: int) -> nn.Module:
    module_name, _, function_name = name.partition(":")
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        function = getattr(importlib.import_module(module_name), function_name)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(f"model.name = '{name}': {error}; it is looked for from {here}") from None
    try:
        inspect.signature(function).bind(num_classes=classes)
    except (TypeError, ValueError):
        raise UserError(
            f"model.name = '{name}' must be a function that takes num_classes={classes}"
        ) from None
    model = function(num_classes=classes)
    if not isinstance(model, nn.Module):
        raise UserError(
            f"model.name = '{name}' returned {type(model).__name__}, not a torch module"
        )
    return model


_SMALL_RESNETS = {"resnet8": 1, "resnet20": 3}


class SmallResNet(nn.Module):
    """The ResNets for 32x32 images of He et al. (arXiv 1512.03385, section 4.2), ``6n+2`` layers.

    Parameters
    ----------
    blocks : int
        ``n``, blocks of each of the three widths 16, 32 and 64.
    classes : int
        Number of outputs.
    """

    def __init__(self, blocks: int, classes: int) -> None:
        super().__init__()
        layers: list[nn.Module] = [
            nn.Conv2d(3, 16, 3, padding=1, bias=False),
            nn.BatchNorm2d(16),
            nn.ReLU(inplace=True),
        ]
        channels = 16
        for width in (16, 32, 64):
            for number in range(blocks):
                stride = 2 if width > 16 and number == 0 else 1
                layers.append(_Block(channels, width, stride))
                channels = width
        self.features = nn.Sequential(*layers)
        self.fc = nn.Linear(channels, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images: Tensor) -> Tensor:
        return self.fc(self.features(images).mean((2, 3)))


class _Block(nn.Module):
    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.shortcut = nn.Sequential()
        if stride != 1 or channels != width:
            self.shortcut = nn.Sequential(
                nn.Conv2d(channels, width, 1, stride, bias=False), nn.BatchNorm2d(width)
            )

    def forward(self, images: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(images)))
        return self.relu(self.bn2(self.conv2(out)) + self.shortcut(images))
