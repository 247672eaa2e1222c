from __future__ import annotations

import base64
import io
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sfd_deploy.audit.report import LABELS_SHOWN, data_uri, not_established, render
from sfd_deploy.audit.stage import audit_run
from sfd_deploy.evidence import AuditRecord
from sfd_deploy.labels import Labels
from sfd_deploy.runtime.seam import to_uint8
from tests.audit.toy import POLICY, Opener, World, forgetful, holed, leaking, rough, seal_artefact, seal_run

VOID = {"meta", "img", "br", "link", "input", "hr"}


class Page(HTMLParser):
    """Parses a page and refuses tags that do not nest."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.images: list[dict[str, str | None]] = []
        self.tags: set[str] = set()
        self.references: list[str] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        found = dict(attrs)
        if tag == "img":
            self.images.append(found)
        self.references += [value for key, value in attrs if key in {"src", "href", "srcset", "action"} and value]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


@pytest.fixture(scope="module")
def audited(tmp_path_factory: pytest.TempPathFactory, world: World) -> tuple[AuditRecord, str]:
    """A record with every kind of row, and its page."""
    run = seal_run(tmp_path_factory.mktemp("report") / "demo", world.teacher, ["onnx-cpu-fp32", "onnx-trt-int8"])
    seal_artefact(run, "onnx-cpu-fp16", b"graph", arithmetic="fp32")
    seal_artefact(run, "onnx-cpu-int8", b"holes")
    seal_artefact(run, "trt-rtx-int8", b"plan", parent=run.artefact("onnx-trt-int8"))
    opener = Opener(generator=forgetful, onnx_cpu_fp32=leaking(0.05), onnx_trt_int8=rough, onnx_cpu_fp16=forgetful,
                    onnx_cpu_int8=holed)  # fmt: skip
    record, sealed = audit_run(run, policy=POLICY, judges=world.judges, teacher=world.teacher, open=opener)
    return record, (sealed.folder / "report.html").read_text(encoding="utf-8")


def test_the_page_stands_alone_and_runs_nothing(audited):
    page = Page(audited[1])
    assert all(reference.startswith("data:image/png;base64,") for reference in page.references)
    assert page.tags.isdisjoint({"script", "link", "iframe", "object", "embed"})
    assert "url(" not in audited[1]
    assert "@import" not in audited[1]


def test_every_source_has_a_picture_of_every_label_with_words_for_who_cannot_see_it(audited):
    images = Page(audited[1]).images
    sources = ["teacher (reference)", "generator", "onnx-cpu-fp32", "onnx-cpu-fp16", "onnx-cpu-int8", "onnx-trt-int8"]
    assert len(images) == 4 * len(sources)
    for source in sources:
        assert sum(source in (image["alt"] or "") for image in images) == 4


def test_pictures_are_the_images_that_were_drawn():
    images = np.random.default_rng(0).uniform(-1, 1, (8, 1, 12, 12)).astype(np.float32)
    raw = base64.b64decode(data_uri(images).removeprefix("data:image/png;base64,"))
    pixels = np.asarray(Image.open(io.BytesIO(raw)))
    assert pixels.shape == (2 * 12 + 1, 4 * 12 + 3)
    assert np.array_equal(pixels[13:25, 39:51], to_uint8(images)[7, 0])


def test_large_pictures_are_made_smaller():
    raw = base64.b64decode(data_uri(np.zeros((8, 3, 256, 256), np.float32)).removeprefix("data:image/png;base64,"))
    assert Image.open(io.BytesIO(raw)).width == 256


def test_verdicts_bounds_digests_and_limits_are_on_the_page(audited):
    record, text = audited
    for row in record.artefacts:
        assert row.name in text
        assert row.digest in text
        if row.figures is not None:
            assert f"{100 * row.figures.forget.upper:.2f} %" in text
    for digest in (
        record.policy_digest,
        record.plan_digest,
        record.teacher.digest,
        *(j["digest"] for j in record.judges),
    ):
        assert digest in text
    assert {"pass", "fail", "not-runnable-here"} <= set(re.findall(r'class="badge ([a-z-]+)"', text))
    assert "At least one audited artefact failed." in text


def test_only_what_keeps_a_row_from_passing_is_marked(audited):
    record, text = audited
    marked = re.findall(r'<td class="missed">([^<]+)<', text)
    leaky = record.row("onnx-cpu-fp32")
    assert leaky is not None
    assert leaky.figures is not None
    assert marked == [f"{100 * leaky.figures.forget.upper:.2f} %", f"{leaky.figures.agreement:.3f}"]


def test_what_was_not_established_is_said_for_the_rows_it_concerns(audited):
    record, text = audited
    gaps = not_established(record, POLICY)
    assert any("trt-rtx-int8" in gap and "could not run" in gap for gap in gaps)
    assert any("onnx-cpu-fp16" in gap and "arithmetic" in gap for gap in gaps)
    assert "The engine itself was NOT audited. The graph it was built from is onnx-trt-int8" in text
    for always in ("T0", "standard-normal latents", "no judge counts"):
        assert any(always in gap for gap in gaps)


def test_a_clean_record_claims_no_gap_that_it_does_not_have(tmp_path, world):
    run = seal_run(tmp_path / "demo", world.teacher, ["onnx-cpu-fp32"])
    opener = Opener(generator=forgetful, onnx_cpu_fp32=forgetful)
    record, sealed = audit_run(run, policy=POLICY, judges=world.judges, teacher=world.teacher, open=opener)
    assert not any("could not run" in gap or "arithmetic" in gap for gap in not_established(record, POLICY))
    text = (sealed.folder / "report.html").read_text()
    assert "Every audited artefact passed." in text
    assert 'class="missed"' not in text


def test_names_are_text_never_markup(audited):
    record, _ = audited
    names = ("<img src=x>", "a&b", '"c"', "falling")
    plan = record.plan | {"labels": Labels(class_names=names, forget={1: 3}).resolved()}
    spoilt = record.model_copy(update={"run": "<script>alert(1)</script>", "plan": plan})
    text = render(spoilt, {})
    assert "<script" not in text
    assert "<img src=x" not in text
    assert "&lt;script&gt;" in text


def test_many_labels_are_cut_to_a_page_that_keeps_the_forgotten_and_its_override(audited):
    record, _ = audited
    names = tuple(f"class-{label}" for label in range(40))
    one = record.artefacts[0]
    assert one.figures is not None
    spread = dict.fromkeys((label for label in range(40) if label != 37), 1.0)
    figures = one.figures.model_copy(update={
        "forget_by_label": {37: one.figures.forget}, "override_share_by_label": {37: 1.0},
        "retained_accuracy_by_label": spread, "spread_by_label": spread,
    })  # fmt: skip
    judge = record.judges[0] | {"calls_real_override_the_forget_label": {"37": 0.0}}
    wide = record.model_copy(update={
        "plan": record.plan | {"labels": Labels(class_names=names, forget={37: 39}).resolved()},
        "artefacts": (one.model_copy(update={"figures": figures}),), "judges": (judge,),
        "teacher": record.teacher.model_copy(update={"accuracy_by_label": spread}),
    })  # fmt: skip
    images = {label: np.zeros((8, 1, 12, 12), np.float32) for label in range(40)}
    shown = [str(image["alt"]) for image in Page(render(wide, {"generator": images})).images]
    assert len(shown) == LABELS_SHOWN
    assert {"8 images that generator draws for class-37", "8 images that generator draws for class-39"} <= set(shown)


def test_the_template_travels_with_the_package():
    import sfd_deploy.audit

    assert (Path(sfd_deploy.audit.__file__).parent / "report.html.j2").is_file()
