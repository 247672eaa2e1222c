"""The judges of an audit, and which of their classes a label's images should be called."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray

from sfd_deploy.audit.samples import Samples, Seen
from sfd_deploy.errors import ConfigError
from sfd_deploy.labels import Labels
from sfd_deploy.measure.judges import FeatureStatistics, Judge, require_same_classes
from sfd_deploy.policy.plan import Purpose
from sfd_deploy.probes import Families

CALLED_MOST = 3


@dataclass(frozen=True)
class Panel:
    """Judges who know all labels' classes, or each those of some.

    ``classes`` (judges, labels) is what a judge numbers a label's class, -1 where it knows none such;
    ``extractor`` the judge whose features distances are taken of.
    """

    judges: tuple[Judge, ...]
    classes: NDArray[np.int64]
    extractor: int = 0

    @classmethod
    def of_labels(cls, judges: Sequence[Judge], labels: Labels, owner: str) -> Self:
        """Judges of a model's own classes.

        Raises:
            ConfigError: fewer than two judges.
            LabelError: a judge that knows other classes.
        """
        if len({judge.digest for judge in judges}) < 2:
            raise ConfigError(
                "an audit takes two different judges: a hit is what either of them says", "give --judge twice"
            )
        require_same_classes(judges, labels.class_names, owner)
        return cls(tuple(judges), np.tile(np.arange(labels.count), (len(judges), 1)))

    @classmethod
    def of_families(cls, judges: Sequence[Judge], families: Families) -> Self:
        """Judges of what families show; features are the first one's of those who know most retained families."""
        classes = np.array([
            [judge.class_names.index(shown) if shown in judge.class_names else -1 for shown in families.shows]
            for judge in judges
        ])  # fmt: skip
        known = (classes[:, families.retained] >= 0).sum(1)
        return cls(tuple(judges), classes, int(known.argmax()))

    @property
    def real(self) -> FeatureStatistics:
        """The extractor's features on real images, by label; of labels that it does not know they mean nothing."""
        statistics, rows = self.judges[self.extractor].reference, self.classes[self.extractor]
        return FeatureStatistics(statistics.mean[rows], statistics.covariance[rows])

    def look(self, samples: Samples) -> Seen:
        """Show every image to every judge."""
        views = [judge.look(samples.images) for judge in self.judges]
        called = np.stack([labels for labels, _ in views])
        return Seen(samples, called, views[self.extractor][1], self.classes, self.extractor)

    def called_most(self, seen: Seen, purpose: Purpose, label: int) -> dict[str, float]:
        """What the first judge of a label's class calls a cell's images: the three commonest classes, their shares."""
        row = int((self.classes[:, label] >= 0).argmax())
        called = seen.called[row, seen.samples.rows(purpose, label)]
        names = self.judges[row].class_names
        counts = np.bincount(called, minlength=len(names))
        most = np.argsort(-counts, kind="stable")[:CALLED_MOST].tolist()
        return {names[number]: int(counts[number]) / len(called) for number in most if counts[number]}
