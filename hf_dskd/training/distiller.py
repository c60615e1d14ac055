"""Student and teacher on a batch: what enters the loss, and the loss; no trainer is needed for it."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn

from ..alignment.weights import AlignmentWeights, TiledAttention
from ..losses.attention import attention_kl, chunk_attention_kl
from ..losses.dual_space import DualSpace
from ..losses.objective import Objective, Step, Terms, total_loss, weighted_loss
from ..losses.states import IGNORE, ResponseStates, response_states
from ..methods import ALIGNMENTS, MATCHINGS
from ..models.causal_lm import check_head, check_student_head, input_embedding, lm_head
from ..models.hidden_states import LastHiddenState
from .attention_capture import AttentionPairs


if TYPE_CHECKING:
    from ..config import DSKDConfig
    from ..losses.matching import Matching
    from ..losses.projectors import Projectors
    from ..models.causal_lm import LMHead
    from ..teacher.source import TeacherSource


@dataclass
class Views:
    """
    What both models make of a batch.

    Attributes:
        hidden (`[B, S, d_s]`): The student's last hidden states.
        student, teacher: Their responses; no teacher for a method without one.
        attention (`[B]`, *optional*): Divergence of the models' own attention, where the settings ask for it.
        added (*optional*): What the student's model adds to its own loss, a scalar.
    """

    hidden: Tensor
    student: ResponseStates
    teacher: ResponseStates | None
    attention: Tensor | None = None
    added: Tensor | None = None


class Distiller:
    """
    Student, teacher and what is trained beside them: from a batch to the terms of a method's loss.

    Args:
        config ([`DSKDConfig`]): Settings.
        student, teacher: On their devices; no teacher for a method without one.
        pair ([`~hf_dskd.training.pair.Pair`]): Their tokenizers and configurations.
        device (`torch.device`, *optional*): Of the losses; by default the student's.
        collate (`Callable`, *optional*): From tokenized rows to a batch.
        autocast (`Callable`, *optional*): Makes the context that the training precision needs.
        same_tokens (`bool`, *optional*, defaults to `False`):
            Both models read the same tokens, so that their attention can be compared token by token.

    Attributes:
        objective ([`~hf_dskd.losses.objective.Objective`]): The method's loss, with projectors, matching and critic.
        exact_means (`bool`): Whether every term of an example is independent of the batch it is in.
        trains_critic (`bool`): Whether a critic has an optimizer.
    """

    exact_means = True
    trains_critic = True

    def __init__(
        self,
        config: DSKDConfig,
        student: Any,
        teacher: TeacherSource | None,
        pair: Any,
        *,
        device: torch.device | None = None,
        collate: Callable[[list[dict[str, Any]]], dict[str, Any]] | None = None,
        autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
        same_tokens: bool = False,
    ):
        self.config, self.student, self.teacher, self.pair = config, student, teacher, pair
        self.collate, self.autocast, self._same_tokens = collate, autocast, same_tokens
        self.device: torch.device = device or student.device
        # In the training precision: without it flash attention doesn't run.
        check_student_head(student)
        self._attention: AttentionPairs | None = None
        with autocast():
            check_head(student, lm_head(student), "student")
            self.last_hidden_state = LastHiddenState(student, config.padding_free)
            if config.attention_kd_rate:
                assert teacher is not None
                layers, heads = config.attention_layers, config.attention_relation_heads
                self._attention = AttentionPairs(student, teacher.model, layers, heads, config.max_length)
        self.objective: Objective = config.method_row.load()(config, pair, self.device)
        if teacher is not None:
            self.objective.start(lm_head(student), teacher.head)

    @property
    def projectors(self) -> Projectors | None:
        return self.objective.projectors

    @property
    def matching(self) -> Matching | None:
        return self.objective.matching

    @property
    def critic(self) -> nn.Module | None:
        return self.objective.critic

    @property
    def critic_name(self) -> str:
        """What checkpoints and messages call the critic."""
        return str(MATCHINGS[str(self.config.method_row.matching)].critic)

    def auxiliary(self) -> dict[str, nn.Module]:
        """Names the modules that are trained beside the student, as checkpoints do."""
        modules: dict[str, nn.Module] = {} if self.projectors is None else {"projectors": self.projectors}
        return modules if self.critic is None else {**modules, self.critic_name: self.critic}

    def trained(self) -> list[nn.Parameter]:
        """Lists what the student's optimizer trains."""
        own = [parameter for parameter in self.student.parameters() if parameter.requires_grad]
        return own + ([] if self.projectors is None else list(self.projectors.parameters()))

    def batch(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Makes a batch of tokenized rows, on the device."""
        assert self.collate is not None
        return send_to_device(self.collate([dict(row) for row in rows]), self.device)

    def fit(self, dataset: Any) -> dict[str, float]:
        """Lets the objective fit what it has to on a sample of tokenized text, if it does: constants, by name."""
        if not self.objective.fits or dataset is None:
            return {}
        rows = sample_rows(dataset)
        with torch.no_grad(), self.autocast():
            batches = [self.batch([row]) for row in rows]
            return self.objective.fit(
                [
                    (self.states("student", None, batch), self.states("teacher", self._teacher_hidden(batch), batch))
                    for batch in batches
                ]
            )

    def views(self, model: nn.Module, batch: dict[str, Any]) -> Views:
        """Runs both models on a batch, or looks the teacher up; `model` is the student, as it may be wrapped."""
        watched: AbstractContextManager[list[Any]] = nullcontext([])
        if self._attention is not None:
            watched = self._attention.recording()
        with watched as pairs:
            hidden = self.last_hidden_state(model, batch["input_ids"], batch["attention_mask"])
            with self.autocast():
                student, teacher = self.states("student", hidden, batch), None
                if self.teacher is not None:
                    teacher = self.states("teacher", self._teacher_hidden(batch), batch)
        attention = self._attention_kl(pairs, batch) if self._attention is not None else None
        return Views(hidden, student, teacher, attention, self.last_hidden_state.added)

    def embedded(self, batch: dict[str, Any]) -> tuple[ResponseStates, ResponseStates]:
        """Views a batch without running a model: embeddings alone, and hidden states of width 0."""
        return self.states("student", None, batch), self.states("teacher", None, batch)

    def align(
        self, student: ResponseStates, teacher: ResponseStates, alignment: str | None = None
    ) -> AlignmentWeights | TiledAttention:
        """
        Aligns the positions of both models as the method does, or by another row of
        [`~hf_dskd.methods.ALIGNMENTS`]. A method outside hidden spaces compares all of a chunk with all of it.
        """
        row, queries, keys = self.config.method_row, None, None
        if isinstance(self.objective, DualSpace):
            queries, keys = self.objective.queries_and_keys(student, teacher)
            alignment = alignment or row.alignment
        return ALIGNMENTS[alignment or "chunk_mean"].load()(student, teacher, queries, keys)

    def terms(self, views: Views, step: Step) -> Terms:
        """Computes every term of the loss, under the autocast that is on."""
        if self.critic is not None:
            self.critic.train(step.training)
        terms = self.objective(views.student, views.teacher, step)  # type: ignore[arg-type]
        if views.attention is not None:
            rate = self.config.attention_kd_rate * (step.only in (None, "attention"))
            terms.sums["attention"] = views.attention
            terms.student_loss = terms.student_loss + rate * views.attention.sum()
        return replace(terms, added=views.added if step.only in (None, "aux") else None)

    def weights(self) -> dict[str, float]:
        """Weighs every term of the loss, by name."""
        found = dict(self.objective.weights(Step()))
        return found if self._attention is None else {**found, "attention": self.config.attention_kd_rate}

    def loss(self, terms: Terms, student_tokens: Tensor | float, teacher_tokens: Tensor | float) -> Tensor:
        """Adds up the loss (see [`~hf_dskd.losses.objective.total_loss`])."""
        return total_loss(terms, student_tokens, teacher_tokens)

    def mean_loss(self, totals: Mapping[str, float]) -> float:
        """Adds up the loss of terms and tokens that were summed over many batches."""
        return weighted_loss(self.weights(), totals)

    def states(self, side: str, hidden: Tensor | None, batch: dict[str, Any]) -> ResponseStates:
        """Gathers the response rows of `"student"` or `"teacher"` out of its last hidden states `[B, S, d]`."""
        prefix, head, embedding = self._model(side)
        ids, labels = batch[f"{prefix}input_ids"], batch[f"{prefix}labels"]
        # A teacher has no states but those of the response.
        gathered = hidden is not None and side == "teacher"
        return response_states(
            embedding.new_zeros((*ids.shape, 0)) if hidden is None else hidden,
            *(ids, labels, embedding),
            batch.get(f"{prefix}chunk_ids") if self.config.method_row.needs_chunks else None,
            batch.get("partners") if side == "student" else None,
            gathered,
            *(batch.get(f"{prefix}places"), batch.get(f"{prefix}silent")),
            batch.get("prefix_plan") if side == "student" else None,
            head=head,
            example_ids=batch.get("example_ids"),
        )

    @contextmanager
    def unchanged(self) -> Iterator[None]:
        """Within it everything is in evaluation mode; afterwards each part is in its own mode again."""
        trained = [self.student, *self.auxiliary().values()]
        modes = [(part, part.training) for module in trained for part in module.modules()]
        for module in trained:
            module.eval()
        try:
            yield
        finally:
            for part, training in modes:
                part.training = training

    def _model(self, side: str) -> tuple[str, LMHead, Tensor]:
        """Prefix of a side's columns in a batch, head and input embedding."""
        if side == "student":
            return "", lm_head(self.student), input_embedding(self.student)
        assert self.teacher is not None
        return "teacher_", self.teacher.head, self.teacher.embedding

    def _teacher_hidden(self, batch: dict[str, Any]) -> Tensor:
        assert self.teacher is not None
        return self.teacher.states(batch)

    def _attention_kl(self, pairs: list[Any], batch: dict[str, Any]) -> Tensor:
        heads = self.config.attention_relation_heads
        if self._same_tokens:
            return attention_kl(pairs, batch["labels"], batch["attention_mask"], heads)
        chunks, teacher_chunks = (
            batch[f"{prefix}chunk_ids"].masked_fill(batch[f"{prefix}labels"] == IGNORE, -1)
            for prefix in ("", "teacher_")
        )
        return chunk_attention_kl(pairs, chunks, teacher_chunks, heads)


def sample_rows(dataset: Any, tokens: int = 1024, most: int = 64) -> list[dict[str, Any]]:
    """Takes rows from all over a tokenized dataset until the teacher has some `tokens` to answer; a stream's first."""
    if isinstance(dataset, dict):
        dataset = next(iter(dataset.values()))
    if hasattr(dataset, "__len__"):
        # Not in the order of the file, whose beginning may be of one kind.
        order = random.Random(0).sample(range(len(dataset)), min(most, len(dataset)))
        found = (dataset[index] for index in order)
    else:
        found = iter(dataset.take(most))
    rows, total = list[dict[str, Any]](), 0
    for row in found:
        rows.append(row)
        total += len(row["teacher_byte_ends"])
        if total >= tokens:
            break
    return rows
