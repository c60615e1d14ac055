"""What distillation needs of a Hugging Face causal language model: its backbone, its head, its embedding."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import UserError


if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class LMHead:
    """
    The map from a last hidden state to logits, as data.

    Args:
        weight (`torch.Tensor` of shape `[V, d]`): Output embedding.
        bias (`torch.Tensor` of shape `[V]`, *optional*): Added to the logits.
        softcap (`float`, *optional*): Logits become `softcap * tanh(logits / softcap)` (Gemma 2).
        scale (`float`, *optional*, defaults to `1.0`): Factor on the logits (Cohere, Granite).
    """

    weight: Tensor
    bias: Tensor | None = None
    softcap: float | None = None
    scale: float = 1.0

    def __call__(self, hidden: Tensor) -> Tensor:
        """Logits `[..., V]` of hidden states `[..., d]`; the matrix product follows autocast where that is on."""
        if not torch.is_autocast_enabled(hidden.device.type):
            hidden = hidden.to(self.weight.dtype)
        logits = F.linear(hidden, self.weight, self.bias)
        if self.scale != 1.0:
            logits = logits * self.scale
        if self.softcap is not None:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        return logits

    def detach(self) -> LMHead:
        """Returns the same head as a constant: gradients pass through it to the hidden state only."""
        bias = None if self.bias is None else self.bias.detach()
        return LMHead(self.weight.detach(), bias, self.softcap, self.scale)


def base_causal_lm(model: nn.Module) -> PreTrainedModel:
    """Returns the plain transformers model below a PEFT wrapper."""
    from peft import PeftModel

    return model.get_base_model() if isinstance(model, PeftModel) else model  # type: ignore[return-value]


def backbone(model: nn.Module) -> nn.Module:
    """Returns the part of a causal language model that gives the last hidden state (after the final norm)."""
    plain = base_causal_lm(model)
    # OPT calls a part of its base itself, and in transformers 4 Gemma 3 doesn't know its base by its name.
    body = plain.get_decoder()
    if body is plain:
        body = plain.base_model
    if body is plain:
        raise UserError(
            f"{type(plain).__name__} has no backbone apart from its head that transformers tells of: use a causal"
            " language model of another type"
        )
    return body


def dense_weight(parameter: Any) -> Tensor:
    """Returns a weight matrix as numbers: a 4-bit one is dequantised, any other is returned as it is."""
    state = getattr(parameter, "quant_state", None)
    if state is None:
        return parameter
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(parameter.data, state)


def layer_weight(layer: Any) -> Tensor:
    """
    Returns the matrix that a linear layer or an embedding computes with: with what an adapter adds to it.

    Raises:
        UserError: For an adapter that changes the layer in another way.
    """
    # PEFT's wrappers of whole layers, and of some tokens of one, answer with the matrix as it is trained.
    weight = dense_weight(layer.weight)
    if not hasattr(layer, "base_layer") or layer.disable_adapters or layer.merged:
        return weight
    if hasattr(layer, "get_merged_weights"):
        return layer.get_merged_weights(layer.active_adapters)
    for adapter in layer.active_adapters:
        if not hasattr(layer, "get_delta_weight") or getattr(layer, "use_dora", {}).get(adapter):
            raise UserError(
                f"the adapter {adapter!r} changes an embedding or a language-model head in a way that can't be read"
                f" ({type(layer).__name__}): merge it into the model (model.merge_and_unload()), or leave them out"
            )
        weight = weight + layer.get_delta_weight(adapter)
    return weight


def lm_head(model: nn.Module) -> LMHead:
    """Reads the head of a causal language model, and the transforms that its config puts after it."""
    plain = base_causal_lm(model)
    layer = plain.get_output_embeddings()
    if layer is None or not hasattr(layer, "weight"):
        raise UserError(f"{type(plain).__name__} has no language-model head: use a causal language model")
    weight = layer_weight(layer)
    if not weight.is_floating_point():
        raise UserError(
            f"{type(plain).__name__}: its language-model head is quantized to {str(weight.dtype)[6:]}, from which no"
            " loss can be computed: load it with 'lm_head' in llm_int8_skip_modules, or without that setting"
        )
    config = plain.config.get_text_config()
    # Cohere multiplies by `logit_scale`, Granite divides by `logits_scaling`.
    scale = (getattr(config, "logit_scale", None) or 1.0) / (getattr(config, "logits_scaling", None) or 1.0)
    softcap = getattr(config, "final_logit_softcapping", None)
    return LMHead(weight, getattr(layer, "bias", None), softcap, scale)


def input_embedding(model: nn.Module) -> Tensor:
    """Returns the input embedding matrix `[V, d]` of a causal language model."""
    return layer_weight(base_causal_lm(model).get_input_embeddings())


def check_head(model: nn.Module, head: LMHead, name: str) -> None:
    """
    Raises if logits computed from the last hidden state by `head` are not the model's own.

    A model may transform its logits in a way that its config doesn't tell; distilling through a wrong head would go
    unnoticed. Costs one forward pass of four tokens.
    """
    plain = base_causal_lm(model)
    ids = torch.arange(1, 5, device=plain.device).unsqueeze(0)
    was_training = plain.training
    plain.eval()
    with torch.no_grad():
        expected = plain(input_ids=ids, use_cache=False).logits.float()
        # The teacher's head lies where the losses run.
        actual = head(backbone(model)(input_ids=ids, use_cache=False)[0].to(head.weight.device)).float()
    plain.train(was_training)
    difference = (expected.to(actual.device) - actual).abs().max().item() / max(expected.abs().max().item(), 1e-6)
    if not difference <= 0.05:
        raise UserError(
            f"{name} {type(plain).__name__}: logits from its last hidden state differ from its own by"
            f" {difference:.1%}; {_suspects(plain)} not supported: distil with another model"
        )


def check_student_head(model: nn.Module) -> None:
    """Raises for a quantized head: a student's is read in every step, and would be dequantized in every step."""
    layer = base_causal_lm(model).get_output_embeddings()
    weight = getattr(layer, "weight", None)
    if weight is not None and not weight.is_floating_point():
        raise UserError(
            f"the student's language-model head is quantized ({type(layer).__name__}): leave llm_int8_skip_modules of"
            " its quantization_config unset, or put 'lm_head' into it"
        )


def _suspects(model: PreTrainedModel) -> str:
    """Names what may stand between the last hidden state and the logits."""
    read = ("logit_scale", "logits_scaling", "final_logit_softcapping")
    settings = model.config.get_text_config().to_dict()
    found = [
        f"{name}={value!r}"
        for name, value in settings.items()
        if any(part in name for part in ("logit", "lm_head", "output_multiplier"))
        and isinstance(value, (int, float))
        and value not in (0, 1)
        and name not in read
    ]
    if found:
        return f"{' and '.join(found)} in its config {'is' if len(found) == 1 else 'are'}"
    head = type(model.get_output_embeddings()).__name__
    return f"a transform of the logits in its forward pass, or its head ({head}), is"


def answer_positions(labels: Tensor) -> tuple[Tensor, Tensor]:
    """
    Finds the positions that predict a response token.

    Args:
        labels (`torch.Tensor` of shape `[B, S]`): Tokens with -100 on prompt and padding, not shifted.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: the positions `[B, R]` in order, R of them for the longest response, and
        which of them are real.
    """
    valid = labels[:, 1:] != -100
    longest = max(int(valid.sum(1).max()), 1)
    # A stable sort of "is not a response" brings the response rows to the front, in order.
    rows = torch.argsort((~valid).to(torch.uint8), dim=1, stable=True)[:, :longest]
    return rows, valid.gather(1, rows)


def hidden_size(config: PretrainedConfig) -> int:
    """Reads the width of the last hidden state: of the projected output where the embedding is narrower (OPT-350m)."""
    text = config.get_text_config()
    return getattr(text, "word_embed_proj_dim", None) or text.hidden_size


def check_config(config: PretrainedConfig, name: str, role: str, loaded: nn.Module | None = None) -> None:
    """Raises a [`UserError`] unless `config`, or a model that is `loaded`, is a causal (decoder-only) one."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    architectures = list(getattr(config, "architectures", None) or [])
    if loaded is not None:
        architectures.insert(0, type(base_causal_lm(loaded)).__name__)
    if getattr(config, "is_encoder_decoder", False):
        kind = "a sequence-to-sequence model"
    elif any(a.endswith("ForMaskedLM") for a in architectures):
        kind = "a masked language model"
    elif any(a.endswith(("Classification", "QuestionAnswering")) for a in architectures):
        kind = "a classifier"
    elif loaded is not None:
        lm_head(loaded)
        return
    elif type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING and not getattr(config, "auto_map", None):
        kind = "of a kind without causal language models"
    else:
        return
    raise UserError(
        f"{role} {name or config.model_type!r} is {kind} ({', '.join(architectures) or config.model_type}):"
        " distillation needs a causal (decoder-only) language model"
    )


def check_vocabulary(tokenizer: PreTrainedTokenizerBase, embedding_rows: int, role: str) -> None:
    """Raises a [`UserError`] if the tokenizer has tokens for which the model has no embedding."""
    if len(tokenizer) > embedding_rows:
        raise UserError(
            f"the {role}'s tokenizer has {len(tokenizer):,} tokens but its embedding only {embedding_rows:,} rows:"
            " call model.resize_token_embeddings(len(tokenizer)) first, or use the tokenizer that belongs to the model"
        )
