"""The teacher study: rows differ in what they say and in nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from common.config import load_recipe
from simulations.benchmark.teachers import ROWS, Row, Study, StudyTeacher, study, table

SETTINGS = ["teacher.steps=1", "evaluation.overlap=0", "run.rounds=1"]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Study:
    folder: Path = tmp_path_factory.mktemp("study")
    return Study.prepare(load_recipe("smoke", SETTINGS), folder)


def parts(row: Row, prepared: Study) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    network = StudyTeacher(row, prepared.pool.plan, seed=4).network
    state = {key.replace(".base_layer", ""): value.clone() for key, value in network.state_dict().items()}
    own = {key: value for key, value in state.items() if "lora_" not in key}
    encoder = {key: value for key, value in own.items() if key.startswith("encoder")}
    return encoder, {key: value for key, value in own.items() if key.startswith("decoder")}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def test_a_row_keeps_the_parts_it_names_and_starts_the_others_afresh(prepared: Study) -> None:
    whole = parts(Row("whole"), prepared)
    for row in (
        Row("again"),
        Row("a", encoder=False),
        Row("b", decoder=False),
        Row("c", encoder=False, decoder=False),
    ):
        encoder, decoder = parts(row, prepared)
        assert same(encoder, whole[0]) is row.encoder
        assert same(decoder, whole[1]) is row.decoder


def test_a_decoder_of_one_scale_reads_no_taps(prepared: Study) -> None:
    _, decoder = parts(Row("one", decoder=False, multi_scale=False), prepared)
    assert not [key for key in decoder if "laterals" in key]
    _, decoder = parts(Row("several", decoder=False), prepared)
    assert [key for key in decoder if "laterals" in key]


def test_a_row_without_steps_trains_nothing_and_the_table_has_every_row() -> None:
    rows = [ROWS[0], ROWS[2]]
    found = study("smoke", SETTINGS, [0], rows)
    assert found[rows[0].name]["trained"] == [0.0]
    assert found[rows[1].name]["trained"][0] > 0
    assert all(0 <= value <= 1 for value in found[rows[0].name]["all"])
    assert [line.split(" | ")[0] for line in table(found).splitlines()[2:]] == [
        f"| {row.name}" for row in rows
    ]


def test_rows_have_names_of_their_own() -> None:
    assert len({row.name for row in ROWS}) == len(ROWS)
