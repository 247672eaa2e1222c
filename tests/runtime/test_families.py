from __future__ import annotations

from typing import Any

import numpy as np

from sfd_deploy.labels import MIXTURE
from sfd_deploy.latents import Latents
from sfd_deploy.probes import Families
from sfd_deploy.runtime.families import FamilyRuntime

FAMILIES = Families(
    class_names=("gone", "kept"), forget={0: MIXTURE}, shows=("sandal", "bag"),
    prompts=(("a", "b", "c"), ("d", "e")), stand_ins=(1,), control=0.5,
)  # fmt: skip


class Recorder:
    """Remembers which texts it was asked for; an image is its seed."""

    name = "recorder"
    settings: dict[str, Any] = {"arithmetic": "fp32"}  # noqa: RUF012
    image_shape = (1, 1, 1)
    asked: tuple[str, ...] = ()
    closed = False

    def draw(self, latents: Latents, labels: np.ndarray) -> np.ndarray:
        self.asked = tuple(FAMILIES.texts[number] for number in labels)
        return latents.seeds.reshape(-1, 1, 1, 1).astype(np.float32)

    def close(self) -> None:
        self.closed = True


def test_a_seed_picks_one_of_its_own_family_s_prompts_and_stays_its_image_s():
    recorder = Recorder()
    runtime = FamilyRuntime(recorder, FAMILIES)
    images = runtime.draw(Latents(np.array([0, 1, 2, 3, 0, 1, 2])), np.array([0, 0, 0, 0, 1, 1, 1]))
    assert recorder.asked == ("a", "b", "c", "a", "d", "e", "d")
    assert images.ravel().tolist() == [0, 1, 2, 3, 0, 1, 2]
    assert FAMILIES.asked(np.array([0, 0, 1]), np.array([1, 3, 1])).tolist() == [1, 0, 4]


def test_every_prompt_is_asked_about_equally_often():
    recorder = Recorder()
    FamilyRuntime(recorder, FAMILIES).draw(Latents.of_stream("audit", 0, 0, 3000), np.zeros(3000, np.int64))
    counts = [recorder.asked.count(text) for text in "abc"]
    assert sum(counts) == 3000
    assert max(abs(count - 1000) for count in counts) < 130  # five standard deviations


def test_the_back_end_is_named_and_closed_as_itself():
    recorder = Recorder()
    runtime = FamilyRuntime(recorder, FAMILIES)
    assert (runtime.name, runtime.settings, runtime.image_shape) == ("recorder", {"arithmetic": "fp32"}, (1, 1, 1))
    runtime.close()
    assert recorder.closed
