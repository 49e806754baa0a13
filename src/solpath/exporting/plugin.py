"""What vLLM calls when it starts, so that it serves folders of `hub` without their remote code."""

from solpath.exporting.families import FAMILIES

_BACKEND = "vllm.model_executor.models.transformers"
_SERVED = {"AutoModelForCausalLM": "TransformersForCausalLM"}


def register() -> None:
    """Register the classes of cut models with transformers, and with vLLM where it is installed.

    The Auto classes of transformers then load a folder of `hub` with the classes of solpath, and
    vLLM serves it, both without ``trust_remote_code``. It may be called again. It is the entry
    point ``solpath`` of ``vllm.general_plugins``.
    """
    import transformers

    for model_type, family in FAMILIES.items():
        config = family.cut_class(family.config)
        transformers.AutoConfig.register(f"solpath_{model_type}", config, exist_ok=True)
        for stock, auto in family.classes.items():
            cut = family.cut_class(stock)
            getattr(transformers, auto).register(config, cut, exist_ok=True)
    try:
        from vllm import ModelRegistry
    except ImportError:
        return
    known = ModelRegistry.get_supported_archs()
    for family in FAMILIES.values():
        for stock, auto in family.classes.items():
            if auto in _SERVED and f"Solpath{stock}" not in known:
                ModelRegistry.register_model(f"Solpath{stock}", f"{_BACKEND}:{_SERVED[auto]}")
