"""``effcc trace-experts``: run a mixture-of-experts model and record which experts its tokens are routed to."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from typing import Annotated

import typer

from .cli_support import JsonOption, check_writable, console, print_json, quiet_torch, stage


def trace_experts_command(
    model: Annotated[str, typer.Argument(metavar="FILE.py[:name]", help="A model file, as for 'effcc plan'.")],
    output: Annotated[
        Path, typer.Option("-o", "--output", help="Where the trace goes: .csv, or .npz (smaller).")
    ] = Path("trace.npz"),
    batches: Annotated[
        int, typer.Option("--batches", "-n", min=1, help="How often example_inputs is called, and the model run.")
    ] = 1,
    seed: Annotated[int, typer.Option(help="Of torch's random numbers, before the model is built.")] = 0,
    json: JsonOption = False,
) -> None:
    """Record the routing of a mixture-of-experts model on its example inputs, for 'effcc place-experts'.

    The file is executed and the model runs here, with its weights, without gradients. A trace has a row for each token,
    layer and slot of the top-k choice; tokens that attention_mask excludes are left out.
    """
    check_writable(output)
    import torch

    from .cost_model.expert_placement.routing import Trace, write_trace
    from .frontend.expert_trace import record_routing
    from .frontend.model_file import load_model_file
    from .ir.plan_file import write_atomically

    with quiet_torch(), contextlib.redirect_stdout(sys.stderr):
        torch.manual_seed(seed)
        spec = load_model_file(model)
        with stage(f"running {spec.name}", quiet=json):
            routing = record_routing(spec.build_model(), (spec.example_inputs() for _ in range(batches)))
    trace = Trace(routing.token, routing.layer, routing.slot, routing.expert, routing.expert_count)
    write_atomically(output, write_trace(trace, output))
    facts = {
        "output": str(output),
        "tokens": int(routing.token.max()) + 1,
        "layers": len(routing.names),
        "experts": routing.expert_count,
        "k": int(routing.slot.max()) + 1,
        "modules": list(routing.names),
    }
    if json:
        print_json(facts)
        return
    out = console()
    out.print(
        f"{facts['tokens']} tokens through {facts['layers']} layers of {facts['experts']} experts, top {facts['k']}"
    )
    out.print(f"trace:   {output}", markup=False)
    out.print(f"next:    effcc place-experts {output} --ranks 8", markup=False)
