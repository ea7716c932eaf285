"""``effcc passes``: how often a cascade of Einsums must walk over each tensor's fibers, and how often it need not."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .cli_support import JsonOption, console, print_json, read_text, table
from .formatting import bytes_text

if TYPE_CHECKING:
    from rich.console import Console

    from .ir.cascade import Cascade
    from .ir.graph import Location
    from .passes.certificate import Certificate
    from .passes.raising.analysis import GraphAnalysis
    from .passes.rewrite_cascade import Rewriting


def passes_command(
    file: Annotated[
        str,
        typer.Argument(
            metavar="FILE",
            help="A cascade, one extended Einsum a line ('-' reads standard input), or a model file, FILE.py[:name].",
        ),
    ],
    train: Annotated[bool, typer.Option("--train", help="Of a model: its training step, not a forward pass.")] = False,
    json: JsonOption = False,
) -> None:
    """Count a cascade's passes over each tensor and rank, as written and rewritten, with proofs.

    A line reads `SD[m] = sum[n] exp(QK[m,n] - GM[m])`; `#` starts a comment. The table names the Einsums of each pass
    and the results that they wait for. Of a model, the same for every group of ops that can become one kernel, and why
    others do not. Exit code 0, also where rewriting is refused; 2: the text is not a cascade, or the file no model.
    """
    if Path(file.rpartition(":")[0] or file).suffix == ".py" or file.endswith(".py"):
        _of_model(file, train, json)
    else:
        _of_text(Path(file), json)


def _of_model(file: str, train: bool, json: bool) -> None:
    from rich.markup import escape

    from .plan_capture import cascade_analyses

    analyses = cascade_analyses(file, train=train)
    if json:
        print_json({"graphs": [_analysis_json(each) for each in analyses]})
        return
    out = console()
    for analysis in analyses:
        for group in analysis.groups:
            moved = group.traffic
            out.print(f"[bold]{escape(group.name)}[/bold], {_place(group.location)}: {len(group.nodes)} ops, ", end="")
            out.print(f"{bytes_text(moved.written)} of traffic as written, {bytes_text(moved.fused)} fused\n")
            _print(group.fused.cascade, group.rewriting)
        for refused in analysis.refused:
            out.print(escape(f"not fused: {refused.tensor}, {_place(refused.location)}: {refused.why}"))
    if not any(analysis.groups or analysis.refused for analysis in analyses):
        out.print("The model has no tensors that fusing reductions would keep out of memory.")


def _analysis_json(analysis: GraphAnalysis) -> dict[str, object]:
    from .ir.cascade_printer import print_cascade

    groups = [
        {
            "name": group.name,
            "source": _place(group.location),
            "ops": list(group.nodes),
            "traffic": {"written": group.traffic.written, "fused": group.traffic.fused},
            "cascade": print_cascade(group.fused.cascade),
            **_json(group.fused.cascade, group.rewriting),
        }
        for group in analysis.groups
    ]
    refused = [{"tensor": each.tensor, "source": _place(each.location), "why": each.why} for each in analysis.refused]
    return {"name": analysis.name, "groups": groups, "refused": refused}


def _place(location: Location) -> str:
    return f"{location.file}:{location.line}" if location.file else "no source line"


def _of_text(file: Path, json: bool) -> None:
    from .ir.cascade_parser import parse_cascade
    from .passes.rewrite_cascade import rewrite

    text = sys.stdin.read() if str(file) == "-" else read_text(file, "cascade file")
    cascade = parse_cascade(text, str(file))
    rewriting = rewrite(cascade)
    if json:
        print_json(_json(cascade, rewriting))
    else:
        _print(cascade, rewriting)


def _json(cascade: Cascade, rewriting: Rewriting) -> dict[str, object]:
    from .passes.cascade_analysis import pass_table

    return {
        "as_written": pass_table(cascade),
        "rewritten": pass_table(rewriting.cascade),
        "refused": [refusal.to_json() for refusal in rewriting.refusals],
        "certificates": [certificate.to_json() for certificate in rewriting.certificates],
    }


def _print(cascade: Cascade, rewriting: Rewriting) -> None:
    from rich.markup import escape

    from .ir.cascade_printer import print_cascade

    out = console()
    out.print(_table(cascade, rewriting))
    if rewriting.certificates:
        out.print("[bold]Rewritten cascade[/bold]\n")
        out.print(escape(print_cascade(rewriting.cascade)))
        out.print("[bold]Certificates[/bold]\n")
        for certificate in rewriting.certificates:
            _print_certificate(out, certificate)
    if rewriting.refusals:
        out.print("[bold]Refused[/bold]\n")
        for refusal in rewriting.refusals:
            out.print(escape(f"{refusal.einsum} over {refusal.rank}: {refusal.why}"))


def _table(cascade: Cascade, rewriting: Rewriting) -> object:
    from .ir.cascade import rank
    from .passes.cascade_analysis import forced_passes, pass_table

    shown = table("tensor", "rank", "as written", "rewritten", "passes as written", right=("as written", "rewritten"))
    after = pass_table(rewriting.cascade)
    for tensor, ranks in pass_table(cascade).items():
        for name, count in ranks.items():
            parts = [
                f"{each.number}: {', '.join(each.einsums)}"
                + (f" (after {', '.join(each.after)})" if each.after else "")
                for each in forced_passes(cascade, tensor, rank(name))
            ]
            now = after.get(tensor, {}).get(name)
            shown.add_row(tensor, name, str(count), "gone" if now is None else str(now), "; ".join(parts))
    return shown


def _print_certificate(out: Console, certificate: Certificate) -> None:
    from rich.markup import escape

    told = certificate.to_json()
    depends = ", ".join(certificate.depends_on)
    lines = [
        f"{certificate.einsum} over {certificate.rank}: {certificate.mode}, k = {certificate.k}, depends on {depends}",
        f"  f = {certificate.summand_text}",
        f"  g = {told['g']}",
        f"  h = {told['h']}",
    ]
    if certificate.transition is not None:
        lines.append(f"  T = {told['T']}")
    holds = ", ".join(name for name, value in certificate.conditions.items() if value)
    lines.append(f"  f - sum g*h = 0; holds: {holds}")
    out.print(escape("\n".join(lines) + "\n"))
