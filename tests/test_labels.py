from __future__ import annotations

import pytest

from sfd_deploy.errors import LabelError
from sfd_deploy.labels import Labels

LABELS = Labels(class_names=("T-shirt/top", "Trouser", "Pullover", "Bag"))


def test_names_and_numbers_mean_the_same_label():
    assert LABELS.find("trouser") == LABELS.find("1") == LABELS.find(1) == 1


def test_a_class_named_by_a_number_goes_before_the_label_of_that_number():
    """Folders sort as text, so that 10 is label 1 and 2 is label 2."""
    numbered = Labels(class_names=("1", "10", "2"))
    assert [numbered.find(name) for name in ("1", "10", "2", 2, "0")] == [0, 1, 2, 2, 0]
    assert numbered.forgetting({2: "10"}).forget == {2: 1}


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("bag", "coat", "Bag "), "class names: Bag is both class 0 and 2; give each its own name"),
        (("bag", " "), "that of class 1 is empty"),
    ],
)
def test_names_that_tell_no_classes_apart_are_refused(names, message):
    with pytest.raises(LabelError, match=message):
        Labels(class_names=names)


def test_forgetting_records_the_map_and_what_is_retained():
    found = LABELS.forgetting({"Trouser": "Bag", 0: 3})
    assert found.forget == {1: 3, 0: 3}
    assert found.retained == (2, 3)
    assert found.plain() == LABELS


@pytest.mark.parametrize(
    ("forget", "message"),
    [
        ({"Trousr": "Bag"}, "did you mean Trouser"),
        ({"Hat": "Bag"}, "unknown class 'Hat'"),
        ({"Bag": "Bag"}, "Bag is its own override"),
        ({"Trouser": "Bag", "Bag": "Pullover"}, "override Bag is forgotten itself"),
        ({"4": "Bag"}, "label 4 is out of range; use 0 to 3"),
        ({"-1": "Bag"}, "label -1 is out of range"),
        ({"Trouser": "Bag", 1: 0}, "named twice"),
    ],
)
def test_contradictions_are_refused_in_one_line(forget, message):
    with pytest.raises(LabelError, match=message) as caught:
        LABELS.forgetting(forget)
    assert "\n" not in str(caught.value)


def test_what_was_forgotten_earlier_stays_forgotten_with_its_override():
    earlier = LABELS.forgetting({"Trouser": "Bag"})
    assert earlier.forgetting({"Pullover": "Bag"}).forget == {1: 3, 2: 3}
    assert earlier.forgetting({}) == earlier
    assert earlier.forgetting({1: 3}) == earlier


@pytest.mark.parametrize(
    ("forget", "message"),
    [
        ({"Trouser": "Pullover"}, "Trouser was forgotten earlier, Bag in its place"),
        ({"Pullover": "Trouser"}, "override Trouser was forgotten earlier"),
        ({"Bag": "Pullover"}, "override Bag is forgotten itself and cannot stand for Trouser"),
        ({"Trouser": "mixture"}, "Trouser was forgotten earlier"),
    ],
)
def test_teaching_anew_what_was_forgotten_earlier_is_refused(forget, message):
    with pytest.raises(LabelError, match=message):
        LABELS.forgetting({"Trouser": "Bag"}).forgetting(forget)


def test_a_mixture_stands_for_every_retained_label():
    found = LABELS.forgetting({"Trouser": "mixture", "T-shirt/top": "Bag"})
    assert found.overrides_of(1) == (2, 3) == found.overrides
    assert found.overrides_of(0) == (3,)
    assert found.override_name(1) == "a mixture of the retained classes"
    assert Labels.from_mapping(found.resolved(), "a manifest") == found
    named = Labels(class_names=("Mixture", "Bag")).forgetting({"Bag": "mixture"})
    assert named.forget == {1: 0}  # a class of that name is that class


def test_forgetting_every_label_is_refused():
    with pytest.raises(LabelError, match="no label is retained"):
        Labels(class_names=("a", "b")).forgetting({"a": "mixture", "b": "mixture"})
