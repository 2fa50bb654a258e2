"""The text side of a checkpoint: transformers' class for it, without what only images, videos and sounds go through.

Knows transformers' auto classes and how its models are put together; knows nothing of packed tokens, and reads no
weights itself.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from bmx.model.spec import no_attention, no_padding, refusal, use_attention

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class TextSide:
    """How a checkpoint's text side is made.

    Attributes:
        auto: transformers' auto class for it.
        config: the checkpoint's config.
        model_class: the model's class, if the config has several parts.
        left_out: names of the modules that no text goes through: vision towers, projectors, audio encoders.
    """

    auto: Any
    config: Any
    model_class: Any = None
    left_out: tuple[str, ...] = ()

    def holds(self, tensor: str) -> bool:
        """Whether a tensor of the checkpoint, by its name there, is read."""
        others = {name.rpartition(".")[2] for name in self.left_out}
        ignored = getattr(self.model_class, "_keys_to_ignore_on_load_unexpected", None) or ()
        return others.isdisjoint(tensor.split(".")) and not any(re.search(pattern, tensor) for pattern in ignored)

    def on_meta(self, dtype: str, trust_remote_code: bool) -> Any:
        """The model with tensors without contents.

        Args:
            dtype: torch's name of the type.
            trust_remote_code: whether a checkpoint's own code may run.
        """
        model = _on_meta(self.auto, self.config, dtype, trust_remote_code)
        _leave_out(model, self.left_out)
        return model

    def load(self, source: str, **options: Any) -> tuple[Any, dict[str, Any]]:
        """The model with its weights, and transformers' account of the loading; weights left out are never read.

        Args:
            source: folder or hub id.
            options: those of ``from_pretrained``.
        """
        chosen = _class_without(self.model_class, self.left_out) if self.left_out else self.auto
        model, loading = chosen.from_pretrained(source, config=self.config, output_loading_info=True, **options)
        return model, loading


def find_text_side(config: Any, trust_remote_code: bool) -> TextSide:
    """The text side of the checkpoint that a config describes.

    Modules beside the text's decoder are left out if a forward over text runs without them. Only in a config of several
    parts, by transformers' own code, is there anything to leave out.

    Args:
        config: transformers' config; it is not changed.
        trust_remote_code: whether a checkpoint's own code may run.

    Raises:
        ModelError: the checkpoint writes no text, or is no single model.
    """
    from torch.nn import Module

    auto = _auto_class(config)
    if config.get_text_config(decoder=True) is config:
        return TextSide(auto=auto, config=config)
    model = _on_meta(auto, config, "bfloat16", trust_remote_code)  # on the meta device, experts take this type alone
    if type(model).forward is Module.forward:
        raise refusal(type(model).__name__, "it is several models in one")
    own_class = type(model.config) is type(config) and type(model).__module__.startswith("transformers.")
    names = _unneeded(model, tuple(_beside_decoder(model))) if own_class else ()
    return TextSide(auto=auto, config=config, model_class=type(model), left_out=names)


def _auto_class(config: Any) -> Any:
    """transformers' auto class for the text side of a checkpoint.

    Raises:
        ModelError: it has none.
    """
    import transformers

    kind, own = type(config), getattr(config, "auto_map", None) or {}
    if kind in transformers.MODEL_FOR_CAUSAL_LM_MAPPING or "AutoModelForCausalLM" in own:
        return transformers.AutoModelForCausalLM
    if kind in transformers.AutoModelForMultimodalLM._model_mapping:
        return transformers.AutoModelForMultimodalLM
    name = (getattr(config, "architectures", None) or [kind.__name__])[0]
    raise refusal(name, "transformers has no class that writes text with it")


def _on_meta(auto: Any, config: Any, dtype: str, trust_remote_code: bool) -> Any:
    import torch

    config = deepcopy(config)
    if getattr(config, "quantization_config", None) is not None:
        del config.quantization_config
    with torch.device("meta"):
        model = auto.from_config(config, dtype=getattr(torch, dtype), trust_remote_code=trust_remote_code)
    return model.eval()


def _beside_decoder(model: Any) -> Iterator[str]:
    """Names of the modules outside of a model's text decoder, input embeddings and output head, the outermost ones."""
    try:
        text = (model.get_decoder(), model.get_input_embeddings(), model.get_output_embeddings())
    except (NotImplementedError, AttributeError):
        return
    ids = {id(module) for module in text}

    def beside(module: Any, name: str) -> Iterator[str]:
        if id(module) in ids:
            return
        if ids.isdisjoint(map(id, module.modules())):
            yield name
            return
        for child, inner in module.named_children():
            yield from beside(inner, f"{name}.{child}" if name else child)

    yield from beside(model, "")


def _unneeded(model: Any, names: tuple[str, ...]) -> tuple[str, ...]:
    """Those of some modules without which a model still computes a text; none where it does not compute one at all.

    Args:
        model: on the meta device; it is left without them.
        names: of the modules.
    """
    modules = {name: model.get_submodule(name) for name in names}
    _leave_out(model, names)
    if not names or _computes_text(model):
        return names
    for name, module in modules.items():
        _put(model, name, module)
    unneeded = []
    for name, module in modules.items():
        _leave_out(model, (name,))
        if _computes_text(model):
            unneeded.append(name)
        else:
            _put(model, name, module)
    return tuple(unneeded)


def _computes_text(model: Any) -> bool:
    """Whether a forward over text runs on a model without contents; what its code raises says no."""
    import torch

    tokens = torch.tensor([[1, 2, 3]], device="meta")
    try:
        with use_attention(model, no_attention, _no_mask), torch.inference_mode():
            model(input_ids=tokens, attention_mask=no_padding(model, 3), position_ids=tokens, use_cache=False)
    except Exception:
        return False
    return True


def _no_mask(*_: Any, **__: Any) -> Tensor:
    import torch

    return torch.empty(1, 1, 1, 1, device="meta")


def _class_without(model_class: Any, names: tuple[str, ...]) -> Any:
    """A model's class without some of its modules; what transformers knows by the class's name and file still holds."""

    class WithoutThem(model_class):  # type: ignore[misc]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            _leave_out(self, names)

    for attribute in ("__name__", "__qualname__", "__module__", "__doc__"):
        setattr(WithoutThem, attribute, getattr(model_class, attribute))
    return WithoutThem


def _leave_out(model: Any, names: tuple[str, ...]) -> None:
    """Put modules without tensors in place of some of a model's; nothing can call them."""
    from torch import nn

    for name in names:
        _put(model, name, nn.Module())


def _put(model: Any, name: str, module: Any) -> None:
    parent, _, own = name.rpartition(".")
    setattr(model.get_submodule(parent), own, module)
