"""Judges: what names what was drawn, with its own error on real images.

A judge is a sealed folder: ``judge.safetensors`` (weights) or ``model/`` (somebody else's, ``measure/foreign``),
``held_out.safetensors`` (labels and predictions on held-out real images), ``reference.safetensors``
(per-class mean and covariance of its features on those images), and a manifest whose facts are the card.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, Protocol, cast

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from safetensors.torch import load_file
from torch import Tensor, nn

from sfd_deploy.config import StageConfig
from sfd_deploy.errors import LabelError, ModelError
from sfd_deploy.manifest import Sealed, verify
from sfd_deploy.models.folder import MOST_CHANNELS
from sfd_deploy.runtime.seam import Images

WEIGHTS, HELD_OUT, REFERENCE = "judge.safetensors", "held_out.safetensors", "reference.safetensors"


class Sight(Protocol):
    """What a judge looks with: a network trained here, or somebody else's model."""

    def see(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Labels int64 (B,) and features float32 (B, F) of images (B, C, H, W) in [-1, 1]."""
        ...


class ClassifierConfig(StageConfig):
    """Which classifier; two architectures, so that two judges err differently."""

    architecture: Literal["plain", "residual"] = Field(
        description="plain: convolutions, ReLU, max-pooling; residual: strided residual blocks, SiLU"
    )
    channels: int = Field(ge=1, le=MOST_CHANNELS, description="image channels")
    widths: tuple[Annotated[int, Field(ge=1)], ...] = Field(min_length=1, description="channels per resolution level")

    def build(self, num_classes: int) -> Classifier:
        """A randomly initialised classifier."""
        build = {"plain": _plain_body, "residual": _residual_body}[self.architecture]
        return Classifier(build(self.channels, self.widths), self.widths[-1], num_classes)


class Classifier(nn.Module):
    """A convolutional body, global average pooling, one linear layer."""

    def __init__(self, body: nn.Module, width: int, num_classes: int) -> None:
        super().__init__()
        self.body, self.head = body, nn.Linear(width, num_classes)

    def features(self, images: Tensor) -> Tensor:
        """Pooled features (B, F) of images (B, C, H, W) in [-1, 1]."""
        return cast(Tensor, self.body(images)).mean((2, 3))

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, classes)."""
        return cast(Tensor, self.head(self.features(images)))

    def see(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Labels (B,) and pooled features (B, F) of images (B, C, H, W) in [-1, 1]."""
        found = self.features(images)
        return self.head(found).argmax(1), found


def _plain_body(channels: int, widths: tuple[int, ...]) -> nn.Module:
    layers: list[nn.Module] = []
    for level, width in enumerate(widths):
        layers += [nn.MaxPool2d(2)] if level else []
        for source in (channels, width):
            layers += [nn.Conv2d(source, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
        channels = width
    return nn.Sequential(*layers)


class _Residual(nn.Module):
    """x + conv(conv(x)) with a strided 1x1 shortcut (He et al., arXiv 1512.03385), SiLU."""

    def __init__(self, source: int, width: int, stride: int) -> None:
        super().__init__()
        self.main = nn.Sequential(
            nn.Conv2d(source, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width), nn.SiLU(),
            nn.Conv2d(width, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width),
        )  # fmt: skip
        self.shortcut = nn.Sequential(nn.Conv2d(source, width, 1, stride, bias=False), nn.BatchNorm2d(width))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.silu(self.main(x) + self.shortcut(x))


def _residual_body(channels: int, widths: tuple[int, ...]) -> nn.Module:
    stem = [nn.Conv2d(channels, widths[0], 3, padding=1, bias=False), nn.BatchNorm2d(widths[0]), nn.SiLU()]
    sources = (widths[0], *widths[:-1])
    blocks = [_Residual(source, width, 2 if level else 1)
              for level, (source, width) in enumerate(zip(sources, widths, strict=True))]  # fmt: skip
    return nn.Sequential(*stem, *blocks)


@dataclass(frozen=True)
class Judge:
    """A judge opened from a verified folder."""

    name: str
    digest: str
    class_names: tuple[str, ...]
    sight: Sight
    reference: FeatureStatistics
    held_out: NDArray[np.int64]  # (2, N): true labels, predictions
    accuracy: float

    @torch.inference_mode()
    def look(self, images: Images, batch: int = 256) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Predicted labels (N,) and features (N, F) of images (N, C, H, W) in [-1, 1]."""
        seen = [self.sight.see(part) for part in torch.from_numpy(images).clamp(-1, 1).split(batch)]
        labels, features = zip(*seen, strict=True)
        return torch.cat(labels).numpy(), torch.cat(features).numpy()

    @property
    def classifier(self) -> Classifier:
        """The network of a judge that was trained here, for what asks it more than its opinion.

        Raises:
            ModelError: the judge was adopted.
        """
        if not isinstance(self.sight, Classifier):
            raise ModelError(
                f"judge {self.name} was adopted: it names images, and has no network to be asked on a device",
                "name a judge trained with `sfd-deploy judge --config` here",
            )
        return self.sight


@dataclass(frozen=True)
class FeatureStatistics:
    """Per-class mean (K, F) and covariance (K, F, F) of a judge's features on real images."""

    mean: NDArray[np.float64]
    covariance: NDArray[np.float64]

    def pooled(self, labels: Sequence[int]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Mean (F,) and covariance (F, F) of the equal mixture of ``labels``."""
        rows = list(labels)
        mean = self.mean[rows].mean(0)
        centred = self.mean[rows] - mean
        between = np.einsum("ki,kj->ij", centred, centred) / len(rows)
        return mean, self.covariance[rows].mean(0) + between


def open_judge(folder: Path) -> Judge:
    """Open a judge folder after verifying its digests.

    Raises:
        ManifestError, DigestError: the folder is incomplete or was changed.
    """
    return load_judge(verify(folder, "judge"))


def load_judge(sealed: Sealed) -> Judge:
    """Open the network or adopted model of a verified judge folder.

    Raises:
        ModelError: what it saw in real images is not finite.
        ModelError, BackendError: an adopted model that does not run here.
    """
    held_out = load_file(sealed.folder / HELD_OUT)
    statistics = load_file(sealed.folder / REFERENCE)
    if not all(values.isfinite().all() for values in statistics.values()):
        raise ModelError(f"judge {sealed.folder}: its features are not finite", "train or adopt it again")
    pair = np.stack([held_out["labels"].numpy(), held_out["predictions"].numpy()]).astype(np.int64)
    return Judge(
        name=sealed.name,
        digest=sealed.digest,
        class_names=tuple(sealed.facts["class_names"]),
        sight=_sight(sealed),
        reference=FeatureStatistics(statistics["mean"].double().numpy(), statistics["covariance"].double().numpy()),
        held_out=pair,
        accuracy=float((pair[0] == pair[1]).mean()),
    )


def _sight(sealed: Sealed) -> Sight:
    if "adopted" in sealed.facts:
        from sfd_deploy.measure.foreign.adopt import open_adopted  # late: most judges need none of it

        return open_adopted(sealed)
    config = ClassifierConfig.from_mapping(sealed.facts["classifier"], str(sealed.folder))
    classifier = config.build(len(sealed.facts["class_names"]))
    classifier.load_state_dict(load_file(sealed.folder / WEIGHTS))
    # Channels last is a third faster on a CPU. Torch's stub does not know the argument.
    return classifier.eval().requires_grad_(False).to(memory_format=torch.channels_last)  # type: ignore[no-any-return, call-overload]


def require_same_classes(judges: Sequence[Judge], class_names: Sequence[str], owner: str) -> None:
    """Refuse judges that name other classes than the model they judge.

    Raises:
        LabelError: naming the judge.
    """
    for judge in judges:
        if tuple(judge.class_names) != tuple(class_names):
            raise LabelError(
                f"judge {judge.name} knows other classes than {owner}", "give judges trained on its classes"
            )


def require_sight(judges: Sequence[Judge], shape: Sequence[int]) -> None:
    """Refuse judges that cannot look at images of ``shape`` (C, H, W), before any is drawn.

    Raises:
        LabelError: naming the judge.
    """
    for judge in judges:
        try:
            judge.look(np.zeros((1, *shape), np.float32))
        except (RuntimeError, ValueError):
            size = " x ".join(map(str, shape))
            raise LabelError(
                f"judge {judge.name} cannot look at images of {size}", "give judges of images like the model's"
            ) from None


def require_distinct_names(judges: Sequence[Judge]) -> None:
    """Refuse judges that share a name, which is what their figures go by.

    Raises:
        LabelError: naming it.
    """
    names = [judge.name for judge in judges]
    if repeated := next((name for name in names if names.count(name) > 1), None):
        raise LabelError(f"two judges are named {repeated}", "rename one's folder, or give it once")


def either_matrix(judges: Sequence[Judge]) -> NDArray[np.float64]:
    """Share (K, K) of real held-out images of class i that at least one judge calls class j."""
    truth = judges[0].held_out[0]
    classes = len(judges[0].class_names)
    called = np.zeros((len(truth), classes), bool)
    for judge in judges:
        called[np.arange(len(truth)), judge.held_out[1]] = True
    return np.stack([called[truth == label].mean(0) for label in range(classes)])
