"""The result of a search: an order of all units that gives members of any size."""

import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from solpath.config import check_count
from solpath.errors import BudgetError, ConfigError
from solpath.pair import Fingerprint, Pair, flatten
from solpath.planning.budget import Budget
from solpath.planning.constraints import Constraints, PerKind
from solpath.planning.cost import Achieved, CostTable
from solpath.planning.latency_table import LatencyTable
from solpath.planning.making import make_plan
from solpath.planning.path_files import read_path, write_path
from solpath.planning.plan import Plan
from solpath.planning.targets import constraints_for

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class CurvePoint:
    """One size, and the loss that the search saw at that expected size.

    Attributes:
        size: The size under every measure.
        loss: The loss; None on the path of a baseline, which saw none.
    """

    size: Achieved
    loss: float | None


@dataclass(frozen=True, eq=False)
class SolutionPath:
    """The order of all units of one dense model, from which members of every size are cut.

    Attributes:
        pairs: The pairs of the model.
        score: Pair name to float64 ``[heads, width]``. The order is by falling score; of equal
            scores, the earlier unit comes first.
        entry_time: Pair name to float64 ``[heads, width]``. For the paper's inclusion, the step at
            which a unit enters; beyond the last step it is extrapolated. Otherwise the share of
            the prunable parameters that is kept once the unit is in.
        costs: What the dense model and every unit cost.
        method: Name of the search or baseline.
        config: Its settings.
        fingerprint: Identity of the dense model.
        history: Loss and expected share of the prunable parameters at every step, float64
            ``[2, steps]``. Baselines leave it empty.
        energy: For pairs with norms over the heads, pair name to float64
            ``[heads, query heads per head + 1, width]``: sums of squares over some tokens, of
            every unit of the queries, then of the key.
        basis: Pair name to the axes along which its units lie, float64 ``[heads, width, width]``
            (see `solpath.model.basis`). Pairs that are not in it have the channels as units.
        unreached: Names of the pairs that no batch reached. They are not in `pairs`: they stay
            whole in every plan, and their parameters do not count as prunable.
        seen: Digests of the samples that the method ran on, int64 ``[samples]``, ascending, by
            which `solpath.choose` refuses them; empty if that is not known. Whoever has them can
            tell whether a sample was among them, so short texts can be guessed:
            ``dataclasses.replace(path, seen=path.seen[:0])`` is without.

    Example:
        >>> path
        SolutionPath(spp: 256 units in 6 pairs of BertForSequenceClassification,
        16,704 of 37,922 parameters prunable, 4 steps, seed 0)
    """

    pairs: tuple[Pair, ...]
    score: Mapping[str, Tensor]
    entry_time: Mapping[str, Tensor]
    costs: CostTable
    method: str
    config: Mapping[str, Any]
    fingerprint: Fingerprint
    history: Tensor = field(default_factory=lambda: torch.zeros(2, 0, dtype=torch.float64))
    energy: Mapping[str, Tensor] = field(default_factory=dict)
    basis: Mapping[str, Tensor] = field(default_factory=dict)
    unreached: tuple[str, ...] = ()
    seen: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64))

    def order(self) -> Tensor:
        """Return all units, the most important first.

        Returns:
            Indices into the units of all pairs laid end to end, int64 ``[units]``.
        """
        return flatten(self.pairs, self.score).argsort(descending=True, stable=True)

    def plan(
        self,
        budget: Budget | None = None,
        *,
        sparsity: float | None = None,
        params: float | None = None,
        bytes: float | None = None,
        macs: float | None = None,
        cache: float | None = None,
        latency_ms: float | None = None,
        latency: LatencyTable | None = None,
        multiple_of: PerKind = 1,
        min_width: PerKind = 0,
        protect: Sequence[str] = (),
        uniform: bool | Collection[str] = False,
        tied_widths: bool = False,
        shared_couples: bool = False,
        whole_groups: bool = False,
        for_: str | None = None,
    ) -> Plan:
        """Choose the units that one budget keeps.

        Give exactly one budget: by its measure's name, or as a `Budget`.

        Args:
            budget: A `Budget`, which a measure of your own needs.
            sparsity: Share of the prunable parameters to remove, in [0, 1).
            params: Parameters to keep in the whole model: a share of the dense model's in (0, 1],
                or a count above 1.
            bytes: Bytes to keep of all saved parameters and buffers, in the dtype in which the
                model was searched: a share or a count.
            macs: Multiply-accumulates to keep, for one sample: a share or a count.
            cache: Bytes to keep of the key-value cache per generated token, in that dtype: a share
                or a count.
            latency_ms: Milliseconds that one forward pass may take, by the table `latency`.
            latency: A table from `measure_latency`, for the machine and the batch that matter.
            multiple_of: Every head keeps a multiple of this many units, or all of its units: a
                number, or kind to number, such as ``{"qk": 4, "mlp": 32}``. A unit of rotary
                queries and keys is a couple of channels.
            min_width: Units that every head keeps at least: a number, or kind to number.
            protect: Shell patterns of the names of pairs that stay dense, such as ``"*layer.0.*"``.
            uniform: Pairs of one kind and shape keep the same width in every layer: True for all
                kinds, or some kinds, such as ``["mlp"]``.
            tied_widths: Queries, keys and values of an attention keep equally many channels.
            shared_couples: All heads keep the same rotary couples of queries and keys.
            whole_groups: Attentions lose whole heads, a key-value head with its query heads, in
                place of units inside heads. One of them stays at least. Not for `latency_ms`.
            for_: Name of a target: the constraints of one runtime, see `solpath.planning.targets`.
                The other arguments may tighten them.

        Returns:
            The plan whose size is nearest to the budget, above or below it. For `latency_ms`, the
            largest plan that is predicted to be fast enough; `plan_for_latency` also measures it.
            Plans with equal constraints (all arguments from `multiple_of` on) are nested: the
            smaller one keeps a subset of the units of the larger one. `Plan.constraint_cost` says
            what they cost.

        Raises:
            BudgetError: No budget or several are given, or it is out of range or not reachable.
            ConfigError: A constraint is out of range, a pattern matches no pair, or this model
                cannot respect the constraints or those of the target. The message names the
                nearest target that is possible.
            FingerprintError: The latency table is for a model of another class or other shapes.

        Example:
            >>> plan = path.plan(sparsity=0.5, multiple_of=4)
            >>> round(plan.achieved.sparsity, 1), {width % 4 for width in plan.widths.values()}
            (0.5, {0})
        """
        given = {"sparsity": sparsity, "params": params, "bytes": bytes, "macs": macs}
        given |= {"cache": cache, "latency_ms": latency_ms}
        if budget is None:
            budget = Budget.of(given, latency)
        elif any(value is not None for value in (*given.values(), latency)):
            raise BudgetError("give a Budget, or one by name, not both.")
        elif not isinstance(budget, Budget):
            raise BudgetError(f"a budget says of what: sparsity={budget!r}, for example.")
        constraints = Constraints(
            multiple_of=multiple_of,
            min_width=min_width,
            protect=protect if isinstance(protect, str) else tuple(protect),
            uniform=uniform,
            tied_widths=tied_widths,
            shared_couples=shared_couples,
            whole_groups=whole_groups,
        )
        if for_ is not None:
            target = constraints_for(
                for_,
                self.fingerprint.architecture,
                self.pairs,
                self.unreached,
                whole_groups=whole_groups,
            )
            constraints = target.tightened(constraints)
        plan = make_plan(
            self.pairs,
            self.score,
            self.costs,
            self.fingerprint,
            budget,
            constraints,
            self.energy,
            self.basis,
            self.unreached,
        )
        if plan.constraint_cost is None or not self.history.shape[1]:
            return plan
        cost = replace(
            plan.constraint_cost,
            loss=self._loss_near(plan.achieved.sparsity),
            equal_loss=self._loss_near(plan.constraint_cost.equal_sparsity),
        )
        return replace(plan, constraint_cost=cost)

    def _loss_near(self, sparsity: float) -> float:
        """Return the mean loss of the twentieth of the steps that were nearest to a size."""
        near = (self.history[1] - (1 - sparsity)).abs()
        window = near.argsort(stable=True)[: max(1, self.history.shape[1] // 20)]
        return self.history[0, window].mean().item()

    def curve(self, points: int = 20) -> list[CurvePoint]:
        """Return sizes from dense to almost nothing, with the loss that the search saw there.

        That loss is of random sub-networks, or of continuous masks, at the expected size. It
        compares sizes of one path; for figures to report, use `evaluate` on members.

        Args:
            points: Number of sizes, from sparsity 0 to 0.98 in equal steps. At least 2.

        Raises:
            ConfigError: `points` is below 2.

        Example:
            >>> dense, half, least = path.curve(3)
            >>> dense.size.params
            37922
        """
        check_count("points", points, 2)
        result = []
        for i in range(points):
            size = self.plan(sparsity=0.98 * i / (points - 1)).achieved
            loss = self._loss_near(size.sparsity) if self.history.shape[1] else None
            result.append(CurvePoint(size, loss))
        return result

    def plot(self) -> "Figure":
        """Return a matplotlib figure: loss against sparsity, and units kept by kind of pair.

        Raises:
            ConfigError: matplotlib is not installed.

        Example:
            >>> path.plot()
            <Figure size 900x360 with 2 Axes>
        """
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            raise ConfigError(
                "plot needs matplotlib; install it with: pip install 'solpath[report]'."
            ) from error

        points = self.curve(40)
        figure = Figure(figsize=(9, 3.6), layout="constrained")
        left, right = figure.subplots(1, 2)
        sparsity = [100 * point.size.sparsity for point in points]
        left.plot(sparsity, [float("nan") if p.loss is None else p.loss for p in points])
        left.set(xlabel="sparsity (%)", ylabel="loss in the search", title=self.method)
        for kind in dict.fromkeys(pair.kind for pair in self.pairs):
            pairs = [pair for pair in self.pairs if pair.kind == kind]
            total = sum(pair.units for pair in pairs)
            kept = []
            for percent in sparsity:
                widths = self.plan(sparsity=min(percent / 100, 0.999)).widths
                kept.append(100 * sum(p.heads * widths[p.name] for p in pairs) / total)
            right.plot(sparsity, kept, label=kind)
        right.set(xlabel="sparsity (%)", ylabel="units kept (%)", title="where the units go")
        right.legend()
        return figure

    def __repr__(self) -> str:
        units = sum(pair.units for pair in self.pairs)
        prunable = self.costs.prunable(self.pairs)
        params = self.costs.dense["params"]
        whole = f", {len(self.unreached)} unreached pairs whole" if self.unreached else ""
        return (
            f"SolutionPath({self.method}: {units:,} units in {len(self.pairs)} pairs of "
            f"{self.fingerprint.architecture}, {prunable:,} of {params:,} parameters prunable, "
            f"{self.config.get('steps', 0)} steps, seed {self.config.get('seed', 0)}{whole})"
        )

    def save(self, path: str | os.PathLike[str], *, overwrite: bool = False) -> None:
        """Write the path into a folder, as ``path.json`` and ``path.safetensors``, atomically.

        Args:
            path: The folder. It is made if need be.
            overwrite: Replace a folder that solpath wrote, although it is not empty.

        Raises:
            FileError: The folder is not empty and `overwrite` is False, or solpath did not write
                what is in it, or it cannot be written.

        Example:
            >>> path.save("saved")
        """
        write_path(path, vars(self), overwrite=overwrite)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "SolutionPath":
        """Read a path that was written by `save`.

        Args:
            path: The folder.

        Raises:
            FileError: A file is missing, damaged or of another version. The message names it.

        Example:
            >>> path.save("found")
            >>> solpath.SolutionPath.load("found").order().equal(path.order())
            True
        """
        return cls(**read_path(Path(path)))


def check_path(path: Any) -> None:
    """Raise `ConfigError` unless `path` is a path.

    Args:
        path: What a user gave.
    """
    if isinstance(path, str | os.PathLike):
        raise ConfigError(
            f"path must be a SolutionPath, got the name of a folder; give "
            f"SolutionPath.load({os.fspath(path)!r})."
        )
    if not isinstance(path, SolutionPath):
        raise ConfigError(f"path must be a SolutionPath, got a {type(path).__name__}.")
