from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from sfd_deploy.latents import Latents, standard_normal, stream_seeds

# From `by_hand(0, 4) + by_hand(7, 4)`; the server's environment is held to the same numbers.
PINNED = [2.284441485, -1.549450794, 1.924585382, -0.663751811, -0.458659207, -1.29385824, 0.251783587, 0.874651399]


def by_hand(seed: int, count: int) -> list[float]:
    """Box-Muller in Python's own floats, from the raw words."""
    import math

    pairs = (count + 1) // 2
    words = [int(word) for word in np.random.Philox(key=seed).random_raw(2 * pairs)]
    radius = [math.sqrt(-2 * math.log((word >> 11) * 2.0**-53 + 2.0**-53)) for word in words[:pairs]]
    angle = [2 * math.pi * (word >> 11) * 2.0**-53 for word in words[pairs:]]
    cosines = [r * math.cos(a) for r, a in zip(radius, angle, strict=True)]
    sines = [r * math.sin(a) for r, a in zip(radius, angle, strict=True)]
    return (cosines + sines)[:count]


@pytest.mark.parametrize("seed", [0, 1, 2**62 + 12345])
def test_latents_equal_box_muller_in_plain_python(seed):
    found = standard_normal(np.array([seed]), (1, 3, 3))
    assert found.dtype == np.float32
    assert found.ravel() == pytest.approx(by_hand(seed, 9), abs=1e-6)


def test_pinned_values_never_change():
    assert standard_normal(np.array([0, 7]), (2, 2)).ravel() == pytest.approx(PINNED, abs=1e-6)


def test_an_image_does_not_depend_on_its_batch():
    together = Latents.of_stream("audit", 3, 0, 10).array((1, 8, 8))
    alone = Latents.of_stream("audit", 3, 7, 1).array((1, 8, 8))
    assert np.array_equal(together[7:8], alone)
    assert np.array_equal(Latents.of_stream("audit", 3, 0, 10)[7:8].array((1, 8, 8)), alone)


def test_latents_are_standard_normal():
    values = Latents.of_stream("audit", 0, 0, 200).array((1, 28, 28)).ravel()
    assert stats.kstest(values, "norm").pvalue > 0.01


def test_an_images_seed_is_the_sha256_of_its_stream_seed_and_index():
    # printf audit/3/7 | sha256sum begins with 96f9624974549289; its first bit is dropped.
    assert stream_seeds("audit", 3, 7, 1).tolist() == [0x16F9624974549289]


def test_another_seed_of_a_stream_shares_no_image():
    assert not set(stream_seeds("audit", 0, 0, 500)) & set(stream_seeds("audit", 1, 0, 500))


def test_streams_share_no_seed():
    select, audit = (set(stream_seeds(name, 0, 0, 2000).tolist()) for name in ("select", "audit"))
    assert not select & audit
    assert len(select) == len(audit) == 2000


def test_an_unknown_stream_and_a_negative_seed_are_refused():
    with pytest.raises(ValueError, match="unknown latent stream"):
        stream_seeds("audits", 0, 0, 1)
    with pytest.raises(ValueError, match="negative"):
        standard_normal(np.array([-1]), (1,))
