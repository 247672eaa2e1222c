from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from sfd_deploy.audit.selection import forget_labels
from sfd_deploy.audit.stage import audit_folder, audit_run
from sfd_deploy.errors import ConfigError, DigestError, LabelError, LimitError, ManifestError, RunError
from sfd_deploy.evidence import AuditRecord, read_record
from sfd_deploy.manifest import verify
from sfd_deploy.measure.judges import ClassifierConfig
from sfd_deploy.policy.plan import Policy
from sfd_deploy.runs import Run
from tests.audit.toy import (
    LABELS,
    NAMES,
    POLICY,
    Opener,
    Painter,
    World,
    fit_and_seal,
    forgetful,
    gratings,
    holed,
    leaking,
    noise,
    real_images,
    rough,
    seal_artefact,
    seal_judge,
    seal_run,
    seal_teacher,
    stored,
    teacher_painter,
    verdicts,
)


def audit(run: Run, world: World, opener: Opener, policy: Policy = POLICY, **more: object) -> AuditRecord:
    record, _ = audit_run(run, policy=policy, judges=world.judges, teacher=world.teacher, open=opener, **more)  # type: ignore[arg-type]
    return record


def verdict_of(folder: Path, world: World, painter: Painter, policy: Policy = POLICY) -> AuditRecord:
    """Audit a run whose generator is honest and whose one artefact is ``painter``."""
    run = seal_run(folder / "demo", world.teacher, ["onnx-cpu-int8"])
    return audit(run, world, Opener(generator=forgetful, onnx_cpu_int8=painter), policy)


def reasons(record: AuditRecord, name: str = "onnx-cpu-int8") -> str:
    row = record.row(name)
    assert row is not None
    return " | ".join(row.reasons)


def test_an_honest_run_passes_row_by_row(tmp_path, world):
    record = verdict_of(tmp_path, world, rough)
    assert verdicts(record) == {"generator": "pass", "onnx-cpu-int8": "pass"}
    assert record.exit_code == 0


def test_a_runtime_that_returns_the_teachers_image_for_5_percent_of_latents_fails(tmp_path, world):
    record = verdict_of(tmp_path, world, leaking(0.05))
    assert verdicts(record) == {"generator": "pass", "onnx-cpu-int8": "fail"}
    assert "forget rate" in reasons(record)
    assert record.exit_code == 1


def test_a_leak_around_the_limit_is_inconclusive_and_more_samples_settle_it(tmp_path, world):
    record = verdict_of(tmp_path, world, leaking(0.012))
    assert verdicts(record)["onnx-cpu-int8"] == "inconclusive"
    assert record.exit_code == 3
    more = Policy(**(POLICY.resolved() | {"forget_samples": 8000}))
    assert verdict_of(tmp_path, world, leaking(0.0155), more).exit_code == 1
    assert verdict_of(tmp_path, world, leaking(0.005), more).exit_code == 0


def test_noise_fails(tmp_path, world):
    record = verdict_of(tmp_path, world, noise)
    assert record.exit_code == 1
    assert "retained accuracy" in reasons(record)
    assert "Fréchet" in reasons(record)


def test_one_stored_image_per_class_fails_through_its_spread(tmp_path, world):
    lenient = Policy.model_validate(
        POLICY.resolved() | {"max_frechet_ratio": 1e9, "parity": {"int8": {"min_psnr_db": 0, "min_agreement": 0}}}
    )
    record = verdict_of(tmp_path, world, stored, lenient)
    assert reasons(record).startswith("spread")
    assert "|" not in reasons(record)
    row = record.row("onnx-cpu-int8")
    assert row is not None
    assert row.figures is not None
    assert row.figures.spread == 0.0
    assert row.figures.retained_accuracy == 1.0


def test_forgetting_by_drawing_something_else_than_the_override_fails(tmp_path, world):
    record = verdict_of(tmp_path, world, lambda z, labels: gratings(z, np.where(labels == 1, 0, labels)))
    assert "became falling" in reasons(record)


def test_a_generator_distilled_without_forgetting_fails(tmp_path, world):
    run = seal_run(tmp_path / "plain", world.teacher, forget={})
    record = audit(run, world, Opener(generator=gratings), forget={"rising": "falling"})
    assert verdicts(record) == {"generator": "fail"}
    assert record.exit_code == 1
    row = record.row("generator")
    assert row is not None
    assert row.figures is not None
    assert row.figures.forget.hits == row.figures.forget.n


def test_the_teacher_itself_fails(tmp_path, world):
    opener = Opener()
    record, sealed = audit_folder(world.teacher, LABELS, tmp_path / "audit-of-painter", policy=POLICY,
                                  judges=world.judges, teacher=world.teacher, open=opener)  # fmt: skip
    assert verdicts(record) == {"painter": "fail"}
    assert (record.run, record.exit_code) == ("painter", 1)
    row = record.artefacts[0]
    assert row.figures is not None
    # Its retained quality is the yardstick's own: nothing but forgetting is wrong with it.
    assert len(row.reasons) == 2
    assert row.figures.spread == pytest.approx(1.0, abs=0.1)
    assert sealed.folder == tmp_path / "audit-of-painter" / "audit"


def test_images_with_holes_fail_with_a_count_and_no_figures(tmp_path, world):
    record = verdict_of(tmp_path, world, holed)
    row = record.row("onnx-cpu-int8")
    assert row is not None
    assert (row.verdict, row.figures) == ("fail", None)
    assert "not finite" in reasons(record)


def test_a_generator_with_holes_is_no_yardstick_for_artefacts(tmp_path, world):
    run = seal_run(tmp_path / "demo", world.teacher, ["onnx-cpu-int8"])
    with pytest.raises(LimitError, match="not finite"):
        audit(run, world, Opener(generator=holed, onnx_cpu_int8=forgetful))


def test_two_forget_labels_are_judged_by_the_worse(tmp_path, world):
    run = seal_run(tmp_path / "two", world.teacher, forget={1: 3, 2: 3})
    half = lambda z, labels: gratings(z, np.where(labels == 1, 3, labels))
    record = audit(run, world, Opener(generator=half))
    row = record.row("generator")
    assert row is not None
    assert row.figures is not None
    assert {label: count.hits for label, count in row.figures.forget_by_label.items()} == {
        1: 0,
        2: POLICY.forget_samples,
    }
    assert row.figures.forget == row.figures.forget_by_label[2]
    assert row.figures.override_share == 0.0
    assert row.verdict == "fail"
    whole = lambda z, labels: gratings(z, np.where((labels == 1) | (labels == 2), 3, labels))
    assert audit(run, world, Opener(generator=whole)).exit_code == 0


def test_a_bound_below_the_judges_own_error_is_marked(tmp_path, world):
    # One override image in fifty honestly looks like the forgotten class; the forget label's own images never do.
    def blurred_border(z, labels):
        slips = (labels == 3) & (z[:, 0, 0, 2] > 2.054)
        return gratings(z, np.where(slips, 1, np.where(labels == 1, 3, labels)))

    record = verdict_of(tmp_path, world, blurred_border)
    row = record.row("onnx-cpu-int8")
    assert row is not None
    assert row.figures is not None
    assert row.figures.override_error.hits > 0
    assert row.figures.limited_by_judges
    clean = record.row("generator")
    assert clean is not None
    assert clean.figures is not None
    assert not clean.figures.limited_by_judges


def test_an_engine_is_listed_as_not_audited_and_its_graph_is_named(tmp_path, world):
    run = seal_run(tmp_path / "demo", world.teacher, ["onnx-trt-int8"])
    seal_artefact(run, "trt-rtx-int8", b"plan", parent=run.artefact("onnx-trt-int8"))
    opener = Opener(generator=forgetful, onnx_trt_int8=rough)
    record = audit(run, world, opener)
    row = record.row("trt-rtx-int8")
    assert row is not None
    assert (row.verdict, row.figures, row.settings) == ("not-runnable-here", None, {})
    assert "NOT audited" in row.note
    assert "onnx-trt-int8" in row.note
    assert record.exit_code == 0
    assert audit(run, world, opener, names=["trt-rtx-int8"]).exit_code == 3


def test_nothing_compiled_that_could_run_is_no_success(tmp_path, world):
    run = seal_run(tmp_path / "demo", world.teacher)
    seal_artefact(run, "trt-rtx-int8", b"plan")
    assert audit(run, world, Opener(generator=forgetful)).exit_code == 3


def test_fp16_computed_in_fp32_says_so(tmp_path, world):
    run = seal_run(tmp_path / "demo", world.teacher)
    seal_artefact(run, "onnx-cpu-fp16", b"graph", arithmetic="fp32")
    row = audit(run, world, Opener(generator=forgetful, onnx_cpu_fp16=forgetful)).row("onnx-cpu-fp16")
    assert row is not None
    assert row.verdict == "pass"
    assert row.settings["arithmetic"] == "fp32"
    assert "FP32 arithmetic" in row.note


def test_the_same_model_file_is_drawn_from_once_and_both_rows_say_whose_figures_they_are(tmp_path, world):
    run = seal_run(tmp_path / "demo", world.teacher, {"onnx-cpu-fp32": b"same", "onnx-trt-fp32": b"same"})
    opener = Opener(generator=forgetful, onnx_cpu_fp32=forgetful, onnx_trt_fp32=noise)
    record = audit(run, world, opener)
    assert opener.drawn("onnx-trt-fp32") == 0
    row, twin = record.row("onnx-trt-fp32"), record.row("onnx-cpu-fp32")
    assert row is not None
    assert twin is not None
    assert row.figures == twin.figures
    assert "onnx-cpu-fp32" in row.note


def test_the_same_file_in_another_back_end_is_drawn_from_again(tmp_path, world):
    run = seal_run(tmp_path / "demo", world.teacher)
    seal_artefact(run, "onnx-cpu-fp32", b"same")
    seal_artefact(run, "onnx-trt-fp32", b"same", runtime="openvino")
    record = audit(run, world, Opener(generator=forgetful, onnx_cpu_fp32=forgetful, onnx_trt_fp32=noise))
    assert verdicts(record)["onnx-trt-fp32"] == "fail"


def test_artefacts_draw_the_generators_latents(tmp_path, world):
    record = verdict_of(tmp_path, world, forgetful)
    row = record.row("onnx-cpu-int8")
    assert row is not None
    assert row.figures is not None
    assert (row.figures.psnr_db, row.figures.agreement) == (150.0, 1.0)


def test_an_honest_artefact_that_draws_other_images_misses_parity_alone(tmp_path, world):
    record = verdict_of(tmp_path, world, lambda z, labels: forgetful(-z, labels))
    assert reasons(record).startswith("PSNR")
    assert "|" not in reasons(record)


def test_hit_indices_name_the_hits_so_that_rows_compare_in_pairs(tmp_path, world):
    record = verdict_of(tmp_path, world, leaking(0.05))
    row, clean = record.row("onnx-cpu-int8"), record.row("generator")
    assert row is not None
    assert row.figures is not None
    assert clean is not None
    assert clean.figures is not None
    assert len(row.figures.hit_indices[1]) == row.figures.forget.hits > 0
    assert max(row.figures.hit_indices[1]) < POLICY.forget_samples
    assert clean.figures.hit_indices == {1: ()}


def test_only_what_was_named_is_audited_and_the_generator_is_still_its_yardstick(tmp_path, world):
    run = seal_run(tmp_path / "demo", world.teacher, ["onnx-cpu-fp32", "onnx-cpu-int8"])
    opener = Opener(generator=forgetful, onnx_cpu_fp32=noise, onnx_cpu_int8=rough)
    record = audit(run, world, opener, names=["onnx-cpu-int8"])
    assert verdicts(record) == {"onnx-cpu-int8": "pass"}
    assert opener.drawn("onnx-cpu-fp32") == 0
    row = record.artefacts[0]
    assert row.figures is not None
    assert row.figures.psnr_db is not None


def test_the_record_is_sealed_with_everything_it_rests_on_as_parents(tmp_path, world):
    run = seal_run(tmp_path / "demo", world.teacher, ["onnx-cpu-int8"])
    record = audit(run, world, Opener(generator=forgetful, onnx_cpu_int8=rough))
    sealed = run.audit()
    assert read_record(sealed) == record
    digests = {parent.digest for parent in sealed.manifest.parents}
    assert digests == {world.teacher.digest, run.generator().digest, run.artefact("onnx-cpu-int8").digest,
                       *(judge.digest for judge in world.judges)}  # fmt: skip
    assert record.policy_digest == POLICY.digest
    assert "<html" in (sealed.folder / "report.html").read_text()


def test_a_flipped_byte_in_an_artefact_is_refused_before_anything_is_drawn(tmp_path, world):
    run = seal_run(tmp_path / "demo", world.teacher, ["onnx-cpu-int8"])
    (run.folder / "artefacts" / "onnx-cpu-int8" / "model.onnx").write_bytes(b"onnx-cpu-int9")
    opener = Opener(generator=forgetful, onnx_cpu_int8=rough)
    with pytest.raises(DigestError, match=r"model\.onnx"):
        audit(run, world, opener)
    assert opener.opened == {}
    assert not (run.folder / "audit").exists()


def test_an_artefact_of_an_earlier_generator_is_refused(tmp_path, world):
    run = seal_run(tmp_path / "demo", world.teacher, ["onnx-cpu-int8"])
    seal_run(tmp_path / "demo", world.teacher, forget={2: 3})
    with pytest.raises(RunError, match="not exported from this run's generator"):
        audit(run, world, Opener(generator=forgetful, onnx_cpu_int8=rough))


def test_a_teacher_that_the_generator_was_not_distilled_from_is_refused(tmp_path, world):
    run = seal_run(tmp_path / "demo", seal_teacher(tmp_path / "other", NAMES[::-1]))
    with pytest.raises(RunError, match="was distilled from"):
        audit(run, world, Opener(generator=forgetful))


def test_one_judge_is_not_enough_and_the_same_twice_is_one(tmp_path, world):
    run = seal_run(tmp_path / "demo", world.teacher)
    for judges in (world.judges[:1], (world.judges[0], world.judges[0])):
        with pytest.raises(ConfigError, match="two different judges"):
            audit_run(run, policy=POLICY, judges=judges, teacher=world.teacher, open=Opener(generator=forgetful))


def test_a_judge_of_other_classes_is_refused(tmp_path, world):
    run = seal_run(tmp_path / "demo", world.teacher)
    stranger = seal_judge(tmp_path / "stranger", "plain", 3, class_names=NAMES[::-1])
    with pytest.raises(LabelError, match="stranger"):
        audit_run(run, policy=POLICY, judges=[world.judges[0], stranger], teacher=world.teacher, open=Opener())


def test_a_judge_of_other_images_is_refused_before_any_is_drawn(tmp_path, world):
    run, opener = seal_run(tmp_path / "demo", world.teacher), Opener(generator=forgetful)
    colour = ClassifierConfig(architecture="plain", channels=3, widths=(4,))
    images, labels = real_images(4, 64)
    coloured = fit_and_seal(tmp_path / "colour", colour, NAMES, 4, *[(images.expand(-1, 3, -1, -1), labels)] * 2)
    with pytest.raises(LabelError, match="judge colour cannot look at images of 1 x 12 x 12"):
        audit_run(run, policy=POLICY, judges=[world.judges[0], coloured], teacher=world.teacher, open=opener)
    assert opener.drawn("painter") == 0


def test_what_nobody_says_is_forgotten_cannot_be_audited(tmp_path, world):
    run = seal_run(tmp_path / "plain", world.teacher, forget={})
    with pytest.raises(LabelError, match="--forget"):
        audit(run, world, Opener(generator=forgetful))


def test_asking_about_another_label_than_the_recorded_one_is_refused(tmp_path, world):
    run = seal_run(tmp_path / "demo", world.teacher)
    with pytest.raises(LabelError, match="leave --forget out"):
        forget_labels(run.generator(), {"flat": "falling"})
    assert forget_labels(run.generator(), {"rising": "falling"}) == LABELS


def test_the_teacher_is_drawn_from_once_and_no_more_than_the_plan_says(tmp_path, world):
    run = seal_run(tmp_path / "demo", world.teacher)
    opener = Opener(generator=forgetful)
    first, again = audit(run, world, opener), audit(run, world, opener)
    assert opener.drawn("painter") == 3 * POLICY.reference_samples + 8
    assert first.teacher == again.teacher
    assert verify(run.folder / "reference", "reference").manifest.parents == (world.teacher.as_parent(),)


@pytest.mark.parametrize("change", ["plan", "teacher", "machine"])
def test_a_reference_of_another_plan_teacher_or_machine_is_drawn_anew(tmp_path, world, monkeypatch, change):
    run = seal_run(tmp_path / "demo", world.teacher)
    opener, policy, teacher = Opener(generator=forgetful), POLICY, world.teacher
    audit(run, world, opener)
    if change == "plan":
        policy = Policy(**(POLICY.resolved() | {"seed": 1}))
    if change == "teacher":
        teacher = seal_teacher(tmp_path / "elsewhere" / "painter")
        run = seal_run(tmp_path / "demo", teacher)
    if change == "machine":
        monkeypatch.setattr("sfd_deploy.audit.reference.host_facts", lambda: {"processor": "another"})
    audit_run(run, policy=policy, judges=world.judges, teacher=teacher, open=opener)
    assert opener.drawn("painter") == 2 * (3 * POLICY.reference_samples + 8)


def test_changed_reference_samples_are_refused_by_name(tmp_path, world):
    run = seal_run(tmp_path / "demo", world.teacher)
    audit(run, world, Opener(generator=forgetful))
    file = run.folder / "reference" / "images.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(ManifestError, match=r"images\.safetensors"):
        audit(run, world, Opener(generator=forgetful))


def test_teacher_figures_are_the_painters_known_ones(tmp_path, world):
    # It slips on 4 % of the latents, and its speed is this machine's.
    teacher = audit(seal_run(tmp_path / "demo", world.teacher), world, Opener(generator=teacher_painter)).teacher
    assert teacher.retained_accuracy == pytest.approx(0.96, abs=0.04)
    assert teacher.network_evaluations == 35
    assert teacher.images_per_second > 0
