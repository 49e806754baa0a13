"""Give a cut attention a class whose modules can be copied and pickled."""

from torch import nn

from solpath.arch import Attention, lookup
from solpath.nn.slim import slim_class


def slimmed(stock: type[nn.Module], model_type: str, table: Attention) -> type[nn.Module]:
    """Return the class of a cut attention, whose modules can be copied and pickled.

    Args:
        stock: The class of the dense attention.
        model_type: The type of the model, as `solpath.arch.lookup` takes it.
        table: Its entry of that type.
    """
    assert table.forward is not None
    place = _tables(model_type).index(table)
    maker = remake, (stock, model_type, place)
    return slim_class(stock, table.forward, maker)  # type: ignore[arg-type]


def remake(stock: type[nn.Module], model_type: str, index: int) -> nn.Module:
    """Return a cut attention without contents, which a pickle then fills.

    Args:
        stock: The class of the dense attention.
        model_type: The type of the model.
        index: The number of the attention among all of that type's table.
    """
    kind = slimmed(stock, model_type, _tables(model_type)[index])
    return kind.__new__(kind)


def _tables(model_type: str) -> list[Attention]:
    return [attention for stack in lookup(model_type) for attention in stack.attentions]
