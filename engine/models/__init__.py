"""The model kinds: the only place where one is named. A kind turns the text after NAME= into a model on its device.

attention[:hidden=512,heads=8,weights=FILE,...]     one MultiHeadAttention layer: kv_heads, head_dim, kdim, vdim, bias,
                                                    add_bias_kv, add_zero_attn, rotary, seed, max_length, dtype
DIRECTORY | FILE.gguf | hf:ORG/NAME | default       a decoder; `default` is the model that keypast comes with
"""

from collections.abc import Callable

from engine.models.base import LoadedModel, LoadOptions, Progress
from engine.models.build import build_attention, build_decoder

Builder = Callable[[str, str, LoadOptions, Progress], LoadedModel]

MODEL_KINDS: dict[str, Builder] = {"attention": build_attention, "decoder": build_decoder}


def build(name: str, spec: str, options: LoadOptions, progress: Progress) -> LoadedModel:
    """Raises InvalidInput naming what is wrong with the spec or the files behind it."""
    kind = "attention" if spec.partition(":")[0] == "attention" else "decoder"
    return MODEL_KINDS[kind](name, spec, options, progress)
