"""vLLM plugin that registers our models; vLLM calls it if this package is installed.

vllm serve custom --runner pooling      # of `export --format vllm`
"""

FAMILIES = ("Qwen2VL", "Qwen2_5_VL", "Qwen3VL")


def register() -> None:
    """The entry point `vllm.general_plugins`; classes are imported when a folder asks for them."""
    from vllm import ModelRegistry

    for family in FAMILIES:
        name = f"MetaEmbed{family}"
        ModelRegistry.register_model(name, f"metaembed_pl.serving.vllm_models:{name}")
