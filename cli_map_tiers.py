"""``effcc map-memory PLAN.effcc``: which uses of a plan's buffers are served from the scratchpad."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from .cli_support import console, print_json, stage, table, write_text
from .errors import OptionError
from .formatting import bytes_text, seconds_text

if TYPE_CHECKING:
    from .passes.tier_mapping.game import Game
    from .passes.tier_mapping.outcome import Outcome
    from .passes.tier_mapping.search import TierMapping


def map_plan(
    files: list[Path],
    device: str | None,
    capacity: int | None,
    output: Path | None,
    time_limit: float,
    seed: int,
    json: bool,
) -> None:
    """Copy, no-copy or drop for each use; exit code 0."""
    from .cost_model.devices import load_device
    from .ir.plan_file import load_plan
    from .passes.tier_mapping.game import game_of
    from .passes.tier_mapping.search import map_tiers

    if len(files) > 1:
        raise OptionError("several files, one of them a plan", remedy="map plans one after the other")
    plan = load_plan(files[0]).plan
    game = game_of(plan, load_device(device or plan.device), capacity)
    with stage(f"mapping {files[0].name}", quiet=json):
        found = map_tiers(game, time_limit=time_limit, seed=seed)
    facts = _facts(game, found, seed)
    if output is not None:
        import msgspec

        text = msgspec.json.format(msgspec.json.encode(facts | {"uses": _uses(game, found.best)}), indent=1).decode()
        write_text(output, text + "\n")
    if json:
        print_json(facts)
        return
    _print(game, found)
    if output is not None:
        console().print(f"map:     {output}", markup=False)


def _facts(game: Game, found: TierMapping, seed: int) -> dict[str, Any]:
    def figures(outcome: Outcome) -> dict[str, Any]:
        return {
            "makespan": outcome.makespan,
            "height": outcome.height,
            "copied_bytes": outcome.copied_bytes,
            "stays": len(outcome.stays),
        }

    return {
        **figures(found.best),
        "by": found.by,
        "bound": found.bound,
        "gap": found.gap,
        "optimal": found.optimal,
        "capacity": game.capacity,
        "seed": seed,
        "baselines": {name: figures(outcome) for name, outcome in found.baselines.items()},
    }


def _uses(game: Game, outcome: Outcome) -> list[dict[str, Any]]:
    """Each use with its fate and, in the scratchpad, its offset."""
    offsets = {
        (stay.piece.id, use): offset
        for stay, offset in zip(outcome.stays, outcome.offsets, strict=True)
        for use in range(stay.begin, stay.end + 1)
    }
    return [
        {
            "buffer": piece.id,
            "name": piece.name,
            "step": position,
            "fate": outcome.choice[piece.id][use],
            "tier": "scratchpad" if (piece.id, use) in offsets else "device",
            "offset": offsets.get((piece.id, use)),
        }
        for piece in game.pieces
        for use, position in enumerate(piece.uses)
    ]


def _print(game: Game, found: TierMapping) -> None:
    columns = ("time", "less", "scratchpad", "copied", "stays")
    rows = table("uses of the scratchpad", *columns, right=columns)
    slowest = found.baselines["all in device memory"].makespan or 1.0
    for name, outcome in {**found.baselines, f"effcc ({found.by})": found.best}.items():
        rows.add_row(
            name, seconds_text(outcome.makespan), f"{100 * (1 - outcome.makespan / slowest):.2f} %",
            bytes_text(outcome.height), bytes_text(outcome.copied_bytes), str(len(outcome.stays)),
        )  # fmt: skip
    console().print(rows)
    proven = "which is optimal" if found.optimal else f"at most {100 * found.gap:.2f} % could be saved"
    console().print(
        f"  No choice is faster than {seconds_text(found.bound)}: {proven}. The scratchpad has "
        f"{bytes_text(game.capacity)}.",
        markup=False,
    )
