from __future__ import annotations

import pytest

from sfd_deploy.errors import LabelError
from sfd_deploy.labels import Labels

LABELS = Labels(class_names=("T-shirt/top", "Trouser", "Pullover", "Bag"))


def test_names_and_numbers_mean_the_same_label():
    assert LABELS.find("trouser") == LABELS.find("1") == LABELS.find(1) == 1


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
