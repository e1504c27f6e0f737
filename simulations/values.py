"""Each site's test patients' values of every model: ``SITE/values.json``, in a simulation alone.

They are what paired tests need and what no mean can give back. The file lies in the folder of the site whose
patients they are of, for its owner to read alone; no message knows of it. Patients stand in the order of the
site's test split, without their names.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from common.durable import write_atomic
from common.errors import ArtefactError
from common.plan import rebuild

FILE = "values.json"
Values = Mapping[str, Mapping[str, NDArray[np.float64]]]  # metric -> class -> one value a patient


@dataclass(frozen=True)
class Column:
    """One model's values on one site's test patients; None where a patient has no defined value.

    ``trained_at``: the site whose model it is; of a model that is one for all, each site in turn.
    """

    model: str
    trained_at: str
    metric: str
    class_name: str
    values: list[float | None]


@dataclass(frozen=True)
class SiteValues:
    site: str
    run_id: str
    seed: int
    columns: list[Column]

    def save(self, folder: Path) -> None:
        """Raises ``ArtefactError`` if the disk is full."""
        path = folder / FILE
        write_atomic(path, json.dumps(asdict(self), allow_nan=False).encode())
        path.chmod(0o600)

    @classmethod
    def load(cls, folder: Path) -> SiteValues:
        """Raises ``ArtefactError`` if ``folder`` holds no such file of this version."""
        path = folder / FILE
        try:
            found = rebuild(cls, json.loads(path.read_text()))
        except OSError as error:
            raise ArtefactError(
                f"there is no {path}: simulate the run again, it is written at its end"
            ) from error
        except (ValueError, TypeError, KeyError) as error:
            raise ArtefactError(f"{path} is no file of patients' values of this version: {error}") from error
        assert isinstance(found, cls)
        return found


def columns_of(model: str, trained_at: str, values: Values) -> list[Column]:
    return [
        Column(model, trained_at, metric, name, [None if math.isnan(v) else float(v) for v in column])
        for metric, by_class in values.items()
        for name, column in by_class.items()
    ]
