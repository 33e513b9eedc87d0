"""Floor 2, the science: attention functions, on torch and transformers' registries alone."""

# The names are registered when this module is first imported (see `on_import`). Let that happen here, before one of
# our own files is half imported itself.
import transformers.modeling_utils  # noqa: F401
