"""Fewer passes over one rank: each dependent reduction moves to the earliest pass that algebra allows.

A reduction in pass p > 1 is aimed at pass 1, then 2, ...: its summand f(x, d) is separated (``separable_rank``;
``tropical`` for max and min), and its terms become components of that pass's state (``rebase``). What no aim fits is
refused, with the reason.

rewrite::

    GM[m]   = max[n] QK[m,n]                     GM_run[m,0]   = -inf
    SD[m]   = sum[n] exp(QK[m,n] - GM[m])   ->   GM_run[m,n+1] = max(GM_run[m,n], QK[m,n])
                                                 SD_run[m,0]   = 0
                                                 SD_run[m,n+1] = SD_run[m,n] * exp(GM_run[m,n] - GM_run[m,n+1])
                                                                 + exp(QK[m,n] - GM_run[m,n+1])
                                                 GM[m] = GM_run[m,|n|]
                                                 SD[m] = SD_run[m,|n|]
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import sympy

from ..ir.cascade import Cascade, Einsum, access, accesses, ranks_of, tensor_name
from ..ir.monoid import Component, Monoid, join, loop_form
from .cascade_analysis import RankGroup, RankPasses, rank_passes
from .certificate import Certificate, Refusal
from .intervals import ANY, Interval
from .proof import certify_extremum, certify_sum
from .rebase import Context, Registry, realize
from .separable_rank import NotSeparable, decompose
from .summand import inline_maps, summand
from .tropical import FINISHED, split_monotone

_FLIPPED = {"max": "min", "min": "max"}


@dataclass(frozen=True)
class Streamed:
    """The cascade with fewer passes over one rank group, and what was proven and refused on the way.

    ``moved`` are the reductions, as named before, that are in an earlier pass now.
    """

    cascade: Cascade
    certificates: tuple[Certificate, ...] = ()
    refusals: tuple[Refusal, ...] = ()
    monoids: tuple[Monoid, ...] = ()
    moved: frozenset[str] = frozenset()


@dataclass
class _Outcome:
    """A reduction's value in terms of last states of ``registry``; without certificate it stays in its pass."""

    registry: Registry
    value: sympy.Expr
    created: list[Component]
    certificate: Certificate | None = None


def stream(
    cascade: Cascade,
    group: RankGroup,
    bounds: Mapping[str, Interval],
    fresh: Callable[[str], str],
    withheld: frozenset[str] = frozenset(),
) -> Streamed:
    """Rewrite the reductions over a rank group. The cascade comes back as it was if nothing moves to an earlier pass.

    ``bounds`` holds what is known of tensors' values; ``fresh`` makes names that no tensor has; ``withheld`` names
    reductions to leave in their pass.
    """
    split, origins = _split_inner(cascade, group, fresh, withheld)
    work = _Work(split, group, bounds, fresh, withheld)
    work.run()
    if not any(outcome.certificate for outcome in work.outcomes.values()):
        return Streamed(cascade, refusals=tuple(work.refusals))
    result = work.emit()
    return replace(result, moved=frozenset(origins.get(c.einsum, c.einsum) for c in result.certificates))


def _split_inner(
    cascade: Cascade, group: RankGroup, fresh: Callable[[str], str], withheld: frozenset[str]
) -> tuple[Cascade, dict[str, str]]:
    """``sum[n,p] X[n,p] * D[p]`` -> a sum over n, then one over p, if D depends on an earlier reduction over n.

    Also returned: the new sums' names -> the sums that they are part of.
    """
    origins: dict[str, str] = {}
    found = rank_passes(cascade, group)
    einsums: list[Einsum] = []
    for position, einsum in enumerate(cascade.einsums):
        own = tuple(symbol for symbol in einsum.reduced if symbol in group)
        rest = tuple(symbol for symbol in einsum.reduced if symbol not in group)
        dependent = False
        if own and rest and found.einsum.get(position, 1) > 1 and einsum.output not in withheld:
            try:
                body = inline_maps(cascade, einsum, 1, found)
            except NotSeparable:
                body = einsum.body
            for item in accesses(body):
                value, here = found.operand(cascade, item, einsum)
                dependent |= not here and value >= 1 and any(ranks_of(index) & set(rest) for index in item.args)
        if not dependent:
            einsums.append(einsum)
            continue
        inner = fresh(f"{einsum.output}_inner")
        origins[inner] = einsum.output
        indices = (*einsum.indices, *rest)
        einsums.append(replace(einsum, output=inner, indices=indices, reduced=own))
        einsums.append(replace(einsum, body=access(inner, indices), reduced=rest))
    return Cascade(tuple(einsums)), origins


class _Work:
    """The state of one run over a rank group."""

    def __init__(
        self,
        cascade: Cascade,
        group: RankGroup,
        bounds: Mapping[str, Interval],
        fresh: Callable[[str], str],
        withheld: frozenset[str],
    ) -> None:
        self.cascade, self.group, self.bounds, self.fresh = cascade, group, bounds, fresh
        self.withheld = withheld
        self.settled: dict[str, int] = {}
        self.registries: dict[tuple[sympy.Symbol, int], Registry] = {}
        self.outcomes: dict[int, _Outcome] = {}
        self.refusals: list[Refusal] = []
        #: Component name -> the tensor that equals its last value.
        self.aliases: dict[str, sympy.Expr] = {}

    def run(self) -> None:
        for position, einsum in enumerate(self.cascade.einsums):
            rank = next((symbol for symbol in einsum.reduced if symbol in self.group), None)
            if rank is None or einsum.iterative is not None or einsum.reduction is None:
                continue
            found = rank_passes(self.cascade, self.group, self.settled)
            level = found.einsum[position]
            reason = "another tensor would have to be visited once more if this were moved"
            aims = () if einsum.output in self.withheld else range(1, level)
            for aim in aims:
                try:
                    self.outcomes[position] = self._attempt(einsum, rank, aim, found)
                    self.settled[einsum.output] = aim
                    break
                except NotSeparable as refused:
                    reason = str(refused) if aim == 1 else reason
            else:
                self.settled[einsum.output] = level
                if level > 1:
                    self.refusals.append(Refusal(einsum.output, rank.name, reason))
                elif einsum.reduction != "prod":
                    self.outcomes[position] = self._keep(einsum, rank, level)
            outcome = self.outcomes.get(position)
            for component in outcome.created if outcome else ():
                whole = set(component.indices) == set(einsum.kept)
                if outcome and whole and outcome.value == outcome.registry.last(component):
                    self.aliases[component.name] = access(einsum.output, einsum.indices)

    def _registry(self, rank: sympy.Symbol, level: int) -> Registry:
        def leaf(e: sympy.Expr) -> Interval:
            return self.bounds.get(tensor_name(e), ANY) if e.is_Function else ANY

        return self.registries.setdefault((rank, level), Registry(rank, self.fresh, leaf))

    def _keep(self, einsum: Einsum, rank: sympy.Symbol, level: int) -> _Outcome:
        """Note what a reduction of this pass sums, so that others of the pass can share it."""
        registry = self._registry(rank, level)
        before = set(registry.components)
        assert einsum.reduction is not None
        element, factor = einsum.body, sympy.Integer(1)
        if einsum.reduction == "sum":
            varying = frozenset(einsum.reduced)
            parts = sympy.Mul.make_args(element)
            factor = sympy.Mul(*(part for part in parts if not ranks_of(part) & varying))
            element = sympy.Mul(*(part for part in parts if ranks_of(part) & varying))
        component = registry.plain(f"{einsum.output}_run", einsum.reduction, einsum.reduced, element, einsum.kept)
        created = [c for key, c in registry.components.items() if key not in before]
        return _Outcome(registry, factor * registry.last(component), created)

    def _attempt(self, einsum: Einsum, rank: sympy.Symbol, aim: int, found: RankPasses) -> _Outcome:
        """The reduction in pass ``aim``. Raises ``NotSeparable`` and leaves the registry as it was."""
        registry = self._registry(rank, aim)
        components, running = dict(registry.components), set(registry.running)
        try:
            if einsum.reduction == "sum":
                value, certificate = self._sum(einsum, rank, aim, found, registry)
            elif einsum.reduction in _FLIPPED:
                value, certificate = self._extremum(einsum, rank, aim, found, registry)
            else:
                raise NotSeparable("a product over the rank whose factors depend on an earlier reduction")
        except NotSeparable:
            registry.components, registry.running = components, running
            raise
        created = [c for key, c in registry.components.items() if key not in components]
        return _Outcome(registry, value, created, certificate)

    def _sum(
        self, einsum: Einsum, rank: sympy.Symbol, aim: int, found: RankPasses, registry: Registry
    ) -> tuple[sympy.Expr, Certificate]:
        parts = summand(self.cascade, einsum, aim, found, self.bounds)
        terms = decompose(parts.f, parts.variables)
        context = Context(registry, einsum.output, einsum.reduced, einsum.kept, self._inline, self._alias(registry))
        realized = [realize(term.map(parts.concrete), context) for term in terms]
        certificate = certify_sum(einsum, rank, parts, terms, realized, context)
        return sympy.Add(*(item.value for item in realized)), certificate

    def _extremum(
        self, einsum: Einsum, rank: sympy.Symbol, aim: int, found: RankPasses, registry: Registry
    ) -> tuple[sympy.Expr, Certificate]:
        parts = summand(self.cascade, einsum, aim, found, self.bounds)
        split = split_monotone(parts.f, parts.variables)
        assert einsum.reduction is not None
        own, other = einsum.reduction, _FLIPPED[einsum.reduction]
        ends = []
        for reduction in {1: (own,), -1: (other,), 0: (own, other)}[split.direction]:
            component = registry.plain(
                f"{einsum.output}_{reduction}", reduction, einsum.reduced, parts.concrete(split.u), einsum.kept
            )
            ends.append(parts.concrete(split.rebuild).xreplace({FINISHED: registry.last(component)}))
        value = ends[0] if len(ends) == 1 else join(own, ends[0], ends[1])
        return value, certify_extremum(einsum, rank, parts, split)

    def _alias(self, registry: Registry) -> Callable[[Component], sympy.Expr]:
        return lambda component: self.aliases.get(component.name, registry.last(component))

    def _inline(self, e: sympy.Expr) -> sympy.Expr:
        """An expression with results of this rank replaced by their values in terms of last states."""
        for _ in range(16):
            table: dict[sympy.Expr, sympy.Expr] = {}
            for item in accesses(e):
                definition = self.cascade.definitions.get(tensor_name(item))
                if definition is None or definition.iterative is not None or definition.is_start:
                    continue
                position = self.cascade.einsums.index(definition)
                if position in self.outcomes:
                    value = self.outcomes[position].value
                elif definition.reduction is None and not definition.space & self.group:
                    value = definition.body
                else:
                    continue
                table[item] = value.xreplace(dict(zip(definition.indices, item.args, strict=True)))
            if not table:
                break
            e = e.xreplace(table)
        return e

    # Text of the result ----------------------------------------------------------------------------------------------

    def emit(self) -> Streamed:
        read = self._states_read()
        renamed: dict[sympy.Expr, sympy.Expr] = {}
        written: set[str] = set()
        for registry in self.registries.values():
            for component in registry.components.values():
                if component.name in registry.running:
                    written.add(component.name)
                elif component.name in self.aliases:
                    renamed[registry.last(component)] = self.aliases[component.name]
                else:
                    renamed[registry.last(component)] = access(component.name, component.indices)
                    if component.name in read:
                        written.add(component.name)
        lines: list[Einsum] = []
        for position, einsum in enumerate(self.cascade.einsums):
            outcome = self.outcomes.get(position)
            if outcome is None:
                lines.append(einsum)
                continue
            for component in outcome.created:
                if component.name in written:
                    lines += self._lines(component, outcome.registry)
            states = {tensor_name(item) for item in accesses(outcome.value)}
            if outcome.certificate or states & written:
                value = outcome.value.xreplace(renamed)
                lines.append(Einsum(einsum.output, einsum.indices, value, line=einsum.line))
            else:
                lines.append(einsum)
        certificates = tuple(o.certificate for o in self.outcomes.values() if o.certificate)
        return Streamed(Cascade(tuple(lines)), certificates, tuple(self.refusals), self._monoids(read))

    @staticmethod
    def _lines(component: Component, registry: Registry) -> list[Einsum]:
        if component.name in registry.running:
            return loop_form(component, registry.rank)
        reduced = (registry.rank, *component.inner)
        return [Einsum(component.name, component.indices, component.element, component.reduction, reduced)]

    def _states_read(self) -> set[str]:
        """The components that some result moved by this rewrite reads, or some other component."""
        read: set[str] = set()
        for outcome in self.outcomes.values():
            if outcome.certificate:
                read |= {tensor_name(item) for item in accesses(outcome.value)}
        for registry in self.registries.values():
            read |= registry.running
        return read

    def _monoids(self, read: set[str]) -> tuple[Monoid, ...]:
        monoids = []
        for registry in self.registries.values():
            components = tuple(c for c in registry.components.values() if c.name in read)
            names = {component.name for component in components}
            finals = []
            for position, outcome in self.outcomes.items():
                states = {tensor_name(item) for item in accesses(outcome.value)}
                if outcome.registry is registry and (outcome.certificate or states & names):
                    einsum = self.cascade.einsums[position]
                    finals.append(Einsum(einsum.output, einsum.indices, outcome.value, line=einsum.line))
            if components:
                monoids.append(Monoid(registry.rank, components, tuple(finals)))
        return tuple(monoids)
