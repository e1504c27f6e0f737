"""The command line as a user runs it: helps, exit codes, JSON, and what an error says."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import click
import numpy as np
import pytest
from click.testing import CliRunner, Result
from PIL import Image

from common import config, progress
from common.errors import BudgetExceeded, FederationError
from tests.architecture.sources import ROOT
from tests.e2e.walks import AS_A_USER
from wardround import main

HEAVY = ("torch", "flwr", "omegaconf", "monai", "transformers", "diffusers", "peft", "ray", "numpy", "rich")


def command_paths(command: click.Command, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    yield path
    if isinstance(command, click.Group):
        for name, inner in command.commands.items():
            yield from command_paths(inner, (*path, name))


PATHS = sorted(command_paths(main))


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Each command runs in an empty folder, and defect reports go there too."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    yield
    progress.configure()


def run(*arguments: str) -> Result:
    return CliRunner().invoke(main, list(arguments))


def wardround(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "wardround", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)


def test_the_published_commands_are_there() -> None:
    published = {
        "demo", "simulate", "recipes", "validate", "report", "data check", "data describe", "teacher list",
        "teacher info", "teacher import", "student predict", "student evaluate", "doctor",
        "privacy plan", "privacy curve", "privacy verify", "privacy policy new", "privacy policy sign",
        "privacy policy show", "privacy policy check", "privacy ledger show", "privacy ledger checkpoint",
        "privacy ledger merge", "site init", "site join", "site node", "site guard", "consortium init",
        "consortium renew", "consortium add", "consortium kit", "consortium remove", "consortium members",
        "consortium serve",
    }  # fmt: skip
    assert published <= {" ".join(path) for path in PATHS}


@pytest.mark.parametrize("path", PATHS, ids=" ".join)
def test_every_help_has_an_example(path: tuple[str, ...]) -> None:
    result = run(*path, "--help")
    assert result.exit_code == 0
    assert "Example" in result.output
    assert f"wardround {path[0]}" in result.output if path else "wardround demo" in result.output


def test_no_help_loads_torch() -> None:
    """Every help in one process, which then names the heavy modules that it has loaded."""
    script = (
        "import json, sys, time\n"
        "from wardround import main\n"
        "for path in json.loads(sys.argv[1]):\n"
        "    try: main([*path, '--help'], prog_name='wardround')\n"
        "    except SystemExit as end: assert end.code == 0\n"
        "print(json.dumps(sorted(set(sys.modules) & set(json.loads(sys.argv[2])))), file=sys.stderr)\n"
    )
    command = [sys.executable, "-c", script, json.dumps(PATHS), json.dumps(HEAVY)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=True)
    assert json.loads(result.stderr) == []


def test_python_m_wardround_is_the_command() -> None:
    result = wardround("recipes")
    assert result.returncode == 0
    names = [line.split()[0] for line in result.stdout.splitlines()]
    assert names == ["demo", "five", "nuclei", "nuclei-dp", "phantom-dp", "retina", "smoke", "speckle"]


@pytest.mark.parametrize(
    "arguments",
    [
        "nothing",
        "simulate",
        "recipes --no-such",
        "data check",
        "simulate demo --engine x",
        "student predict a b",
    ],
)
def test_a_wrong_call_exits_with_2(arguments: str) -> None:
    assert run(*arguments.split()).exit_code == 2


def test_an_unknown_recipe_exits_with_10_and_names_the_nearest() -> None:
    result = run("simulate", "dmo")
    assert result.exit_code == 10
    assert "did you mean demo?" in result.stderr
    assert not result.stdout


def test_five_faults_give_five_lines_and_exit_10() -> None:
    wrong = [
        "run.roundz=3",
        "run.threads=two",
        "run.engine=lopback",
        "data.image_size=70",
        "student.temperature=0",
    ]
    result = run("simulate", "demo", *wrong)
    assert result.exit_code == 10
    assert len([line for line in result.stderr.splitlines() if line.startswith("  - ")]) == 5
    assert not Path("runs").exists()


def test_a_missing_data_root_exits_with_10_and_says_how_to_give_it() -> None:
    result = run("simulate", "retina")
    assert result.exit_code == 10
    assert "add data.root=FOLDER" in result.stderr
    result = run("simulate", "nuclei", "data.root=nowhere")
    assert result.exit_code == 10
    assert f"there is no folder {Path.cwd() / 'nowhere'}" in result.stderr


def test_validate_checks_every_recipe_and_notes_what_it_could_not() -> None:
    result = run("validate")
    assert result.exit_code == 0
    assert "demo: in order\n" in result.output
    assert "retina: in order; its images were not looked for: it needs data.root=FOLDER\n" in result.output


def test_validate_lists_the_faults_of_all_recipes_at_once() -> None:
    Path("mine.yaml").write_text("run: {rounds: 0}\n")
    result = run("validate", "mine.yaml", "smoke", "nowhere", "student.temperature=0")
    assert result.exit_code == 10
    lines = [line for line in result.stderr.splitlines() if line.startswith("  - ")]
    assert len(lines) == 5  # two of mine, and its sites; one of smoke; and no such recipe
    assert sum("student.temperature" in line for line in lines) == 2
    assert "smoke: 1 fault(s)" in result.stdout


def test_validate_as_json_prints_one_document_and_nothing_else() -> None:
    result = run("validate", "smoke", "run.rounds=0", "--json")
    assert result.exit_code == 10
    assert json.loads(result.stdout)["smoke"]["faults"] == [
        "override: run.rounds: 0 is out of range; it must be at least 1"
    ]


@pytest.mark.parametrize(
    "arguments", [("recipes",), ("teacher", "list"), ("teacher", "info", "ward-sam-tiny")]
)
def test_json_is_one_document_on_standard_output(arguments: tuple[str, ...]) -> None:
    result = run(*arguments, "--json")
    assert result.exit_code == 0
    assert json.loads(result.stdout)
    plain = run(*arguments)
    assert plain.exit_code == 0
    with pytest.raises(json.JSONDecodeError):
        json.loads(plain.stdout)


def test_an_unknown_teacher_exits_with_12() -> None:
    result = run("teacher", "info", "sam-huge")
    assert result.exit_code == 12
    assert "ward-sam-tiny" in result.stderr


def test_doctor_finds_this_machine_in_order() -> None:
    result = run("doctor", "--json")
    assert result.exit_code == 0, result.stderr
    document = json.loads(result.stdout)
    assert document["healthy"]
    subjects = {finding["subject"] for finding in document["findings"]}
    assert {
        "python",
        "torch",
        "memory",
        "loopback port",
        "package common",
        "weights ward-sam-tiny",
    } <= subjects


def test_doctor_names_cause_and_fix_of_what_is_wrong_and_exits_with_10(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "ward-sam-tiny.json").write_text('{"sha256": "0"}')
    (tmp_path / "ward-sam-tiny.safetensors").write_bytes(b"damaged")
    from common import checkpoints

    monkeypatch.setattr(checkpoints, "FOLDER", tmp_path)
    checkpoints.card.cache_clear()
    result = run("doctor")
    checkpoints.card.cache_clear()
    assert result.exit_code == 10
    assert "weights of ward-sam-tiny are not those of its card" in result.stderr
    assert "fix: git checkout -- common/checkpoints" in result.stdout


def manifest_with(label: int) -> Path:
    folder = Path("data")
    folder.mkdir()
    rng = np.random.default_rng(0)
    rows = ["image,mask,patient"]
    for number in range(4):
        Image.fromarray(rng.integers(0, 255, (32, 32), dtype=np.uint8)).save(folder / f"{number}.png")
        mask = np.zeros((32, 32), np.uint8)
        mask[4:12, 4:12] = label
        Image.fromarray(mask).save(folder / f"{number}-mask.png")
        rows.append(f"{number}.png,{number}-mask.png,p{number}")
    (folder / "manifest.csv").write_text("\n".join(rows) + "\n")
    return folder / "manifest.csv"


def test_data_check_passes_a_good_manifest_and_describe_counts_it() -> None:
    manifest = str(manifest_with(255))
    assert run("data", "check", manifest).exit_code == 0
    assert json.loads(run("data", "check", manifest, "--json").stdout)
    described = json.loads(run("data", "describe", manifest, "--json").stdout)
    assert (described["patients"], described["images"]) == (4, 4)


def test_data_check_of_an_undeclared_label_exits_with_11() -> None:
    manifest = str(manifest_with(7))
    result = run("data", "check", manifest)
    assert result.exit_code == 11
    assert len([line for line in result.stderr.splitlines() if line.startswith("  - ")]) == 4
    as_json = run("data", "check", manifest, "--json")
    assert as_json.exit_code == 11
    assert json.loads(as_json.stdout)
    assert run("data", "check", manifest, "--label", "7").exit_code == 0
    assert run("data", "check", manifest, "--label", "7", "--min-patients", "99").exit_code == 11


def test_a_manifest_that_is_not_there_exits_with_11() -> None:
    assert run("data", "check", "nowhere.csv").exit_code == 11
    assert run("data", "describe", "nowhere.csv").exit_code == 11


def test_a_student_predicts_and_is_measured() -> None:
    from client.students import build_student, save_student
    from common.recipe import DataConfig

    data, about = DataConfig(image_size=64), {"run_id": "run", "model": "student"}
    student = build_student("unet-xs", data, pretrained=True, seed=0)
    save_student(student, Path("student.safetensors"), "unet-xs", data, about)
    manifest = manifest_with(255)
    images = Path("images")
    images.mkdir()
    (manifest.parent / "0.png").rename(images / "0.png")
    predicted = run("student", "predict", "student.safetensors", "images", "--out", "masks", "--json")
    assert predicted.exit_code == 0, predicted.stderr
    assert [Path(path).name for path in json.loads(predicted.stdout)["masks"]] == ["0.png"]
    with Image.open("masks/0.png") as mask:
        assert mask.size == (32, 32)
    (images / "0.png").rename(manifest.parent / "0.png")
    measured = run("student", "evaluate", "student.safetensors", str(manifest), "--json")
    assert measured.exit_code == 0, measured.stderr
    assert {entry["metric"] for entry in json.loads(measured.stdout)} == {"dice", "hd95", "nsd"}
    assert "dice" in run("student", "evaluate", "student.safetensors", str(manifest)).stdout


def test_a_student_that_is_not_there_exits_with_12() -> None:
    Path("images").mkdir()
    assert run("student", "predict", "none.safetensors", "images", "--out", "masks").exit_code == 12


def test_a_report_that_is_not_there_exits_with_12() -> None:
    result = run("report", "nowhere")
    assert result.exit_code == 12
    assert "report.json" in result.stderr


def test_a_folder_that_is_taken_exits_with_2_and_names_resume() -> None:
    taken = Path("taken")
    taken.mkdir()
    (taken / "notes.txt").touch()
    result = run("simulate", "smoke", "--out", "taken")
    assert result.exit_code == 2
    assert "--resume" in result.stderr
    assert "another --out" in result.stderr


def test_resume_needs_a_run_of_the_same_recipe() -> None:
    assert run("simulate", "smoke", "--resume").exit_code == 2
    assert run("simulate", "smoke", "--out", "nowhere", "--resume").exit_code == 2
    config.save_run_config(config.load_recipe("smoke", ["run.seed=1"]), Path("old/config.yaml"))
    result = run("simulate", "smoke", "run.rounds=1", "--out", "old", "--resume")
    assert result.exit_code == 10
    assert "run.seed: the run has 1, this command 0" in result.stderr
    assert "run.rounds: the run has 2, this command 1" in result.stderr


@pytest.fixture
def stopped(monkeypatch: pytest.MonkeyPatch) -> list[BaseException]:
    """What the next simulation raises, once its folder has its recipe."""
    raised: list[BaseException] = []

    def simulate(recipe: object, out: Path, resume: bool) -> Path:
        assert not resume
        out.mkdir(parents=True, exist_ok=True)
        (out / "config.yaml").touch()
        raise raised[0]

    monkeypatch.setattr("simulations.simulate.simulate", simulate)
    return raised


def test_ctrl_c_exits_with_130_and_names_the_command_that_goes_on(stopped: list[BaseException]) -> None:
    stopped.append(KeyboardInterrupt())
    result = run("simulate", "smoke", "run.seed=4", "--out", "my run", "--engine", "loopback")
    assert result.exit_code == 130
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("Interrupted.")]
    assert "Every finished round is kept in my run" in line
    assert line.endswith("wardround simulate smoke run.seed=4 run.engine=loopback --out 'my run' --resume")


@pytest.mark.parametrize(
    ("error", "code"), [(FederationError("too few sites"), 30), (BudgetExceeded("spent"), 21)]
)
def test_an_error_on_purpose_gives_its_own_exit_code(
    stopped: list[BaseException], error: BaseException, code: int
) -> None:
    stopped.append(error)
    result = run("demo", "--out", "run")
    assert result.exit_code == code
    assert f"error: {error}" in result.stderr
    assert not list(Path.cwd().glob("wardround-defect-*"))


def test_a_defect_exits_with_70_and_says_where_its_report_is(stopped: list[BaseException]) -> None:
    stopped.append(ZeroDivisionError("of ours"))
    result = run("demo", "--out", "run")
    assert result.exit_code == 70
    (report,) = Path.cwd().glob("wardround-defect-*.txt")
    assert str(report) in result.stderr
    assert "may contain paths" in result.stderr
    text = report.read_text()
    assert "ZeroDivisionError: of ours" in text
    assert "torch 2.13" in text
    assert "may contain paths" in text


def test_ctrl_c_in_a_round_keeps_the_run_and_the_named_command_finishes_it() -> None:
    recipe = ["smoke", "baselines=[]", "--out", "run"]
    command = [sys.executable, "-c", AS_A_USER, "simulate", *recipe]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    pipes = {"stderr": subprocess.PIPE, "stdout": subprocess.DEVNULL}
    with subprocess.Popen(command, env=environment, text=True, **pipes) as process:
        assert process.stderr is not None
        said = []
        for line in process.stderr:
            said.append(line)
            if "teacher, round 2" in line:
                process.send_signal(signal.SIGINT)
                break
        said += process.stderr.readlines()
    assert process.returncode == 130, "".join(said)
    assert "Traceback" not in "".join(said)
    assert said[-1].startswith("Interrupted. Every finished round is kept in run; go on with: ")
    resumed = wardround(*shlex.split(said[-1].partition("go on with: wardround ")[2]), "--json")
    assert resumed.returncode == 0, resumed.stderr
    assert "teacher, round 1" not in resumed.stderr
    document = json.loads(resumed.stdout)
    assert Path(document["report"]).is_file()
    assert set(document["mean_dice"]) == {"student", "teacher"}
    again = wardround("report", "run", "--json")
    assert json.loads(again.stdout) == {"report": document["report"]}
