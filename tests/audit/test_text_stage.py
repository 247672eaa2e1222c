"""The audit of prompts: families are asked for, judged and decided on as labels are."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sfd_deploy.audit.subjects import Subject
from sfd_deploy.audit.text_stage import audit_text_folder, audit_text_run
from sfd_deploy.errors import DigestError, LabelError, PromptError, RunError
from sfd_deploy.evidence import AuditRecord, FamilyFigures, GuidedTeacherFigures, contract_row, read_record
from sfd_deploy.latents import Latents
from sfd_deploy.manifest import verify
from sfd_deploy.measure.fidelity import frechet_distance, gaussian
from sfd_deploy.policy.plan import Plan
from sfd_deploy.probes import TRAINING, Families
from sfd_deploy.prompts import negative_prompts
from sfd_deploy.runs import Run, sealed_folder
from tests.audit.test_report import Page
from tests.audit.text_toy import (
    POLICY,
    PROMPTS,
    RED,
    SANDAL,
    Reading,
    TextOpener,
    TextWorld,
    forgetful,
    leaking,
    paint,
    probes_of,
    seal_pipeline,
    seal_text_run,
)
from tests.audit.toy import verdicts

ATTRIBUTE = negative_prompts(["a green bag", "the blue coat"], ["a bag", "a coat"], ["red"])


def audit(run: Run, world: TextWorld, opener: TextOpener, values: dict[str, Any] = SANDAL, **more: Any) -> AuditRecord:
    given = {"policy": POLICY, "judges": world.judges, "teacher": world.teacher, "open": opener} | more
    record, _ = audit_text_run(run, probes=probes_of(values), **given)
    return record


def record_of(folder: Path, world: TextWorld, reading: Reading, values: dict[str, Any] = SANDAL) -> AuditRecord:
    """Audit a run whose generator reads prompts as ``reading`` does."""
    run = seal_text_run(folder / "demo", world.teacher, prompts=PROMPTS if values is SANDAL else ATTRIBUTE)
    return audit(run, world, TextOpener(generator=reading), values)


def families_of(record: AuditRecord) -> Families:
    labels = Plan.from_mapping(record.plan, "the plan").labels
    assert isinstance(labels, Families)
    return labels


def figures_of(record: AuditRecord, name: str = "generator") -> FamilyFigures:
    row = record.row(name)
    assert row is not None
    assert isinstance(row.figures, FamilyFigures)
    return row.figures


def by_family(record: AuditRecord, values: dict[int, Any]) -> dict[str, Any]:
    return {families_of(record).class_names[label]: value for label, value in values.items()}


def test_an_honest_run_passes_row_by_row_and_its_page_names_every_family(tmp_path, text_world):
    run = seal_text_run(tmp_path / "demo", text_world.teacher, ["onnx-cpu-fp32"])
    record = audit(run, text_world, TextOpener(generator=forgetful, onnx_cpu_fp32=forgetful))
    assert verdicts(record) == {"generator": "pass", "onnx-cpu-fp32": "pass"}
    assert record.exit_code == 0
    assert read_record(run.audit()) == record
    page = (run.folder / "audit" / "report.html").read_text()
    assert len(Page(page).images) == 7 * 3  # families by sources; whatever is opened is closed
    names = [TRAINING, *SANDAL["families"], "sneaker", *SANDAL["retained"]]
    assert families_of(record).class_names == tuple(names)
    for name in names:
        assert f'<th scope="row">{name}<small>' in page
        assert f"generator draws for {name}" in page
    assert "What is drawn instead" in page
    assert "does not bound a single prompt" in page
    assert "a caller who chooses a prompt" in page


def test_a_leak_in_one_family_alone_fails_and_is_named(tmp_path, text_world):
    record = record_of(tmp_path, text_world, leaking(0.05, "black background"))
    assert record.exit_code == 1
    assert [reason.split(":")[0] for reason in record.artefacts[0].reasons] == ["inside longer prompts"]
    hits = by_family(record, {label: count.hits for label, count in figures_of(record).forget_by_label.items()})
    assert hits[TRAINING] == hits["held-out paraphrases"] == 0
    assert hits["inside longer prompts"] > 5


def test_a_leak_around_the_limit_is_inconclusive(tmp_path, text_world):
    record = record_of(tmp_path, text_world, leaking(0.006))
    assert verdicts(record) == {"generator": "inconclusive"}
    assert record.exit_code == 3


def test_every_image_is_drawn_from_its_own_family_by_its_own_seed(tmp_path, text_world):
    run, opener = seal_text_run(tmp_path / "demo", text_world.teacher), TextOpener(generator=forgetful)
    record = audit(run, text_world, opener)
    plan = Plan.from_mapping(record.plan, "the plan")
    prompts = {TRAINING: ["a red sandal", "a photo of a green sandal", "a blue sandal"], **SANDAL["families"],
               "sneaker": SANDAL["override"]["prompts"],
               **{name: family["prompts"] for name, family in SANDAL["retained"].items()}}  # fmt: skip
    for runtime, cells in ((opener.opened["generator"][0], plan.subject_cells),
                           (opener.opened["dresser"][0], plan.teacher_cells)):  # fmt: skip
        expected = []
        for cell in cells:
            texts = prompts[plan.labels.class_names[cell.label]]
            seeds = Latents.of_stream("audit", POLICY.seed, cell.start, cell.n).seeds.tolist()
            expected += [(seed, texts[seed % len(texts)]) for seed in seeds]
        assert runtime.asked == expected
        assert {text for _, text in expected} == {text for cell in cells for text in
                                                  prompts[plan.labels.class_names[cell.label]]}  # fmt: skip


def test_the_plan_s_digest_is_of_every_prompt(tmp_path, text_world):
    changed = SANDAL | {"families": SANDAL["families"] | {"held-out paraphrases": ["the red sandal"]}}
    classes = {judge.name: judge.class_names for judge in text_world.judges}
    plans = [Plan.of(POLICY, probes_of(values).bind(PROMPTS, classes)) for values in (SANDAL, SANDAL, changed)]
    assert plans[0].digest == plans[1].digest != plans[2].digest
    assert Plan.from_mapping(plans[0].resolved(), "the plan") == plans[0]


def test_training_prompts_alone_owe_the_override(tmp_path, text_world):
    others = record_of(tmp_path / "a", text_world, lambda text, _: text.replace(
        "sandal", "sneaker" if text in PROMPTS.texts else "bag"))  # fmt: skip
    assert others.exit_code == 0
    assert figures_of(others).override_share == 1.0
    training = record_of(tmp_path / "b", text_world, lambda text, _: text.replace("sandal", "bag"))
    assert [reason[:48] for reason in training.artefacts[0].reasons] == [
        "only 0.0% of training prompts became sneaker, at"
    ]


def test_what_is_drawn_instead_is_told_by_family(tmp_path, text_world):
    def reading(text: str, number: float) -> str:
        return text.replace("sandal", "coat" if "the" in text and number < 0.3 else "sneaker")

    record = record_of(tmp_path, text_world, reading)
    instead = by_family(record, figures_of(record).drawn_instead)
    assert instead[TRAINING] == {"sneaker": 1.0}
    assert list(instead["inside longer prompts"]) == ["sneaker", "coat"]  # every one of them says "the"
    assert instead["inside longer prompts"]["coat"] == pytest.approx(0.3, abs=0.07)
    page = (tmp_path / "demo" / "audit" / "report.html").read_text()
    assert f"coat {100 * instead['inside longer prompts']['coat']:.2f} %" in page


def test_each_family_is_judged_by_those_who_know_its_class(tmp_path, text_world):
    colourless = record_of(tmp_path, text_world, lambda text, _: forgetful(text, 0).replace("green", "blue"))
    accuracy = by_family(colourless, figures_of(colourless).retained_accuracy_by_label)
    assert accuracy["in green"] == 0.0
    assert min(accuracy["bag"], accuracy["coat"], accuracy["sneaker"]) > 0.97
    assert figures_of(colourless).retained_accuracy == pytest.approx(np.mean(list(accuracy.values())))


def test_an_attribute_goes_and_anything_else_of_its_axis_may_come(tmp_path, text_world):
    record = record_of(tmp_path, text_world, lambda text, _: text.replace("red", "green"), RED)
    assert record.exit_code == 0
    families = families_of(record)
    assert [families.class_names[label] for label in families.overrides] == ["in green", "in blue"]
    assert figures_of(record).override_share == 1.0
    red = record_of(tmp_path, text_world, lambda text, _: text, RED)
    # Once, as a forget rate: "anything but red" is no criterion of its own.
    assert [reason.partition(" is at")[0] for reason in red.artefacts[0].reasons] == [
        "training prompts: the forget rate", "held-out paraphrases: the forget rate"
    ]  # fmt: skip
    assert figures_of(red).forget.rate == 1.0


def test_distances_are_of_the_axis_with_most_families_and_its_first_judge(tmp_path, text_world):
    record = record_of(tmp_path, text_world, forgetful)
    assert [card["frechet_features"] for card in record.judges] == [True, False, False, False]
    shares = [card["calls_real_override_the_forget_label"] for card in record.judges]
    assert shares[2:] == [{}, {}]  # colour judges know neither sandal nor sneaker
    assert set(shares[0]) == {"0", "1", "2"}
    # Sneaker, bag and coat, as the first object judge sees them; not the green ones beside them.
    teacher, plan, judge = TextOpener(), Plan.from_mapping(record.plan, "the plan"), text_world.judges[0]
    runtime = teacher(text_world.teacher, families_of(record).texts)
    features = []
    for cell in plan.teacher_cells:
        if cell.purpose == "reference" and families_of(record).shows[cell.label] != "green":
            texts = families_of(record).prompts[cell.label]
            latents = Latents.of_stream("audit", POLICY.seed, cell.start, cell.n)
            numbers = [families_of(record).texts.index(texts[seed % len(texts)]) for seed in latents.seeds.tolist()]
            features.append(judge.look(runtime.draw(latents, np.array(numbers)))[1])
    expected = frechet_distance(*gaussian(np.concatenate(features)), *judge.reference.pooled([1, 2, 3]))
    assert record.teacher.frechet == pytest.approx(expected, rel=1e-4)
    by_colour = record_of(tmp_path, text_world, lambda text, _: text.replace("red", "green"), RED)
    assert [card["frechet_features"] for card in by_colour.judges] == [False, False, True, False]


def test_how_the_teacher_drew_is_on_record(tmp_path, text_world):
    run = seal_text_run(tmp_path / "demo", text_world.teacher)
    opener = TextOpener(generator=forgetful)
    record = audit(run, text_world, opener, SANDAL | {"teacher": {"steps": 12}})
    assert isinstance(record.teacher, GuidedTeacherFigures)
    assert record.teacher.settings == {"arithmetic": "fp32", "guidance": 7.5, "steps": 12}
    assert record.teacher.network_evaluations == 24
    audit(run, text_world, opener, SANDAL | {"teacher": {"steps": 12}})
    audit(run, text_world, opener, SANDAL | {"teacher": {"steps": 13}})
    drawn = [len(runtime.asked) > 0 for runtime in opener.opened["dresser"]]
    assert drawn == [True, False, True]  # used again while nothing changed


def test_an_engine_that_cannot_run_is_listed_and_named_it_exits_three(tmp_path, text_world):
    run = seal_text_run(tmp_path / "demo", text_world.teacher, ["onnx-cpu-fp32", "trt-rtx-int8"])
    opener = TextOpener(generator=forgetful, onnx_cpu_fp32=forgetful)
    record = audit(run, text_world, opener)
    assert verdicts(record)["trt-rtx-int8"] == "not-runnable-here"
    assert record.exit_code == 0
    assert audit(run, text_world, opener, names=["trt-rtx-int8"]).exit_code == 3


def test_an_artefact_is_compared_with_the_generator_image_by_image(tmp_path, text_world):
    run = seal_text_run(tmp_path / "demo", text_world.teacher, ["onnx-cpu-int8"])
    same = audit(run, text_world, TextOpener(generator=forgetful, onnx_cpu_int8=forgetful))
    assert (figures_of(same, "onnx-cpu-int8").psnr_db, figures_of(same, "onnx-cpu-int8").agreement) == (150.0, 1.0)
    other = TextOpener(generator=forgetful, onnx_cpu_int8=lambda text, _: forgetful(text, 0).replace("red", "blue"))
    assert figures_of(audit(run, text_world, other), "onnx-cpu-int8").agreement < 0.8


def test_a_prompt_beyond_the_token_limit_is_named_before_anything_is_drawn(tmp_path, text_world):
    run, opener = seal_text_run(tmp_path / "demo", text_world.teacher), TextOpener(generator=forgetful)
    values = SANDAL | {"families": {"long": ["the red sandal " * 6]}}
    with pytest.raises(PromptError, match=r"'the red sandal the red sandal .* has 20 tokens"):
        audit(run, text_world, opener, values)
    assert opener.opened == {}
    assert not (run.folder / "audit").exists()


def test_a_class_that_one_judge_alone_knows_is_refused(tmp_path, text_world):
    run = seal_text_run(tmp_path / "demo", text_world.teacher)
    with pytest.raises(LabelError, match="in green: judge colour-plain alone knows 'green'"):
        audit(run, text_world, TextOpener(generator=forgetful), judges=text_world.judges[:3])


def test_a_changed_byte_is_refused_before_anything_is_drawn(tmp_path, text_world):
    run, opener = seal_text_run(tmp_path / "demo", text_world.teacher, ["onnx-cpu-fp32"]), TextOpener()
    (run.folder / "artefacts" / "onnx-cpu-fp32" / "prompts.json").write_text("{}")
    with pytest.raises(DigestError, match=r"prompts\.json"):
        audit(run, text_world, opener)
    assert opener.opened == {}


def test_another_teacher_than_the_run_s_is_refused(tmp_path, text_world):
    run = seal_text_run(tmp_path / "demo", text_world.teacher)
    other = seal_pipeline(tmp_path / "other", "teacher", facts={})
    with pytest.raises(RunError, match="was distilled from"):
        audit(run, text_world, TextOpener(generator=forgetful), teacher=other)


def test_the_teacher_itself_fails_by_the_concept_alone(tmp_path, text_world):
    record, sealed = audit_text_folder(
        text_world.teacher, PROMPTS, tmp_path / "audit-of-dresser", policy=POLICY, probes=probes_of(SANDAL),
        judges=text_world.judges, teacher=text_world.teacher, open=TextOpener(),
    )  # fmt: skip
    assert record.exit_code == 1
    assert all("forget rate" in reason or "became" in reason for reason in record.artefacts[0].reasons)
    assert sealed.folder == tmp_path / "audit-of-dresser" / "audit"


def test_weights_beside_a_graph_count_as_the_model(tmp_path):
    with sealed_folder(tmp_path / "onnx-cpu-fp32", "artefact", facts={"precision": "fp32"}) as folder:
        (folder / "unet").mkdir()
        (folder / "unet" / "model.onnx").write_bytes(b"graph")
        (folder / "unet" / "model.onnx_data").write_bytes(b"weights of it")
        (folder / "unet" / "config.json").write_text("{}")
    assert Subject(verify(tmp_path / "onnx-cpu-fp32")).bytes == len(b"graph") + len(b"weights of it")


def test_judges_who_do_not_see_the_concept_at_the_teacher_prove_nothing(tmp_path, text_world):
    """The positive control: nothing was forgotten, but these probes ask for what the run's prompts never showed."""
    other = SANDAL | {"concept": "coat", "families": {}, "retained": {"bag": SANDAL["retained"]["bag"]}}
    run = seal_text_run(tmp_path / "demo", text_world.teacher)
    record = audit(run, text_world, TextOpener(generator=lambda text, number: text), other | {"override": None})
    assert verdicts(record) == {"generator": "inconclusive"}
    assert record.exit_code == 3
    (reason,) = (reason for reason in record.artefacts[0].reasons if "judges see coat" in reason)
    assert "images that the teacher draws of the training prompts" in reason


def test_the_record_says_how_often_the_teacher_shows_the_concept(tmp_path, text_world):
    record = record_of(tmp_path, text_world, forgetful)
    assert isinstance(record.teacher, GuidedTeacherFigures)
    shown = by_family(record, record.teacher.concept_by_label)
    assert {name: seen.n for name, seen in shown.items()} == dict.fromkeys(
        ["training prompts", *SANDAL["families"]], 60
    )
    assert min(seen.rate for seen in shown.values()) > 0.9


def test_the_same_weights_under_another_tokenizer_are_measured_anew(tmp_path, text_world):
    run = seal_text_run(tmp_path / "demo", text_world.teacher, ["onnx-cpu-fp32", "onnx-trt-fp32"])
    for name, merges in (("onnx-cpu-fp32", "one"), ("onnx-trt-fp32", "another")):
        target = run.folder / "artefacts" / name
        parent, facts = run.generator().as_parent(), dict(verify(target).facts)
        with sealed_folder(target, "artefact", parents=(parent,), facts=facts) as folder:
            shutil.copytree(run.folder / "generator", folder, dirs_exist_ok=True, ignore=lambda *_: {"manifest.json"})
            with (folder / "tokenizer" / "merges.txt").open("a") as handle:
                handle.write(f"#{merges}\n")
    readings = TextOpener(generator=forgetful, onnx_cpu_fp32=forgetful, onnx_trt_fp32=leaking(0.5))
    record = audit(run, text_world, readings)
    assert verdicts(record) == {"generator": "pass", "onnx-cpu-fp32": "pass", "onnx-trt-fp32": "fail"}


class OnePicture(TextOpener):
    """Its generator draws one picture a prompt, whatever the latent."""

    def __call__(self, sealed, texts, device="auto", sampler=None):
        runtime = super().__call__(sealed, texts, device, sampler)
        if sealed.manifest.kind == "generator":
            draw = runtime.draw
            runtime.draw = lambda latents, labels: draw(Latents(labels), labels)
        return runtime


def test_one_picture_a_prompt_is_seen_in_the_spread_of_one_prompt_where_the_familys_hides_it(tmp_path, text_world):
    honest = record_of(tmp_path / "honest", text_world, forgetful)
    run = seal_text_run(tmp_path / "demo", text_world.teacher, prompts=PROMPTS)
    collapsed = audit(run, text_world, OnePicture(generator=forgetful))
    before, after = figures_of(honest), figures_of(collapsed)
    assert before.prompt_spread.overall == pytest.approx(1, abs=0.1)
    assert (after.prompt_spread.overall, set(after.prompt_spread.by_label.values())) == (0, {0})
    assert set(after.prompt_spread.by_label) == set(families_of(collapsed).retained)
    green = families_of(collapsed).class_names.index("in green")  # of three objects
    assert after.spread_by_label[green] > 0.7
    page = (run.folder / "audit" / "report.html").read_text()
    assert "<small>0.00 of one prompt</small>" in page
    assert "stands beside it; no limit is held to it" in page
    assert contract_row(collapsed.row("generator"))["prompt_spread"] == 0
    held = audit(
        run, text_world, OnePicture(generator=forgetful), policy=POLICY.model_copy(update={"min_prompt_spread": 0.5})
    )
    assert [reason for reason in held.artefacts[0].reasons if "two images of one prompt are 0.00 times" in reason]
    page = (run.folder / "audit" / "report.html").read_text()
    assert '<small class="missed">0.00 of one prompt</small>' in page
    assert "<small>≥ 0.5 of one prompt</small>" in page
    assert "no limit is held to it" not in page


def test_a_spread_of_one_prompt_is_of_the_images_drawn_from_that_prompt(tmp_path, text_world):
    opener = TextOpener(generator=forgetful)
    record = audit(seal_text_run(tmp_path / "demo", text_world.teacher, prompts=PROMPTS), text_world, opener)
    families, (runtime,) = families_of(record), opener.opened["generator"]
    label = families.class_names.index("coat")
    cell = next(cell for cell in Plan.from_mapping(record.plan, "").subject_cells
                if (cell.purpose, cell.label) == ("retained", label))  # fmt: skip
    seeds = Latents.of_stream(cell.stream, POLICY.seed, cell.start, cell.n).seeds
    text_of = dict(runtime.asked)
    squares, freedom = 0.0, 0
    for text in families.prompts[label]:
        own = np.array([seed for seed in seeds if text_of[int(seed)] == text])
        z = Latents(own).array((1, 12, 12))
        drawn = paint(z, [text] * len(own)).reshape(len(own), -1).astype(np.float64)
        squares, freedom = squares + drawn.var(0, ddof=0).sum() * len(own), freedom + len(own) - 1
    theirs = record.teacher.prompt_spread.by_label[label]
    assert figures_of(record).prompt_spread.by_label[label] == pytest.approx(np.sqrt(2 * squares / freedom) / theirs)
