"""Read what `solpath choose` wrote, for the report."""

from pathlib import Path

from solpath.errors import ConfigError, FileError
from solpath.planning.path import SolutionPath
from solpath.reading import read_json
from solpath.reporting.family import Promise


def read_promise(file: Path, path: SolutionPath) -> Promise:
    """Read the promise in a file of `solpath choose --out`.

    Args:
        file: The file, which holds what `Choice.to_dict` returned.
        path: The path that the choice was made from.

    Raises:
        FileError: It is missing or damaged.
        ConfigError: No size was chosen, or it was one of another path.
    """
    value = read_json(file)
    try:
        passed = [test for test in value["tests"] if test["passed"]]
        if not passed:
            raise ConfigError(f"{file}: no size passed, so there is none to mark.")
        asked = dict(value["plan"]["asked"])
        target = asked.pop("target", None)
        kept = path.plan(**asked, for_=target).to_dict()
        if any(kept[name] != value["plan"][name] for name in ("kept", "fingerprint")):
            raise ConfigError(f"{file} is of another path than this; choose from this one.")
        numbers = {
            "sparsity": passed[-1]["sparsity"],
            "max_loss": value["max_loss"],
            "confidence": value["confidence"],
            "mean": passed[-1]["mean"],
            "bound": passed[-1]["bound"],
        }
        return Promise(
            metric=str(value["metric"]),
            samples=int(value["samples"]),
            compensated=value.get("compensated"),
            groups=value.get("groups"),
            **{name: float(number) for name, number in numbers.items()},
        )
    except (KeyError, TypeError, ValueError) as error:
        raise FileError(f"{file} is not what solpath choose --out writes: {error!r}.") from error
