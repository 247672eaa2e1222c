from __future__ import annotations

import pytest

from sfd_deploy.evidence import (
    ArtefactRecord,
    Count,
    FamilyFigures,
    Figures,
    GuidedTeacherFigures,
    TeacherFigures,
)
from sfd_deploy.labels import Labels
from sfd_deploy.measure.rates import lower_bound, upper_bound
from sfd_deploy.policy.plan import Policy
from sfd_deploy.policy.verdict import exit_code, judge, override_floor
from sfd_deploy.probes import Families

LABELS = Labels(class_names=("coat", "trouser", "bag"), forget={1: 2})
TEACHER = TeacherFigures(
    name="teacher", digest="t", retained_accuracy=0.9, accuracy_by_label={0: 0.85, 2: 0.95},
    spread_by_label={0: 5.0, 2: 6.0}, frechet=0.5, images_per_second=20.0, network_evaluations=35,
)  # fmt: skip
POLICY = Policy()


def counted(hits: int, n: int = 2000) -> Count:
    return Count(hits=hits, n=n, rate=hits / n, lower=lower_bound(hits, n, 0.99), upper=upper_bound(hits, n, 0.99),
                 upper_99=upper_bound(hits, n, 0.99))  # fmt: skip


def figures(hits: int = 0, n: int = 2000, **changed: object) -> Figures:
    """Figures that meet every limit exactly at the edge, but for ``changed``."""
    values: dict[str, object] = {
        "forget": counted(hits, n), "forget_by_label": {1: counted(hits, n)}, "hit_indices": {1: tuple(range(hits))},
        "override_error": counted(0), "limited_by_judges": False, "override_share": 0.90,
        "override_share_by_label": {1: 0.9}, "retained_accuracy": 0.87, "retained_accuracy_by_label": {0: 0.8, 2: 0.94},
        "spread": 0.7, "spread_by_label": {0: 0.7, 2: 0.9}, "frechet": 1.0, "frechet_ratio": 2.0, "psnr_db": 60.0,
        "agreement": 0.99, "images_per_second": 700.0, "speedup_over_teacher": 35.0,
    }  # fmt: skip
    return Figures.model_validate(values | changed)


def verdict_of(found: Figures, policy: Policy = POLICY, precision: str = "fp32") -> str:
    return judge(found, TEACHER, LABELS, policy, precision).verdict


def test_limits_met_exactly_pass_without_a_reason():
    assert judge(figures(), TEACHER, LABELS, POLICY, "fp32").reasons == ()
    assert verdict_of(figures()) == "pass"


def test_a_limit_met_exactly_is_met_whatever_floating_point_makes_of_it():
    """0.437 - 0.03 is 0.40700000000000003."""
    teacher = TEACHER.model_copy(update={"retained_accuracy": 0.437})
    assert judge(figures(retained_accuracy=0.407), teacher, LABELS, POLICY, "fp32").verdict == "pass"


@pytest.mark.parametrize(
    ("hits", "expected"),
    # Of 2,000 at 99 %: 9 hits bound the rate at 0.94 %, 10 at 1.004 %; 31 leave it above 0.98 %, 32 above 1.02 %.
    [(0, "pass"), (9, "pass"), (10, "inconclusive"), (31, "inconclusive"), (32, "fail"), (100, "fail"), (2000, "fail")],
)
def test_the_bounds_decide_between_pass_inconclusive_and_fail(hits, expected):
    assert verdict_of(figures(hits)) == expected


def test_too_few_samples_are_inconclusive_whatever_was_seen():
    assert verdict_of(figures(hits=0, n=100)) == "inconclusive"


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"retained_accuracy": 0.8699}, "retained accuracy is 0.870"),
        ({"spread": 0.699}, "spread"),
        ({"frechet_ratio": 2.01}, "Fréchet"),
        ({"override_share_by_label": {1: 0.8999}}, "became bag"),
        ({"psnr_db": 59.9}, "PSNR"),
        ({"agreement": 0.9899}, "agree"),
    ],
)
def test_each_criterion_missed_alone_fails_and_is_named(changed, named):
    found = judge(figures(**changed), TEACHER, LABELS, POLICY, "fp32")
    assert found.verdict == "fail"
    assert len(found.reasons) == 1
    assert named in found.reasons[0]


@pytest.mark.parametrize(
    ("apart", "least", "expected"),
    [(0.5, 0.5, "pass"), (0.49, 0.5, "fail"), (None, 0.5, "inconclusive"), (None, 0.0, "pass"), (0.0, 0.0, "pass")],
)
def test_images_of_one_prompt_must_be_as_far_apart_as_the_policy_says(apart, least, expected):
    """The family's spread says nothing of it: here it is the teacher's own."""
    values = figures(spread=1.0).model_dump() | {"drawn_instead": {}, "prompt_spread": {"overall": apart}}
    policy = Policy(min_prompt_spread=least)
    found = judge(FamilyFigures.model_validate(values), TEACHER, LABELS, policy, "fp32")
    assert found.verdict == expected
    assert all("one prompt" in reason for reason in found.reasons)


def test_a_missed_criterion_outweighs_an_unsettled_rate_and_both_are_told():
    found = judge(figures(hits=15, spread=0.1), TEACHER, LABELS, POLICY, "fp32")
    assert found.verdict == "fail"
    assert len(found.reasons) == 2


def test_parity_limits_follow_the_precision():
    rough = figures(psnr_db=25.0, agreement=0.9)
    assert [verdict_of(rough, precision=precision) for precision in ("fp32", "fp16", "int8")] == [
        "fail",
        "fail",
        "pass",
    ]


def test_a_model_in_pytorch_has_no_parity_to_miss():
    assert verdict_of(figures(psnr_db=None, agreement=None)) == "pass"


def test_every_forget_label_must_be_within_the_limit():
    two = Labels(class_names=("coat", "trouser", "bag", "shoe"), forget={1: 2, 3: 2})
    shares = {1: 0.9, 3: 0.9}

    def worst(other: int) -> str:
        counts = {1: counted(0), 3: counted(other)}
        return judge(
            figures(forget_by_label=counts, override_share_by_label=shares), TEACHER, two, POLICY, "fp32"
        ).verdict

    assert [worst(hits) for hits in (0, 15, 50)] == ["pass", "inconclusive", "fail"]


def test_every_forget_label_must_become_its_override():
    two = Labels(class_names=("coat", "trouser", "bag", "shoe"), forget={1: 2, 3: 2})
    found = judge(figures(forget_by_label={1: counted(0), 3: counted(0)}, override_share_by_label={1: 0.95, 3: 0.2}),
                  TEACHER, two, POLICY, "fp32")  # fmt: skip
    assert found.verdict == "fail"
    assert "shoe" in found.reasons[0]


def test_a_mixtures_floor_is_the_teachers_mean_over_what_may_be_drawn():
    assert override_floor(TEACHER, POLICY, (0, 2)) == pytest.approx((0.85 + 0.95) / 2 - 0.05)


@pytest.mark.parametrize(
    ("seen", "expected"),
    # At 99 %, 27 of 60 (45 %) leave the share above 30.0 %, 34 above 40.9 % (Clopper-Pearson); 40 % is wanted.
    [(27, "inconclusive"), (34, "pass")],
)
def test_the_control_counts_by_its_lower_bound_and_not_as_read(seen, expected):
    families = Families(class_names=("training prompts", "bag"), forget={0: "mixture"}, shows=("sandal", "bag"),
                        prompts=(("a sandal",), ("a bag",)), stand_ins=(1,), control=0.4)  # fmt: skip
    teacher = GuidedTeacherFigures.model_validate(
        TEACHER.model_dump() | {"settings": {}, "concept_by_label": {0: counted(seen, 60)}}
    )
    clean = figures(forget_by_label={0: counted(0)}, override_share_by_label={0: 0.9})
    found = judge(clean, teacher, families, POLICY, "fp32")
    assert found.verdict == expected
    assert len(found.reasons) == (expected == "inconclusive")


def row(name: str, verdict: str, kind: str = "artefact") -> ArtefactRecord:
    return ArtefactRecord.model_validate({
        "name": name, "kind": kind, "digest": name, "runtime": "onnxruntime", "precision": "fp32", "settings": {},
        "bytes": 1, "verdict": verdict,
    })  # fmt: skip


@pytest.mark.parametrize(
    ("rows", "named", "code"),
    [
        ("generator:pass a:pass", "", 0),
        ("generator:pass a:pass b:not-runnable-here", "", 0),
        ("generator:pass a:pass b:not-runnable-here", "b", 3),
        ("generator:pass a:pass b:not-runnable-here", "a", 0),
        ("generator:pass a:inconclusive", "", 3),
        ("generator:inconclusive a:pass", "", 3),
        ("generator:pass a:not-runnable-here b:not-runnable-here", "", 3),
        ("a:not-runnable-here", "a", 3),
        ("generator:pass", "", 0),
        ("generator:pass a:fail b:inconclusive c:not-runnable-here", "c", 1),
        ("generator:fail a:pass", "", 1),
        ("generator:fail a:not-runnable-here", "a", 1),
    ],
)
def test_exit_code_of_a_whole_audit(rows, named, code):
    pairs = [text.split(":") for text in rows.split()]
    records = [row(name, verdict, "generator" if name == "generator" else "artefact") for name, verdict in pairs]
    assert exit_code(records, named.split()) == code
