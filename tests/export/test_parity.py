"""Comparison with PyTorch: what is measured, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from sfd_deploy.errors import LimitError
from sfd_deploy.export.config import ExportConfig
from sfd_deploy.export.parity import Parity, compare
from sfd_deploy.export.samples import Samples
from sfd_deploy.latents import Latents

SHAPE = (1, 4, 4)
SAMPLES = Samples.of(seed=0, start=0, count=80, classes=3)


class Drawer:
    """Returns the clipped latents, shifted; keeps the batch sizes it was asked for."""

    name, settings, image_shape = "stub", {}, SHAPE

    def __init__(self, shift: float = 0.0, spoil: float | None = None, flat: bool = False) -> None:
        self.shift, self.spoil, self.flat, self.asked = shift, spoil, flat, []

    def draw(self, latents: Latents, labels: NDArray[np.int64]) -> NDArray[np.float32]:
        self.asked.append(len(labels))
        images = latents.array(SHAPE).clip(-1, 1) + np.float32(self.shift)
        if self.spoil is not None:
            images[latents.seeds == SAMPLES.latents.seeds[7], 0, 0, 0] = self.spoil
        if self.flat:
            images[-1] = 0.25
        return images

    def close(self) -> None:
        """Nothing to release."""


REFERENCE = SAMPLES.latents.array(SHAPE).clip(-1, 1)


def test_batches_of_one_three_and_the_largest_are_drawn() -> None:
    drawer = Drawer()
    parity = compare("graph", drawer, SAMPLES, REFERENCE, max_batch=64)
    assert drawer.asked == [1, 3, 64, 12]
    assert parity.samples == 80
    assert parity.max_difference == 0


def test_a_largest_batch_of_one_is_kept() -> None:
    drawer = Drawer()
    compare("graph", drawer, SAMPLES[:5], REFERENCE[:5], max_batch=1)
    assert drawer.asked == [1] * 5


def test_the_difference_and_the_psnr_of_a_known_shift() -> None:
    parity = compare("graph", Drawer(shift=0.02), SAMPLES, REFERENCE, max_batch=64)
    assert parity.max_difference == pytest.approx(0.02, rel=1e-4)
    assert parity.psnr_db == pytest.approx(40.0, abs=0.01)  # 20 log10(2 / 0.02)


def test_an_fp32_graph_that_departs_by_more_than_a_thousandth_is_refused() -> None:
    near, far = (Parity(80, (1,), difference, 99.0) for difference in (0.9e-3, 1.1e-3))
    near.require("onnx-cpu-fp32", "fp32", ExportConfig())
    with pytest.raises(LimitError, match=r"onnx-cpu-fp32: differs from PyTorch by 0.0011, limit 0.001"):
        far.require("onnx-cpu-fp32", "fp32", ExportConfig())


@pytest.mark.parametrize(("precision", "limit"), [("fp16", 40.0), ("int8", 20.0)])
def test_a_low_psnr_is_refused(precision: str, limit: float) -> None:
    Parity(80, (1,), 1.0, limit).require("x", precision, ExportConfig())  # type: ignore[arg-type]
    with pytest.raises(LimitError, match=f"limit {limit:g} dB"):
        Parity(80, (1,), 1.0, limit - 0.1).require("x", precision, ExportConfig())  # type: ignore[arg-type]


def test_an_image_that_is_not_finite_is_refused_by_label_and_seed() -> None:
    where = f"1 of 80 images are not finite, first label 1 seed {SAMPLES.latents.seeds[7]}"  # 7 modulo 3 labels
    with pytest.raises(LimitError, match=where):
        compare("graph", Drawer(spoil=np.nan), SAMPLES, REFERENCE, max_batch=64)


def test_an_image_of_one_colour_is_refused() -> None:
    with pytest.raises(LimitError, match="images are of one colour"):
        compare("graph", Drawer(flat=True), SAMPLES, REFERENCE, max_batch=64)
