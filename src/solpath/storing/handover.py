"""Let transformers save and load extracted models by its own calls.

Importing this module is enough; `solpath` imports it as soon as transformers' models are imported.

- Loading: transformers lets quantizers change a model that it has built but not filled. The
  `config.json` of an extracted model names ``solpath`` as its quantizer, and `Cutter` cuts the
  model, whatever class or AutoClass is asked for it. Nothing is quantised, and the model that comes
  back is marked as such in no way.
- Saving: transformers has no such place, so `save_pretrained` itself is replaced. For a model that
  was not extracted it does what it did.
"""

import re
from functools import wraps
from pathlib import Path
from typing import Any

from transformers.modeling_utils import PreTrainedModel
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from solpath.errors import FileError
from solpath.planning.plan import plan_of

_stock_save = PreTrainedModel.save_pretrained


@wraps(_stock_save)
def _save_pretrained(self: Any, *args: Any, **kwargs: Any) -> None:
    if plan_of(self) is None:
        _stock_save(self, *args, **kwargs)
        return
    from solpath.storing.checkpoints import save_pretrained

    save_pretrained(self, *args, **kwargs)


PreTrainedModel.save_pretrained = _save_pretrained  # type: ignore[method-assign]


@register_quantization_config("solpath")
class CutterConfig(QuantizationConfigMixin):
    """What `config.json` says about an extracted model: that `solpath.json` says the rest."""

    def __init__(self, **kwargs: Any) -> None:
        self.quant_method = "solpath"  # type: ignore[assignment]


@register_quantizer("solpath")
class Cutter(HfQuantizer):
    """Cuts a model without data to the plan in `solpath.json`, before transformers fills it."""

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: Any = None, **kwargs: Any
    ) -> Any:
        from solpath.storing.reading import cut_

        if not checkpoint_files:
            raise FileError(
                "an extracted model is loaded from its weight files; call solpath.load(folder), "
                "and load_state_dict for other weights."
            )
        cut_(model, [Path(file) for file in checkpoint_files])
        self._buffers = {n: b.clone() for n, b in model.named_buffers() if not b.is_meta}
        # Buffers that are computed are in the file too, which transformers would warn of.
        self._ignored = model._keys_to_ignore_on_load_unexpected
        stored = {f"^{re.escape(name)}$" for name, _ in model.named_non_persistent_buffers()}
        model._keys_to_ignore_on_load_unexpected = stored | set(self._ignored or ())
        return model

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        self.remove_quantization_config(model)  # type: ignore[no-untyped-call]
        vars(model).pop("is_quantized", None)
        model._keys_to_ignore_on_load_unexpected = self._ignored
        for module in model.modules():
            vars(getattr(module, "config", module)).pop("_is_quantized", None)
        for name, value in self._buffers.items():  # transformers has emptied them
            path, _, leaf = name.rpartition(".")
            buffers = model.get_submodule(path)._buffers
            buffers[leaf] = value.to(buffers[leaf].device)
        return model

    def is_serializable(self) -> bool:
        """Return True: `save_pretrained` of the model writes it."""
        return True

    @property
    def is_trainable(self) -> bool:
        """True: the model is trained like any other."""
        return True
