"""``effcc passes``: how often a cascade of Einsums must walk over each tensor's fibers, and how often it need not."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .cli_support import JsonOption, console, print_json, read_text, table

if TYPE_CHECKING:
    from rich.console import Console

    from .ir.cascade import Cascade
    from .passes.certificate import Certificate
    from .passes.rewrite_cascade import Rewriting


def passes_command(
    file: Annotated[Path, typer.Argument(help="A cascade, one extended Einsum a line; '-' reads standard input.")],
    json: JsonOption = False,
) -> None:
    """Count a cascade's passes over each tensor and rank, as written and rewritten, with proofs.

    A line reads `SD[m] = sum[n] exp(QK[m,n] - GM[m])`; `#` starts a comment. The table names the Einsums of each pass
    and the results that they wait for. Exit code 0, also where rewriting is refused; 2: the text is not a cascade.
    """
    from .ir.cascade_parser import parse_cascade
    from .passes.cascade_analysis import pass_table
    from .passes.rewrite_cascade import rewrite

    text = sys.stdin.read() if str(file) == "-" else read_text(file, "cascade file")
    cascade = parse_cascade(text, str(file))
    rewriting = rewrite(cascade)
    if json:
        print_json(
            {
                "as_written": pass_table(cascade),
                "rewritten": pass_table(rewriting.cascade),
                "refused": [refusal.to_json() for refusal in rewriting.refusals],
                "certificates": [certificate.to_json() for certificate in rewriting.certificates],
            }
        )
    else:
        _print(cascade, rewriting)


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
