"""The model family: RoBERTa's modules and weight names around multi-resolution attention.

Every class is a short subclass of its RoBERTa counterpart. `attn_implementation` chooses the
attention and defaults to `"mra2"` here; `"sdpa"` and `"eager"` give the dense model for comparison.
`HEADS`, at the end, lists the classes.
"""

import copy
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForMultipleChoice,
    AutoModelForPreTraining,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PreTrainedConfig,
    PreTrainedModel,
    RobertaForMaskedLM,
    RobertaForMultipleChoice,
    RobertaForQuestionAnswering,
    RobertaForSequenceClassification,
    RobertaForTokenClassification,
    RobertaModel,
)
from transformers.modeling_outputs import MaskedLMOutput
from transformers.models.roberta.modeling_roberta import (
    RobertaClassificationHead,
    RobertaEmbeddings,
    RobertaEncoder,
    RobertaLMHead,
    RobertaPooler,
    RobertaPreTrainedModel,
)
from transformers.utils import logging

from mra_hf.candidate_choice import CandidateChoiceOutput, candidate_logits
from mra_hf.configuration import BUILTIN_TYPE, MraConfig
from mra_hf.distance_bias import DistanceBias, MraSelfAttention
from mra_hf.remote_code import OwnCode, check_config_class
from mra_hf.sparse_prediction import output_at_labels

logger = logging.get_logger(__name__)

#: BERT's names for the weights of an LM head, as patterns, and ours.
BERT_LM_HEAD_KEYS = {
    r"^cls\.predictions\.transform\.dense\.": "lm_head.dense.",
    r"^cls\.predictions\.transform\.LayerNorm\.": "lm_head.layer_norm.",
    r"^cls\.predictions\.decoder\.": "lm_head.decoder.",
    r"^cls\.predictions\.bias": "lm_head.bias",
}
#: Weight names of Transformers' own MRA, as patterns, and ours.
BUILTIN_KEYS = {r"^mra\.": "roberta.", **BERT_LM_HEAD_KEYS}

#: Names of the one function that RoBERTa's LM head applies.
GELU_NAMES = ("gelu", "gelu_python")
_HUB_ARGUMENTS = ("subfolder", "revision", "cache_dir", "token", "local_files_only", "proxies")


if TYPE_CHECKING:  # what the mixin is mixed into
    _Model = PreTrainedModel
else:
    _Model = object


class MraPreTrainedMixin(OwnCode, _Model):
    """Shared by all classes of the family: default attention, loading of foreign names, saving."""

    config_class = MraConfig
    # RoBERTa's losses are means over a batch. Trainer would take them for sums over all
    # labels of a step, and not divide them by gradient_accumulation_steps.
    accepts_loss_kwargs = False
    _keys_to_ignore_on_load_unexpected = [r"embeddings\.position_ids"]  # noqa: RUF012

    def _check_and_adjust_attn_implementation(self, attn_implementation, *args, **kwargs):
        name = attn_implementation or "mra2"
        try:
            return super()._check_and_adjust_attn_implementation(name, *args, **kwargs)
        except ValueError as error:  # lists what Transformers has only
            raise ValueError(f'{error} Of mra_hf: "mra2", "mra2_s".') from error

    @torch.no_grad()
    def _init_weights(self, module):
        super()._init_weights(module)
        if isinstance(module, DistanceBias):
            module.reset_parameters()

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, **kwargs):
        """As the base class; knows the weight names of Transformers' own MRA (type `"mra"`).

        Raises:
            ValueError: the head of a directory of type `"mra"` would compute something else here.
        """
        kwargs.setdefault("key_mapping", BUILTIN_KEYS)
        return_info = kwargs.pop("output_loading_info", False)
        hub = {name: kwargs[name] for name in _HUB_ARGUMENTS if name in kwargs}
        builtin = _is_builtin(pretrained_model_name_or_path, hub)
        if builtin and cls is MraModel:
            kwargs.setdefault("add_pooling_layer", False)  # theirs has none
        loaded: Any = super().from_pretrained(
            pretrained_model_name_or_path, *args, output_loading_info=True, **kwargs
        )
        model, info = loaded
        # Transformers would undo the renaming on saving, and Trainer could then resume nothing.
        model._weight_conversions = []
        difference = cls._builtin_difference(model, info) if builtin else None
        if difference:
            raise ValueError(
                f"{pretrained_model_name_or_path} holds {difference}. Load it with "
                "transformers.models.mra, or load its encoder (MraModel) and train a new head."
            )
        return (model, info) if return_info else model

    @classmethod
    def _builtin_difference(cls, model, loading_info) -> str | None:
        """Say what a loaded head of Transformers' own MRA is if it would compute something else."""
        return None

    def save_pretrained(self, save_directory, *args, **kwargs):
        """As the base class; `trust_remote_code=True` opens it where mra_hf is installed."""
        if self.config._attn_implementation == "mra2_s":
            self.config.approx_mode = "sparse"  # so that it computes the same when loaded again
        return super().save_pretrained(save_directory, *args, **kwargs)


class MraEmbeddings(RobertaEmbeddings):
    """RoBERTa's embeddings; with `embedding_size`, of that width and projected to `hidden_size`."""

    def __init__(self, config: MraConfig):
        super().__init__(_of_width(config, config.embedding_size))
        self.max_tokens = config.max_tokens
        self.projection = None
        if config.embedding_size is not None:
            self.projection = nn.Linear(config.embedding_size, config.hidden_size)

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        token_type_ids: torch.LongTensor | None = None,
        position_ids: torch.LongTensor | None = None,
        inputs_embeds: Tensor | None = None,
        past_key_values_length: int = 0,
        cache_length: int = 0,  # the same since Transformers 5.24
    ) -> Tensor:
        is_ids = input_ids is not None
        argument, given = ("input_ids", input_ids) if is_ids else ("inputs_embeds", inputs_embeds)
        if not isinstance(given, Tensor) or given.dim() != (2 if is_ids else 3):
            raise ValueError(
                f"{argument} must be a tensor [batch, tokens{'' if is_ids else ', width'}], got "
                f'{getattr(given, "shape", type(given))}; tokenize with return_tensors="pt".'
            )
        length = given.shape[1]
        if length == 0:
            raise ValueError(f"{argument} must hold at least one token, got an empty sequence.")
        if position_ids is None and length > self.max_tokens:
            raise ValueError(
                f"{argument} has {length} tokens, but this model has positions for "
                f"{self.max_tokens}; truncate with the tokenizer (truncation=True, "
                f"max_length={self.max_tokens}) or convert the checkpoint to a longer table "
                "with `mra-hf convert SOURCE OUT --max-length N`."
            )
        _check_rows("input_ids", input_ids, self.word_embeddings)
        _check_rows("position_ids", position_ids, self.position_embeddings)
        _check_rows("token_type_ids", token_type_ids, self.token_type_embeddings)
        inputs = (input_ids, token_type_ids, position_ids, inputs_embeds)
        embeddings = super().forward(*inputs, past_key_values_length or cache_length)
        return embeddings if self.projection is None else self.projection(embeddings)


#: What to do about ids beyond a table.
_REMEDIES = {
    "input_ids": "pass ids of the model's own tokenizer",
    "position_ids": "convert the checkpoint to a longer table (`mra-hf convert SOURCE OUT "
    "--max-length N`), or leave position_ids out",
    "token_type_ids": "leave token_type_ids out (return_token_type_ids=False of the tokenizer)",
}


def _check_rows(name: str, ids: Tensor | None, table: nn.Embedding) -> None:
    """Raise a `ValueError` for ids that a table has no row for, instead of its IndexError.

    Read only where the values are at hand: from a GPU the host would have to wait for them, and a
    graph that is being made has none.
    """
    is_graph = torch.compiler.is_compiling() or torch.jit.is_tracing()
    if is_graph or ids is None or not isinstance(table, nn.Embedding):  # an adapter's has no size
        return
    if ids.device.type != "cpu" or type(ids) is not Tensor or not ids.numel():
        return
    first, last = (int(limit) for limit in ids.aminmax())
    if first < 0 or last >= table.num_embeddings:
        given = first if first < 0 else last
        raise ValueError(
            f"{name} must lie between 0 and {table.num_embeddings - 1}, the rows of this model, "
            f"got {given}; {_REMEDIES[name]}."
        )


class MraLMHead(RobertaLMHead):
    """RoBERTa's LM head; with `embedding_size`, back to that width before the tied decoder."""

    def __init__(self, config: MraConfig):
        super().__init__(_of_width(config, config.embedding_size))
        if config.embedding_size is not None:
            self.dense = nn.Linear(config.hidden_size, config.embedding_size)


class MraModel(MraPreTrainedMixin, RobertaModel):
    """The bare encoder: hidden states `[B, N, hidden_size]` and, with a pooling layer, the pooled
    first token `[B, hidden_size]`.
    """

    def __init__(self, config: MraConfig, add_pooling_layer: bool = True):
        check_config_class(config, MraConfig)
        config.check()  # fields that were set one by one may not fit together
        # Skips RobertaModel.__init__, which would build the embeddings twice.
        super(RobertaModel, self).__init__(config)
        self.gradient_checkpointing = False
        self.embeddings = MraEmbeddings(config)
        self.encoder = RobertaEncoder(config)
        if config.distance_bias_window is not None:
            for index, layer in enumerate(self.encoder.layer):
                layer.get_submodule("attention").self = MraSelfAttention(config, layer_idx=index)
        self.pooler = RobertaPooler(config) if add_pooling_layer else None
        self.post_init()
        logger.info(
            f"{config.density():.1%} of the block pairs are exact at {config.max_tokens} tokens "
            f"(scales {config.resolutions or (config.block_size, 1)}, {config.approx_mode} mode)."
        )


class MraForMaskedLM(MraPreTrainedMixin, RobertaForMaskedLM):
    """Masked language modeling: logits `[B, N, vocab_size]`.

    With `config.sparse_prediction`, a training step with labels computes logits at the labelled
    positions only, `[labelled, vocab_size]`: the same loss and gradients in less memory.
    """

    def __init__(self, config: MraConfig):
        super(RobertaForMaskedLM, self).__init__(config)
        self.roberta = MraModel(config, add_pooling_layer=False)
        self.lm_head = MraLMHead(config)
        self.post_init()

    @property
    def accepts_loss_kwargs(self) -> bool:  # type: ignore[override]  # elsewhere a constant
        """Whether the loss is divided by `num_items_in_batch`, as Trainer asks."""
        return self.config.sparse_prediction

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        **kwargs,
    ) -> MaskedLMOutput | tuple[Tensor, ...]:
        """As RoBERTa's; `config.sparse_prediction` changes the logits of a training step."""
        inputs = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "token_type_ids": token_type_ids,
            "position_ids": position_ids,
            "inputs_embeds": inputs_embeds,
        }
        if labels is None or not self.training or not self.config.sparse_prediction:
            return super().forward(**inputs, labels=labels, **kwargs)
        count = kwargs.pop("num_items_in_batch", None)
        kwargs["return_dict"] = True
        states = self.roberta(**inputs, **kwargs).last_hidden_state
        return output_at_labels(self.lm_head, states, labels, count)

    @classmethod
    def _builtin_difference(cls, model, loading_info) -> str | None:
        hidden_act = model.config.hidden_act
        is_new = any(key.startswith("lm_head.dense.") for key in loading_info["missing_keys"])
        if is_new or hidden_act in GELU_NAMES:
            return None
        return (
            f'an LM head of Transformers\' own MRA that applies hidden_act="{hidden_act}", '
            "where RoBERTa's applies gelu: the same weights would compute something else here"
        )


class MraForSequenceClassification(MraPreTrainedMixin, RobertaForSequenceClassification):
    """Classification or regression of a sequence by its first token: logits `[B, num_labels]`."""

    def __init__(self, config: MraConfig):
        super(RobertaForSequenceClassification, self).__init__(config)
        self.num_labels = config.num_labels
        self.roberta = MraModel(config, add_pooling_layer=False)
        self.classifier = RobertaClassificationHead(config)
        self.post_init()

    @classmethod
    def _builtin_difference(cls, model, loading_info) -> str | None:
        if any(key.startswith("classifier.") for key in loading_info["missing_keys"]):
            return None
        return (
            "a sequence classifier of Transformers' own MRA, whose head applies hidden_act where "
            "RoBERTa's applies tanh: the same weights would compute something else here"
        )


class MraForTokenClassification(MraPreTrainedMixin, RobertaForTokenClassification):
    """Classification of every token: logits `[B, N, num_labels]`."""

    def __init__(self, config: MraConfig):
        super(RobertaForTokenClassification, self).__init__(config)
        self.num_labels = config.num_labels
        self.roberta = MraModel(config, add_pooling_layer=False)
        self.dropout = nn.Dropout(_classifier_dropout(config))
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()


class MraForQuestionAnswering(MraPreTrainedMixin, RobertaForQuestionAnswering):
    """Extractive question answering: start and end logits `[B, N]`."""

    def __init__(self, config: MraConfig):
        super(RobertaForQuestionAnswering, self).__init__(config)
        self.num_labels = config.num_labels
        self.roberta = MraModel(config, add_pooling_layer=False)
        self.qa_outputs = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()


class MraForMultipleChoice(MraPreTrainedMixin, RobertaForMultipleChoice):
    """Choice among sequences: inputs `[B, choices, N]`, logits `[B, choices]`."""

    def __init__(self, config: MraConfig):
        super(RobertaForMultipleChoice, self).__init__(config)
        self.roberta = MraModel(config)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.classifier = nn.Linear(config.hidden_size, 1)
        self.post_init()

    @classmethod
    def _builtin_difference(cls, model, loading_info) -> str | None:
        if any(key.startswith("pre_classifier.") for key in loading_info["unexpected_keys"]):
            return (
                "a multiple-choice head of Transformers' own MRA (pre_classifier and ReLU), "
                "which has no counterpart here"
            )
        return None


class MraForCandidateChoice(MraPreTrainedMixin, RobertaPreTrainedModel):
    """Choice among candidates that stand in the text: logits `[B, candidates]`.

    No Auto class of Transformers has this shape of input (multiple choice encodes every candidate
    separately), so the class is used by name. Any RoBERTa-like checkpoint of type `mra_hf` loads
    into it; `attn_implementation="sdpa"` gives the dense model.
    """

    accepts_loss_kwargs = True  # the loss is divided by num_items_in_batch

    def __init__(self, config: MraConfig):
        super().__init__(config)
        self.roberta = MraModel(config, add_pooling_layer=False)
        self.dropout = nn.Dropout(_classifier_dropout(config))
        self.scorer = nn.Linear(config.hidden_size, 1, bias=False)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor,
        candidate_spans: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        **kwargs,
    ) -> CandidateChoiceOutput | tuple[Tensor, ...]:
        """Score the candidates of B questions.

        Args:
            input_ids: `[B, N]`, or `[B, chunks, N]` for questions in several chunks.
            candidate_spans: `[B, candidates, 2]` or `[B, chunks, candidates, 2]`: the positions of
                the tokens that open and close a candidate, -1 for none.
            attention_mask: shaped like `input_ids`; a chunk without a real token is skipped.
            labels: `[B]`, the number of the right candidate.
            num_items_in_batch: what the summed loss is divided by (default: B).
            kwargs: handed to the encoder (`output_hidden_states`, ...).

        Raises:
            ValueError: shapes that do not fit.
        """
        return_dict = kwargs.pop("return_dict", None)
        if input_ids.dim() == 2:
            input_ids = input_ids[:, None]
            candidate_spans = candidate_spans[:, None]
            attention_mask = None if attention_mask is None else attention_mask[:, None]
        shape = tuple(candidate_spans.shape)
        if len(shape) != 4 or shape[:2] != input_ids.shape[:2] or shape[3] != 2:
            raise ValueError(
                "candidate_spans must be [questions, chunks, candidates, 2] with the questions and "
                f"chunks of input_ids {tuple(input_ids.shape[:2])}, got {shape}."
            )
        if attention_mask is None:
            assert self.config.pad_token_id is not None  # `MraConfig.check`
            attention_mask = input_ids.ne(self.config.pad_token_id)
        present: Tensor | tuple[slice, int] = attention_mask.any(-1)  # [B, chunks]
        if input_ids.shape[1] == 1 and not torch.jit.is_tracing():
            present = (slice(None), 0)  # no chunk to skip, and nothing is read on the host
        outputs = self.roberta(
            input_ids[present], attention_mask=attention_mask[present], return_dict=True, **kwargs
        )
        token_scores = self.scorer(self.dropout(outputs.last_hidden_state))[..., 0]
        logits = candidate_logits(
            token_scores, candidate_spans, present, self.config.candidate_pooling
        )
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits, labels, reduction="sum")
            loss = loss / (len(labels) if num_items_in_batch is None else num_items_in_batch)
        result = CandidateChoiceOutput(loss, logits, outputs.hidden_states, outputs.attentions)
        return result.to_tuple() if return_dict is False else result


def _of_width(config: MraConfig, width: int | None) -> MraConfig:
    """`config` with `hidden_size` replaced by `width`, the width of the embeddings."""
    if width is None:
        return config
    config = copy.copy(config)
    config.hidden_size = width
    return config


def _classifier_dropout(config: MraConfig) -> float:
    if config.classifier_dropout is None:
        return config.hidden_dropout_prob
    return config.classifier_dropout


def _is_builtin(path, hub_arguments: dict) -> bool:
    """Whether `path`, a directory or hub id, has a config of Transformers' own MRA."""
    if path is None:
        return False
    try:
        config_dict, _ = PreTrainedConfig.get_config_dict(path, **hub_arguments)
        return config_dict.get("model_type") == BUILTIN_TYPE
    except OSError:  # no config.json there: one was passed by the caller
        return False


class Head(NamedTuple):
    """A model class of the family and what others need to know about it.

    Args:
        model_class: the class.
        auto_classes: the Auto classes of Transformers that open it, the one for its task last; none
            if it is used by name.
        pipeline_tag: its task on the hub, None if the hub has none.
        weights: the weight names that show that a checkpoint has this head; the first row of
            `HEADS` that matches counts.
        reads_first_token: whether its answer, or what is made of the states, hangs on the first
            token, which then has to see all of a long text.
    """

    model_class: type[PreTrainedModel]
    auto_classes: tuple[type, ...]
    pipeline_tag: str | None
    weights: tuple[str, ...]
    reads_first_token: bool = False

    @property
    def class_name(self) -> str:
        """The name of the class, such as "MraForMaskedLM"."""
        return self.model_class.__name__

    @property
    def ending(self) -> str:
        """The class name without its "Mra", which RoBERTa's and BERT's class names share."""
        return self.class_name.removeprefix("Mra")


HEADS = (
    Head(
        MraForMaskedLM, (AutoModelForPreTraining, AutoModelForMaskedLM),
        "fill-mask", ("lm_head.dense.weight",),
    ),
    Head(
        MraForQuestionAnswering, (AutoModelForQuestionAnswering,),
        "question-answering", ("qa_outputs.weight",),
    ),
    Head(
        MraForSequenceClassification, (AutoModelForSequenceClassification,),
        "text-classification", ("classifier.dense.weight",), reads_first_token=True,
    ),
    Head(
        MraForMultipleChoice, (AutoModelForMultipleChoice,),
        None, ("classifier.weight", "roberta.pooler.dense.weight"), reads_first_token=True,
    ),
    Head(
        MraForTokenClassification, (AutoModelForTokenClassification,),
        "token-classification", ("classifier.weight",),
    ),
    Head(MraForCandidateChoice, (), None, ("scorer.weight",)),
    Head(MraModel, (AutoModel,), "feature-extraction", (), reads_first_token=True),
)  # fmt: skip
