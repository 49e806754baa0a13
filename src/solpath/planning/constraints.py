"""Constraints: what a plan respects at every budget, and which pairs must leave together for it."""

import math
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any, get_args

from solpath.config import check_count
from solpath.errors import ConfigError
from solpath.pair import Kind, Pair
from solpath.planning.removal import Team

KINDS: tuple[str, ...] = get_args(Kind)
"""The kinds of pairs."""

PerKind = int | Mapping[str, int]
"""A number for all pairs, or kind to number; kinds that are not named have no such constraint."""


@dataclass(frozen=True)
class Constraints:
    """What a plan must respect, whatever its budget. Plans of one path with equal ones are nested.

    Attributes:
        multiple_of: Every head keeps a multiple of this many units, or all of its units. A number,
            or kind (``"qk"``, ``"vo"``, ``"mlp"``, ``"experts"``) to number. Units of rotary
            queries and keys are couples of channels.
        min_width: Units that every head keeps at least: a number, or kind to number.
        protect: Shell patterns of the names of pairs that stay dense, such as ``"*layer.0.*"``.
        uniform: Whether pairs of one kind and one shape keep the same width in every layer: for all
            kinds, or for those that are named.
        tied_widths: Whether queries, keys and values of one attention keep equally many channels,
            as a class with a single ``head_dim`` needs it.
        shared_couples: Whether all heads keep the same rotary couples; those of layers of
            unequal widths are nested.
        whole_groups: Whether attentions lose whole heads, a key-value head with its query heads, in
            place of units inside heads. One group at least stays; `multiple_of` and `min_width`
            say nothing about attentions then.
        target: Name of the target that asked for this, for the record; see `solpath.planning.
            targets`.

    Raises:
        ConfigError: A number is no integer or too small, or a kind is unknown.

    Example:
        >>> constraints = Constraints(multiple_of={"mlp": 32}, protect=["*layer.0.*"])
        >>> constraints.protects(path.pairs[0]), constraints.protects(path.pairs[-1])
        (True, False)
        >>> constraints.multiple("mlp"), constraints.multiple("vo")
        (32, 1)
    """

    multiple_of: PerKind = 1
    min_width: PerKind = 0
    protect: Sequence[str] = ()
    uniform: bool | Collection[str] = False
    tied_widths: bool = False
    shared_couples: bool = False
    whole_groups: bool = False
    target: str = ""

    def __post_init__(self) -> None:
        for name, low in (("multiple_of", 1), ("min_width", 0)):
            value = getattr(self, name)
            if isinstance(value, Mapping):
                _check_kinds(name, value)
                for kind, number in value.items():
                    check_count(f"{name}[{kind!r}]", number, low)
            else:
                check_count(name, value, low)
        if isinstance(self.protect, str):
            raise ConfigError(f"protect must be a list of patterns, got {self.protect!r}.")
        if not isinstance(self.uniform, bool):
            _check_kinds("uniform", self.uniform)
        for name in ("tied_widths", "shared_couples", "whole_groups"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{name} must be True or False, got {getattr(self, name)!r}.")

    def multiple(self, kind: str) -> int:
        """Return the number of units of which heads of one kind keep a multiple."""
        return _of(self.multiple_of, kind, 1)

    def least(self, kind: str) -> int:
        """Return the number of units that heads of one kind keep at least."""
        return _of(self.min_width, kind, 0)

    def protects(self, pair: Pair) -> bool:
        """Return whether a pair stays dense.

        Args:
            pair: A pair of the dense model.
        """
        return any(fnmatchcase(pair.name, pattern) for pattern in self.protect)

    @property
    def uniform_kinds(self) -> frozenset[str]:
        """The kinds whose pairs keep one width in every layer."""
        if isinstance(self.uniform, bool):
            return frozenset(KINDS if self.uniform else ())
        return frozenset(self.uniform)

    def check(self, pairs: Sequence[Pair], unreached: Sequence[str] = ()) -> None:
        """Raise `ConfigError` for what a model cannot respect.

        Args:
            pairs: Every pair that units leave.
            unreached: Names of the pairs that stay whole because no batch reached them.

        Raises:
            ConfigError: A pattern of `protect` matches none of `pairs`; queries, keys and values of
                an attention cannot keep equal widths; there are no rotary couples to share; or a
                pair that no batch reached would have to lose units with others.
        """
        for pattern in self.protect:
            if not any(fnmatchcase(pair.name, pattern) for pair in pairs):
                raise ConfigError(f"protect pattern {pattern!r} matches no pair.")
        if self.shared_couples and not any(p.kind == "qk" and p.channels > 1 for p in pairs):
            raise ConfigError("shared_couples: this model has no rotary couples.")
        if self.tied_widths:
            self._check_tied(pairs)
        if self.whole_groups:
            for name, own in _attentions(pairs).items():
                if {p.kind for p in own} != {"qk", "vo"} and not all(map(self.protects, own)):
                    raise ConfigError(
                        f"whole_groups: {name} can lose units of {own[0].name} only, and not whole "
                        f"heads; protect {own[0].name} to leave it whole."
                    )
        places = {_place(p.name): p.name for p in pairs if p.kind in self.uniform_kinds}
        for name in unreached:
            if (other := places.get(_place(name))) and not self._protected(other, pairs):
                raise ConfigError(
                    f"uniform: {name} stays whole, because no batch reached it, and {other} would "
                    "have to keep the same width; search with batches that reach both."
                )

    def _check_tied(self, pairs: Sequence[Pair]) -> None:
        for name, found in _attentions(pairs).items():
            if all(self.protects(pair) for pair in found):
                continue
            kinds = [pair.kind for pair in found]
            if sorted(kinds) != ["qk", "vo"]:
                reason = "only some of its channels are rotated, or only one of its pairs can lose"
                raise ConfigError(
                    f"tied_widths: {name} has the pairs {', '.join(p.name for p in found)}: "
                    f"{reason} units; protect them to leave it whole."
                )
            qk, vo = sorted(found, key=lambda pair: pair.kind)
            if qk.width * qk.channels != vo.width:
                raise ConfigError(
                    f"tied_widths: heads of {name} have {qk.width * qk.channels} channels for "
                    f"queries and {vo.width} for values; protect {qk.name} and {vo.name} to leave "
                    "them whole."
                )

    def _protected(self, name: str, pairs: Sequence[Pair]) -> bool:
        return any(pair.name == name and self.protects(pair) for pair in pairs)

    def ranked(self, pairs: Sequence[Pair]) -> tuple[Pair, ...]:
        """Return the pairs as they lose ranks: where whole heads leave, a rank is a head.

        Such a pair is turned around: its `heads` are the units of a head, its `width` the heads.
        """
        return tuple(
            replace(pair, heads=pair.width, width=pair.heads) if self.by_head(pair) else pair
            for pair in pairs
        )

    def by_head(self, pair: Pair) -> bool:
        """Return whether a pair loses whole heads."""
        return self.whole_groups and pair.kind in ("qk", "vo")

    def teams(self, pairs: Sequence[Pair]) -> tuple[list[Team], list[int]]:
        """Return the pairs that lose their ranks together, and the first rank that may leave.

        Args:
            pairs: Every pair that units leave, from `ranked`. `check` has passed.

        Returns:
            The teams, in the order of their first pairs, and for every pair the first rank that
            may leave.

        Raises:
            ConfigError: A pair of a team is protected, and another is not.
        """
        groups: list[list[int]] = [[i] for i in range(len(pairs))]
        for alike in self._alike(pairs):
            joined = [group for group in groups if {*group} & {*alike}]
            groups = [group for group in groups if group not in joined]
            groups.append(sorted(i for group in joined for i in group))
        teams = [self._team(pairs, group) for group in sorted(groups)]
        low = [
            p.width if self.protects(p) else 1 if self.by_head(p) else self.least(p.kind)
            for p in pairs
        ]
        return teams, low

    def _alike(self, pairs: Sequence[Pair]) -> list[list[int]]:
        """Return the indices of pairs that must keep one width."""
        attentions = _attentions(pairs)
        whole = {name for name, own in attentions.items() if all(map(self.protects, own))}
        found: dict[Any, list[int]] = {}
        for i, p in enumerate(pairs):
            if p.kind in self.uniform_kinds:
                shape = (p.kind, p.heads, p.width, p.channels, p.left[0].repeat)
                found.setdefault(shape, []).append(i)
            together = self.tied_widths or self.whole_groups
            if together and p.kind in ("qk", "vo") and attention_of(p) not in whole:
                found.setdefault(attention_of(p), []).append(i)
        return [group for group in found.values() if len(group) > 1]

    def _team(self, pairs: Sequence[Pair], group: list[int]) -> Team:
        own = [pairs[i] for i in group]
        whole = [pair.name for pair in own if self.protects(pair)]
        if whole and len(whole) < len(own):
            [other, *_] = [pair.name for pair in own if not self.protects(pair)]
            raise ConfigError(
                f"protect keeps {whole[0]} dense, and uniform, tied_widths or whole_groups gives "
                f"{other} the same width; protect both or neither."
            )
        if any(self.by_head(pair) for pair in own):
            return Team(tuple(group), (1,) * len(own), tuple(p.heads * p.cost for p in own))
        # Two channels of the values leave with every couple of the queries and keys.
        scales = [max(pair.channels for pair in own) // pair.channels for pair in own]
        base = [
            self.multiple(pair.kind) // math.gcd(self.multiple(pair.kind), scale)
            for pair, scale in zip(own, scales, strict=True)
        ]
        ranks = tuple(math.lcm(*base) * scale for scale in scales)
        return Team(tuple(group), ranks, tuple(pair.heads * pair.cost for pair in own))

    def tightened(self, other: "Constraints") -> "Constraints":
        """Return constraints that respect both these and others.

        Args:
            other: The others. The target of this one is kept.
        """
        return Constraints(
            multiple_of=_both(self.multiple_of, other.multiple_of, math.lcm, 1),
            min_width=_both(self.min_width, other.min_width, max, 0),
            protect=tuple(dict.fromkeys((*self.protect, *other.protect))),
            uniform=_kinds(self.uniform_kinds | other.uniform_kinds),
            tied_widths=self.tied_widths or other.tied_widths,
            shared_couples=self.shared_couples or other.shared_couples,
            whole_groups=self.whole_groups or other.whole_groups,
            target=self.target or other.target,
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the constraints as plain values, for JSON, those that say nothing left out.

        `multiple_of`, `min_width` and `protect` are always there.
        """
        value: dict[str, Any] = {
            "multiple_of": _plain(self.multiple_of),
            "min_width": _plain(self.min_width),
            "protect": list(self.protect),
        }
        if kinds := self.uniform_kinds:
            value["uniform"] = True if kinds == {*KINDS} else sorted(kinds)
        for name in ("tied_widths", "shared_couples", "whole_groups", "target"):
            if given := getattr(self, name):
                value[name] = given
        return value

    def __str__(self) -> str:
        unsaid = {"multiple_of": 1, "min_width": 0, "protect": []}
        said = {name: value for name, value in self.to_dict().items() if value != unsaid.get(name)}
        return ", ".join(f"{name}={value}" for name, value in said.items())

    @property
    def binding(self) -> bool:
        """Whether they can change a plan at all."""
        return any(
            self.multiple(kind) > 1 or self.least(kind) or kind in self.uniform_kinds
            for kind in KINDS
        ) or bool(self.protect or self.tied_widths or self.shared_couples or self.whole_groups)


def _check_kinds(name: str, kinds: Any) -> None:
    if isinstance(kinds, str) or not isinstance(kinds, Collection):
        raise ConfigError(f"{name} must name kinds among {', '.join(KINDS)}; got {kinds!r}.")
    for kind in kinds:
        if kind not in KINDS:
            raise ConfigError(f"{name} names {kind!r}; the kinds are {', '.join(KINDS)}.")


def _of(value: PerKind, kind: str, default: int) -> int:
    return value.get(kind, default) if isinstance(value, Mapping) else value


def _plain(value: PerKind) -> Any:
    return dict(value) if isinstance(value, Mapping) else value


def _both(one: PerKind, other: PerKind, join: Any, default: int) -> PerKind:
    found = {kind: join(_of(one, kind, default), _of(other, kind, default)) for kind in KINDS}
    if len({*found.values()}) == 1:
        return int(found[KINDS[0]])
    return {kind: number for kind, number in found.items() if number != default}


def _kinds(kinds: frozenset[str]) -> bool | tuple[str, ...]:
    return kinds == {*KINDS} or tuple(sorted(kinds))


def _place(name: str) -> str:
    """Return the name of a pair with its indices left out: equal for all layers of a stack."""
    return re.sub(r"\.\d+(?=\.)", ".*", name)


def attention_of(pair: Pair) -> str:
    """Return the name of the attention of a query-key or value-output pair."""
    return pair.name.removesuffix(".qk").removesuffix(".vo").removesuffix(".unrotated")


def _attentions(pairs: Sequence[Pair]) -> dict[str, list[Pair]]:
    found: dict[str, list[Pair]] = {}
    for pair in pairs:
        if pair.kind in ("qk", "vo"):
            found.setdefault(attention_of(pair), []).append(pair)
    return found
