"""The privacy officer's verbs: those of this file, and the groups and commands of the files beside it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from common.console import print_json
from common.privacy.ledger_commands import AS_JSON, FILE, ledger_group, open_ledger
from common.privacy.policy_commands import policy_group
from common.privacy.report_commands import page_command, statement_command

if TYPE_CHECKING:
    from common.privacy.plan import PrivacyPlan
    from common.privacy.planner import Question
    from common.privacy.verify import Findings

_Command = TypeVar("_Command", bound=Callable[..., Any])


def _run_options(command: _Command) -> _Command:
    """The options that say which run is asked about."""
    for option in reversed(
        (
            click.option("--patients", type=int, required=True, help="Patients of the site."),
            click.option("--batch", type=int, required=True, help="Patients drawn in a step, on average."),
            click.option("--rounds", type=int, required=True, help="Rounds of the run."),
            click.option("--epochs", type=int, help="Passes over the patients in a round."),
            click.option("--steps", type=int, help="Noised steps in a round, instead of --epochs."),
            click.option("--noise-multiplier", type=float, help="Noise over clip (sigma)."),
            click.option("--epsilon", type=float, help="Find the noise for this epsilon instead."),
            click.option("--delta", type=float, default=1e-5, show_default=True),
            click.option("--images", type=int, default=5, show_default=True, help="At most, of a patient."),
            click.option("--style-epsilon", type=float, help="A noised style summary leaves too, of this."),
        )
    ):
        command = option(command)
    return command


@click.group()
def privacy() -> None:
    """The privacy officer's tools: plan the noise, sign a policy, read the ledger, verify a record.

    \b
    Example:
      wardround privacy plan --patients 400 --batch 40 --rounds 40 --steps 2 --epsilon 8
    """


@privacy.command("plan")
@_run_options
@click.option("--history", type=FILE, help="A site's ledger folder: what its patients have spent counts.")
@click.option("--cap", type=float, default=8.0, show_default=True, help="Most epsilon a patient may spend.")
@AS_JSON
def plan_command(history: Path | None, cap: float, as_json: bool, **options: Any) -> None:
    """Plan a run: epsilon, what an attacker could do, the noise, the cheapest change, and a table.

    \b
    Example:
      wardround privacy plan --patients 100 --batch 8 --rounds 5 --epochs 2 --noise-multiplier 1.5
    """
    from common.privacy.planner import noise_table, plan_document, warnings

    past = tuple(open_ledger(history).most_used()) if history is not None else ()
    question, plan = _settled(options, cap, past)
    document = plan_document(question, plan, with_prv=as_json)
    if as_json:
        print_json(document)
        return
    for line in _plan_lines(document):
        click.echo(line)
    for warning in warnings(question, plan):
        click.echo(f"note: {warning}")
    click.echo("\nsigma  rounds   epsilon  after it all  attacker at 1 %  noise / clip  verdict")
    for sigma, rounds, run, total, rate, noise, outcome in noise_table(question):
        shown = ["    none" if value == float("inf") else f"{value:8.2f}" for value in (run, total)]
        click.echo(
            f"{sigma:5.2f} {rounds:7d}  {shown[0]}      {shown[1]} {rate:15.1%} {noise:13.3f}  {outcome}"
        )
    click.echo("Dice at these settings: unknown before a rehearsal.")


def _plan_lines(document: dict[str, Any]) -> list[str]:
    from common.privacy.planner import band

    figure, delta = document["epsilon"]["pld"], document["delta"]
    rates = "   ".join(f"{float(rate):.1%} -> {found:.1%}" for rate, found in document["attacker"].items())
    styles = document.get("style")
    beside = ""
    if styles is not None:
        beside = f"; a style summary of epsilon {styles['epsilon']:g} by itself is in every figure"
    return [
        f"epsilon {figure:.3f} at delta {delta:g}: {band(figure)} (a convention)",
        f"  unit: patient, one added or removed; batches drawn by Poisson sampling{beside}",
        f"  noise multiplier {document['noise_multiplier']:g}, sample rate {document['sample_rate']:g}, "
        f"{document['steps']} steps; noise per coordinate {document['noise_per_coordinate']:g} clips",
        f"  by Renyi accounting {document['epsilon']['rdp']}; replace-one {document['epsilon_replace_one']}",
        f"  if shuffled {document['epsilon_if_shuffled']}; if images were clipped one by one "
        f"{document['epsilon_if_image_level']}",
        f"attacker: patients wrongly named -> found, at most: {rates}",
        f"after everything before it: epsilon {document['epsilon_total_after']}   {document['verdict']}",
        f"cheapest change: {document['cheapest_change']}",
    ]


def _settled(options: dict[str, Any], cap: float, history: tuple[Any, ...]) -> tuple[Question, PrivacyPlan]:
    from common.errors import UsageError
    from common.privacy.planner import Question, settle, steps_of

    if (options["noise_multiplier"] is None) == (options["epsilon"] is None):
        raise UsageError("give one of --noise-multiplier and --epsilon")
    if (options["steps"] is None) == (options["epochs"] is None):
        raise UsageError("give one of --steps and --epochs")
    patients, batch, epochs = options["patients"], options["batch"], options["epochs"]
    steps = options["steps"] if epochs is None else steps_of(patients, batch, epochs)
    question = Question(
        patients, batch, options["rounds"], steps, options["delta"], cap, history, options["images"],
        options["style_epsilon"],
    )  # fmt: skip
    return question, settle(question, options["noise_multiplier"], options["epsilon"])


@privacy.command("curve")
@_run_options
@click.option("--out", type=FILE, required=True, help="The picture, an SVG file.")
@AS_JSON
def curve_command(out: Path, as_json: bool, **options: Any) -> None:
    """Draw what an attacker can achieve at most against this run.

    \b
    Example:
      wardround privacy curve --patients 100 --batch 8 --rounds 5 --epochs 2 --epsilon 4 --out curve.svg
    """
    from common.durable import write_atomic
    from common.privacy.curve import curve_svg

    question, plan = _settled(options, 8.0, ())
    write_atomic(out, curve_svg(plan, question.beside).encode())
    if as_json:
        print_json({"curve": str(out)})
    else:
        click.echo(f"curve: {out}")


@privacy.command("key")
@click.argument("path", type=FILE)
def key_command(path: Path) -> None:
    """Make an officer's signing key in PATH, and its public half in PATH.pub.

    \b
    Example:
      wardround privacy key officer.key
    """
    from common.durable import write_atomic
    from common.privacy.keys import create_key, key_id, public_key

    public = public_key(create_key(path))
    write_atomic(path.with_name(path.name + ".pub"), public.encode())
    click.echo(f"{path} is secret; {path}.pub is for the site (id {key_id(public)})")


@privacy.command("verify")
@click.option("--bundle", type=FILE, required=True, help="A site's folder, or a zip of its records.")
@click.option("--policy", type=FILE, help="The policy, with its .sig beside it; by default the bundle's.")
@click.option("--officer-key", type=FILE, help="The officer's public key.")
@click.option(
    "--ledger-head", multiple=True, help="A head hash that somebody else has seen; may be repeated."
)
@click.option(
    "--witness", "witnesses", type=FILE, multiple=True,
    help="Heads that the server (state/ledger-heads.jsonl) or another site (witnessed.jsonl) has kept.",
)  # fmt: skip
@AS_JSON
def verify_command(bundle: Path, as_json: bool, **options: Any) -> None:
    """Recompute a site's record from its files, offline; exits with 22 if it does not hold.

    \b
    Example:
      wardround privacy verify --bundle site.zip --officer-key officer.key.pub --witness ledger-heads.jsonl
    """
    from common.errors import VerificationFailed

    found = _verified(bundle, options)
    if as_json:
        print_json(found.to_json())
    else:
        for line in _finding_lines(found):
            click.echo(line)
    if not found.holds:
        what = "the record does not hold" if found.faults else "the record lacks what its policy requires"
        raise VerificationFailed(what, [*found.faults, *found.owed])


def _verified(bundle: Path, options: dict[str, Any]) -> Findings:
    from common.errors import ArtefactError, VerificationFailed
    from common.privacy.bundle import read_bundle
    from common.privacy.keys import read_public_key
    from common.privacy.policy import POLICY, SIGNATURE_SUFFIX, signature_path
    from common.privacy.verify import Evidence, verify
    from common.privacy.witness import read_heads

    policy, officer_key = options["policy"], options["officer_key"]
    try:
        files = read_bundle(bundle)
    except ArtefactError as error:
        raise VerificationFailed(str(error)) from error
    if policy is not None:
        try:
            files[POLICY] = policy.read_bytes()
            files[POLICY + SIGNATURE_SUFFIX] = signature_path(policy).read_bytes()
        except OSError as error:
            raise ArtefactError(f"{policy} or its signature cannot be read ({error.strerror})") from error
    officer = read_public_key(officer_key) if officer_key is not None else None
    heads = [head for path in options["witnesses"] for head in read_heads(path)]
    return verify(files, Evidence(officer, options["ledger_head"], heads))


def _finding_lines(found: Findings) -> list[str]:
    facts = found.facts
    lines = [f"{name:<10} {json.dumps(value, ensure_ascii=False)}" for name, value in facts.items()]
    lines += [f"caution: {caution}" for caution in found.cautions]
    if found.owed and not found.faults:
        return [*lines, "AN AUDIT IS OWED; the record holds otherwise"]
    return [*lines, "the record holds" if found.holds else "THE RECORD DOES NOT HOLD"]


privacy.add_command(policy_group)
privacy.add_command(ledger_group)
privacy.add_command(statement_command)
privacy.add_command(page_command)
