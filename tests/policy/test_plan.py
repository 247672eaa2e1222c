from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

from sfd_deploy.errors import ConfigError
from sfd_deploy.labels import Labels
from sfd_deploy.latents import Latents
from sfd_deploy.policy.plan import PICTURES, Plan, Policy

LABELS = Labels(class_names=("a", "b", "c", "d", "e"), forget={1: 2, 4: 2})
SMALL = {"forget_samples": 500, "override_samples": 30, "retained_samples": 20, "reference_samples": 10}


def test_the_shipped_policy_is_the_one_the_code_documents():
    assert Policy.load("default", "policy") == Policy(name="default")


def test_a_policy_file_may_name_only_what_it_changes(tmp_path):
    file = tmp_path / "strict.yaml"
    file.write_text("name: strict\nmax_forget_rate: 0.005\n")
    policy = Policy.load(str(file), "policy")
    assert (policy.max_forget_rate, policy.min_spread) == (0.005, 0.7)


def test_the_digest_changes_with_any_limit_and_with_nothing_else(tmp_path):
    digests = {Policy(**change).digest for change in ({}, {"min_spread": 0.71}, {"seed": 1}, {"confidence": 0.999})}
    assert len(digests) == 4
    assert Policy().digest == Policy(min_spread=0.7).digest


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("max_forget_rat: 0.1", "did you mean `max_forget_rate`"),
        ("parity: {fp32: {min_psnr: 3}}", "min_psnr_db"),
        ("confidence: 1.0", "confidence"),
        ("min_spread: much", "min_spread"),
    ],
)
def test_bad_keys_and_values_are_named(tmp_path, text, expected):
    (tmp_path / "policy.yaml").write_text(text)
    with pytest.raises(ConfigError, match=expected):
        Policy.load(str(tmp_path / "policy.yaml"), "policy")


def test_a_policy_that_zero_hits_could_not_pass_is_refused_with_the_size_it_needs(tmp_path):
    (tmp_path / "policy.yaml").write_text("forget_samples: 458")
    with pytest.raises(ConfigError, match="at least 459"):
        Policy.load(str(tmp_path / "policy.yaml"), "policy")
    assert Policy(forget_samples=459).forget_samples == 459


def test_fewer_artefact_than_teacher_samples_are_refused(tmp_path):
    (tmp_path / "policy.yaml").write_text("retained_samples: 100")
    with pytest.raises(ConfigError, match="one sample size only"):
        Policy.load(str(tmp_path / "policy.yaml"), "policy")


def test_cells_cover_every_purpose_once_and_share_no_index():
    plan = Plan.of(Policy(**SMALL), LABELS)
    sizes = {(cell.purpose, cell.label): cell.n for cell in plan.cells}
    assert len(sizes) == len(plan.cells)
    assert sizes == {
        ("forget", 1): 500, ("forget", 4): 500, ("override", 2): 30,
        ("retained", 0): 20, ("retained", 2): 20, ("retained", 3): 20,
        ("reference", 0): 10, ("reference", 2): 10, ("reference", 3): 10,
        ("picture", 1): PICTURES, ("picture", 4): PICTURES,
    }  # fmt: skip
    ordered = sorted(plan.cells, key=lambda cell: cell.start)
    assert all(before.stop <= after.start for before, after in pairwise(ordered))
    assert {cell.stream for cell in plan.cells} == {"audit"}


def test_the_teacher_draws_no_forget_evidence_and_artefacts_no_reference():
    plan = Plan.of(Policy(**SMALL), LABELS)
    assert {cell.purpose for cell in plan.subject_cells} == {"forget", "override", "retained"}
    assert sum(cell.n for cell in plan.teacher_cells) == 3 * 10 + 2 * PICTURES


def test_latents_are_the_audit_streams_at_the_cells_indices():
    plan = Plan.of(Policy(**SMALL, seed=5), LABELS)
    override = next(cell for cell in plan.cells if cell.purpose == "override")
    latents, labels = plan.latents((plan.cells[1], override))
    assert np.array_equal(latents.seeds, Latents.of_stream("audit", 5, 500, 530).seeds)
    assert labels.tolist() == [4] * 500 + [2] * 30


def test_the_plans_digest_follows_labels_sizes_and_seed():
    base = Plan.of(Policy(**SMALL), LABELS).digest
    others = [
        Plan.of(Policy(**SMALL, seed=1), LABELS),
        Plan.of(Policy(**(SMALL | {"forget_samples": 501})), LABELS),
        Plan.of(Policy(**SMALL), Labels(class_names=LABELS.class_names, forget={1: 2})),
    ]
    assert base not in {plan.digest for plan in others}
    assert base == Plan.of(Policy(**SMALL, max_retained_drop=0.5), LABELS).digest


@pytest.mark.parametrize(("name", "more"), [("text-to-image", {}), ("fashion-t2i", {"forget_samples": 10_000})])
def test_the_policies_of_prompts_change_how_many_images_there_are_and_no_limit(name, more):
    drawn = {"override_samples": 500, "reference_samples": 100}
    assert Policy.load(name, "policy") == Policy(name=name, **drawn, **more)
