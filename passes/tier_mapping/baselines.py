"""What others would put into the scratchpad, for comparison."""

from __future__ import annotations

from .game import STAYS, Choice, Fate, Game, Piece
from .outcome import Stay, benefit, nothing


def best_fit_heap(game: Game) -> Choice:
    """XLA's heap: buffers in order of falling size, each for its whole life at the offset of the smallest gap that has
    room (GlobalDecreasingSizeBestFitHeap); what does not fit is in device memory. Nothing is copied in."""
    choice = nothing(game)
    placed: list[tuple[int, int, int, int]] = []  # first, last, offset, end
    for piece in sorted(game.pieces, key=lambda p: (-p.bytes, p.id)):
        if not piece.made:
            continue
        first, last, size = piece.uses[0], piece.uses[-1], game.room(piece)
        meeting = sorted((o, e) for f, t, o, e in placed if f <= last and t >= first)
        gaps: list[tuple[int, int]] = []  # size, offset
        low = 0
        for offset, end in [*meeting, (game.capacity, game.capacity)]:
            if offset - low >= size:
                gaps.append((offset - low, low))
            low = max(low, end)
        if gaps:
            _, offset = min(gaps)
            placed.append((first, last, offset, offset + size))
            choice[piece.id] = (STAYS,) * len(piece.uses)
    return choice


def greedy(game: Game) -> Choice:
    """The use, with the way to it from the use before, that saves most for a byte and step goes first, as long as there
    is room."""
    room = [game.capacity] * len(game.turns)
    fates: dict[int, list[Fate]] = {piece.id: ["drop"] * len(piece.uses) for piece in game.pieces}
    offers: list[tuple[float, int, int, Piece]] = []
    for number, piece in enumerate(game.pieces):
        for use, position in enumerate(piece.uses):
            first = position if piece.made and use == 0 else game.prefetch(piece, use)
            stay = Stay(piece, use, use, first, position, copied=True)
            offers.append((-benefit(game, stay), number, use, piece))
    for worth, _, use, piece in sorted(offers, key=lambda offer: offer[:3]):
        if worth >= 0:
            continue
        there = use > 0 and fates[piece.id][use - 1] != "drop"
        born = piece.made and use == 0
        first = piece.uses[use] if born else game.prefetch(piece, use)
        if there:
            first = piece.uses[use - 1] + 1
        span = range(first, piece.uses[use] + 1)
        size = game.room(piece)
        if all(room[position] >= size for position in span):
            for position in span:
                room[position] -= size
            fates[piece.id][use] = "no-copy" if born or there else "copy"
    return {piece: tuple(found) for piece, found in fates.items()}
