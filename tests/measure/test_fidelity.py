from __future__ import annotations

import numpy as np
import pytest
from scipy.linalg import sqrtm
from scipy.spatial.distance import pdist

from sfd_deploy.measure.fidelity import agreement, frechet_distance, gaussian, psnr_db, scatter, spread, spread_error


def images(seed: int, n: int, shape: tuple[int, ...] = (1, 6, 6)) -> np.ndarray:
    return np.random.default_rng(seed).uniform(-1, 1, (n, *shape)).astype(np.float32)


def test_psnr_of_a_constant_error_is_the_textbook_value_over_a_range_of_two():
    clean = np.zeros((3, 1, 4, 4), np.float32)
    # 20 log10(2 / 0.02) = 40 dB, and half the error is 6.02 dB more
    assert psnr_db(clean + np.float32(0.02), clean) == pytest.approx([40.0] * 3, abs=1e-4)
    assert psnr_db(clean + np.float32(0.01), clean) == pytest.approx([46.0206] * 3, abs=1e-4)


def test_psnr_is_per_image_and_equal_images_have_the_cap_not_infinity():
    clean = np.zeros((2, 1, 4, 4), np.float32)
    spoilt = clean.copy()
    spoilt[1] += 2.0
    assert psnr_db(spoilt, clean).tolist() == [150.0, pytest.approx(0.0)]


def test_psnr_of_sets_of_different_shape_is_refused():
    with pytest.raises(ValueError, match="not pairs"):
        psnr_db(images(0, 2), images(0, 3))


def test_agreement_wants_every_judge_to_say_the_same():
    before = np.array([[0, 1, 2, 3], [0, 1, 2, 3]])
    after = np.array([[0, 1, 2, 0], [0, 2, 2, 3]])
    assert agreement(after, before) == 0.5


def test_spread_is_the_root_mean_square_distance_over_all_pairs():
    sample = images(1, 40)
    assert spread(sample) == pytest.approx(np.sqrt(np.mean(pdist(sample.reshape(40, -1).astype(np.float64)) ** 2)))


def test_one_stored_image_has_no_spread():
    assert spread(np.repeat(images(2, 1), 50, axis=0)) == 0.0


def test_scatter_is_over_the_pairs_of_one_group_alone():
    sample, groups = images(1, 30), np.arange(30) % 3
    sample[groups == 1] += 5  # far from the others, which no pair within sees
    within = [pdist(sample[groups == group].reshape(10, -1).astype(np.float64)) ** 2 for group in range(3)]
    assert scatter(sample, groups).spread == pytest.approx(np.sqrt(np.mean(within)))
    assert scatter(sample, np.zeros(30, np.int64)).spread == pytest.approx(spread(sample))
    apart = scatter(sample[groups == 1], groups[groups == 1]) + scatter(sample[groups != 1], groups[groups != 1])
    assert apart.spread == pytest.approx(scatter(sample, groups).spread)


def test_images_of_as_many_groups_have_no_scatter_to_speak_of():
    assert scatter(images(0, 4), np.arange(4)).spread is None
    assert scatter(np.repeat(images(0, 4), 2, axis=0), np.arange(8) // 2).spread == 0.0


def test_spread_does_not_grow_with_the_number_of_images():
    small = np.mean([spread(images(seed, 5)) ** 2 for seed in range(400)])
    assert small == pytest.approx(spread(images(3, 4000)) ** 2, rel=0.02)


@pytest.mark.parametrize("share", [0.3, 0.1])
def test_the_spreads_standard_error_is_how_much_it_varies_from_one_set_to_another(share):
    """One image in ten, or three, is white, the others black: the spread is the root of p (1 - p), times a constant."""
    rng = np.random.default_rng(4)
    sets = [np.repeat((rng.random((200, 1, 1, 1)) < share) * 2.0 - 1, 4, axis=2) for _ in range(2000)]
    spreads = np.array([spread(one) for one in sets])
    stated = np.mean([spread_error(one) for one in sets])
    assert stated == pytest.approx(spreads.std() / spreads.mean(), rel=0.05)
    assert stated == pytest.approx((1 - 2 * share) / (2 * np.sqrt(200 * share * (1 - share))), rel=0.05)


def test_one_stored_image_has_a_spread_without_error():
    assert spread_error(np.repeat(images(2, 1), 50, axis=0)) == 0.0


def test_spread_of_a_single_image_is_refused():
    with pytest.raises(ValueError, match="two images"):
        spread(images(0, 1))


def test_frechet_distance_between_axis_aligned_gaussians_has_its_closed_form():
    # |a - b|^2 + sum (sqrt(s) - sqrt(t))^2 = 9 + 16 + (1 - 2)^2 + (3 - 1)^2
    found = frechet_distance(np.array([0.0, 0.0]), np.diag([1.0, 9.0]), np.array([3.0, 4.0]), np.diag([4.0, 1.0]))
    assert found == pytest.approx(30.0)


def test_frechet_distance_agrees_with_scipys_matrix_root():
    draws = np.random.default_rng(4)
    a, b = draws.normal(size=(200, 12)) @ draws.normal(size=(12, 12)), draws.normal(size=(200, 12)) + 0.3
    (mean_a, cov_a), (mean_b, cov_b) = gaussian(a.astype(np.float32)), gaussian(b.astype(np.float32))
    reference = np.square(mean_a - mean_b).sum() + np.trace(cov_a + cov_b - 2 * np.real(sqrtm(cov_a @ cov_b)))
    assert frechet_distance(mean_a, cov_a, mean_b, cov_b) == pytest.approx(reference, rel=1e-8)


def test_frechet_distance_to_itself_is_zero_even_with_fewer_images_than_features():
    mean, covariance = gaussian(np.random.default_rng(5).normal(size=(6, 30)).astype(np.float32))
    assert frechet_distance(mean, covariance, mean, covariance) == pytest.approx(0.0, abs=1e-6)


def test_gaussian_has_the_unbiased_covariance():
    rows = np.random.default_rng(6).normal(size=(9, 3)).astype(np.float32)
    mean, covariance = gaussian(rows)
    centred = rows.astype(np.float64) - rows.astype(np.float64).mean(0)
    assert mean == pytest.approx(rows.astype(np.float64).mean(0))
    assert covariance == pytest.approx(centred.T @ centred / 8)
