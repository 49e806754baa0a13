"""The result of a search: an order of all units that gives a model of any size."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from solpath.errors import BudgetError, ConfigError, FileError
from solpath.files import check_format, json_bytes, new_folder, read_json, read_tensors
from solpath.pair import Fingerprint, Pair
from solpath.planning.budget import Budget, Constraints
from solpath.planning.cost import Achieved, CostTable
from solpath.planning.latency_table import LatencyTable
from solpath.planning.plan import Plan, make_plan

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FORMAT_VERSION = 2


@dataclass(frozen=True)
class CurvePoint:
    """One size of the family and the loss the search saw at that expected size (None if none)."""

    size: Achieved
    loss: float | None


@dataclass(frozen=True, eq=False)
class SolutionPath:
    """A total order of every removable unit of one model.

    Attributes:
        pairs: what can be pruned.
        score: pair name to float64 ``[heads, width]``; the order is score descending, then index.
        entry_time: pair name to float64 ``[heads, width]``. For the paper's inclusion the time at
            which the unit enters (beyond `steps`: extrapolated); otherwise the share of the
            prunable cost that is kept when it enters.
        costs: cost of the dense model and of every unit.
        method: name of the search or baseline.
        config: its settings.
        fingerprint: the model the order belongs to.
        history: float64 ``[2, steps]``: loss and expected share kept at every step.
        energy: for pairs with norms between projection and logits, pair name to float64
            ``[heads, query heads per head + 1, width]``: sums of squares of each unit of the
            queries, then of the key, over some tokens.
        basis: pair name to float64 ``[heads, width, width]``: the axes its units are along, where
            they are not the channels themselves; see `solpath.model.basis`.
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

    def order(self) -> Tensor:
        """All units, most important first. int64 ``[units]`` into the pairs laid end to end."""
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
        multiple_of: int = 1,
        min_width: int = 0,
        protect: Sequence[str] = (),
    ) -> Plan:
        """Cut the order to one budget.

        Args:
            budget: in place of one by name: a measure of your own needs it.
            sparsity: share of the prunable parameters to remove, in [0, 1).
            params: parameters to keep in the whole model: a share in (0, 1], or a count.
            bytes: bytes to keep of all that is saved, weights and buffers in the dtype the model
                was searched in, likewise.
            macs: multiply-accumulates to keep, likewise.
            cache: bytes of the key-value cache per token to keep, in that dtype, likewise.
            latency_ms: milliseconds that one forward pass may take by the table `latency`.
            latency: from `measure_latency`, on the machine and the batch that count.
            multiple_of: every head keeps a multiple of this many units (or all of them).
            min_width: units every head keeps at least.
            protect: shell patterns of pair names that stay dense, e.g. ``"*layer.0.*"``.

        Returns:
            The plan nearest to the budget; for `latency_ms` the largest that is predicted to be
            fast enough, which `plan_for_latency` also verifies. Plans made with the same
            `multiple_of`, `min_width` and `protect` are nested: the smaller keeps a subset of what
            the larger keeps.

        Raises:
            BudgetError: none or several budgets, out of range, or not reachable.
            ConfigError: a bad `multiple_of` or `min_width`, or a pattern that matches nothing.
            FingerprintError: the latency table is for a model of other shapes.
        """
        given = {"sparsity": sparsity, "params": params, "bytes": bytes, "macs": macs}
        given |= {"cache": cache, "latency_ms": latency_ms}
        if budget is None:
            budget = Budget.of(given, latency)
        elif any(value is not None for value in (*given.values(), latency)):
            raise BudgetError("give a Budget, or one by name, not both.")
        return make_plan(
            self.pairs,
            self.score,
            self.costs,
            self.fingerprint,
            budget,
            Constraints(multiple_of, min_width, tuple(protect)),
            self.energy,
            self.basis,
        )

    def curve(self, points: int = 20) -> list[CurvePoint]:
        """Sizes from dense to almost nothing, with the loss the search saw there.

        The loss is that of the search where it was at that expected size: of random sub-networks,
        or of continuous masks. It ranks sizes of one path; use `evaluate` on extracted models for
        figures to report.

        Raises:
            ConfigError: `points` is less than 2.
        """
        if points < 2:
            raise ConfigError(f"points must be at least 2, got {points}.")
        result = []
        for i in range(points):
            size = self.plan(sparsity=0.98 * i / (points - 1)).achieved
            loss = None
            if self.history.shape[1]:
                near = (self.history[1] - (1 - size.sparsity)).abs()
                window = near.argsort(stable=True)[: max(1, self.history.shape[1] // 20)]
                loss = self.history[0, window].mean().item()
            result.append(CurvePoint(size, loss))
        return result

    def plot(self) -> "Figure":
        """Loss against size, and the share kept by kind of pair, as a matplotlib figure.

        Raises:
            ConfigError: matplotlib is not installed.
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
        params = self.costs.dense["params"]
        return (
            f"SolutionPath({self.method}: {units:,} units in {len(self.pairs)} pairs of "
            f"{self.fingerprint.architecture}, {prunable:,} of {params:,} parameters prunable, "
            f"{self.config.get('steps', 0)} steps, seed {self.config.get('seed', 0)})"
        )

    def save(self, path: str | os.PathLike[str], *, overwrite: bool = False) -> None:
        """Write ``path.json`` and ``path.safetensors`` into a folder, atomically.

        Raises:
            FileError: the folder is not empty (and not `overwrite`), or cannot be written.
        """
        tensors = {
            "score": flatten(self.pairs, self.score),
            "entry_time": flatten(self.pairs, self.entry_time),
            "history": self.history.contiguous(),
        }
        tensors |= {f"energy.{name}": value.contiguous() for name, value in self.energy.items()}
        tensors |= {f"basis.{name}": value.contiguous() for name, value in self.basis.items()}
        header = {
            "format": "solpath.path",
            "version": FORMAT_VERSION,
            "method": self.method,
            "config": dict(self.config),
            "pairs": [pair.to_dict() for pair in self.pairs],
            "costs": self.costs.to_dict(),
            "fingerprint": asdict(self.fingerprint),
            "steps_recorded": self.history.shape[1],
            "basis": list(self.basis),
        }
        with new_folder(path, overwrite=overwrite) as folder:
            save_file(tensors, folder / "path.safetensors")
            (folder / "path.json").write_bytes(json_bytes(header))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "SolutionPath":
        """Read a folder written by `save`.

        Raises:
            FileError: a missing or damaged file, naming the file and the field.
        """
        file = Path(path) / "path.json"
        header = read_json(file)
        advice = "a path of another version has to be searched again"
        check_format(file, header, "solpath.path", FORMAT_VERSION, advice)
        try:
            pairs = tuple(Pair.from_dict(pair) for pair in header["pairs"])
            costs = CostTable.from_dict(header["costs"])
            fingerprint = Fingerprint(**header["fingerprint"])
            units = sum(pair.units for pair in pairs)
            steps = int(header["steps_recorded"])
            method, config = str(header["method"]), dict(header["config"])
            rotated = [str(name) for name in header["basis"]]
            costs.achieved(pairs, {pair.name: pair.width for pair in pairs})
            dict(fingerprint.digests)
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise FileError(f"{file}: {type(error).__name__} in field {error}.") from error
        expected = {
            "score": (torch.float64, (units,)),
            "entry_time": (torch.float64, (units,)),
            "history": (torch.float64, (2, steps)),
        }
        normed = [pair for pair in pairs if pair.norms]
        for pair in normed:
            shape = (pair.heads, pair.left[0].repeat + 1, pair.width)
            expected[f"energy.{pair.name}"] = (torch.float64, shape)
        named = {pair.name: pair for pair in pairs}
        for name in rotated:
            if name not in named:
                raise FileError(f"{file}: basis names {name!r}, which is no pair.")
            pair = named[name]
            expected[f"basis.{name}"] = (torch.float64, (pair.heads, pair.width, pair.width))
        tensors = read_tensors(Path(path) / "path.safetensors", expected)
        for name in expected.keys() - {"history"}:
            if not torch.isfinite(tensors[name]).all():
                raise FileError(f"{Path(path) / 'path.safetensors'}: {name} is not finite.")
        return cls(
            pairs,
            unflatten(pairs, tensors["score"]),
            unflatten(pairs, tensors["entry_time"]),
            costs,
            method,
            config,
            fingerprint,
            tensors["history"],
            {pair.name: tensors[f"energy.{pair.name}"] for pair in normed},
            {name: tensors[f"basis.{name}"] for name in rotated},
        )


def flatten(pairs: Sequence[Pair], values: Mapping[str, Tensor]) -> Tensor:
    """Lay values of all pairs end to end. ``{name: [heads, width]} -> [units]``."""
    return torch.cat([values[pair.name].flatten() for pair in pairs])


def unflatten(pairs: Sequence[Pair], values: Tensor) -> dict[str, Tensor]:
    """Inverse of `flatten`. ``[units] -> {name: [heads, width]}``."""
    parts = torch.split(values, [pair.units for pair in pairs])
    return {p.name: part.view(p.heads, p.width) for p, part in zip(pairs, parts, strict=True)}
