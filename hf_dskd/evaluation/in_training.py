"""Evaluations while a run trains: exact means over the whole dataset, and answers to its first prompts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from accelerate.data_loader import IterableDatasetShard
from torch import Tensor, nn

from ..alignment.spans import answer_spans
from ..data.fillers import FilledStream, without_fillers
from ..losses.objective import Terms
from ..losses.terms import ratios
from ..models.generation import read_response, response_text
from ..training.batches import Batches
from ..training.metrics import RunningLog, exact_dtype
from .generation import score_generation
from .likelihood import covers_text
from .scores import bits_of_a_byte


if TYPE_CHECKING:
    from transformers.trainer_utils import EvalLoopOutput

    from ..losses.states import ResponseStates
    from ..training.distiller import Distiller


class Evaluations(Batches):
    """How [`~hf_dskd.DSKDTrainer`] evaluates; a part of it."""

    distiller: Distiller
    running_log: RunningLog
    _evaluated_names: list[str]

    def __init__(self, **given: Any):
        super().__init__(**given)
        # A row of sums for each example of the evaluation that is under way; its columns are named above.
        self._evaluated: list[Tensor] = []
        self.samples: list[dict[str, Any]] = []

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Returns the loss, and logits `[B, S, V_s]` with labels `[B, S]` where they are asked for."""
        inputs = without_fillers(self._prepare_inputs(inputs))
        with torch.no_grad():
            result = self.compute_loss(model, inputs, return_outputs=not prediction_loss_only)
        if self.accelerator.num_processes > 1 and self._evaluated:
            # Without the examples with which ranks fill their last batch, which were already seen.
            self._evaluated[-1] = self.accelerator.gather_for_metrics(self._evaluated[-1])
        if isinstance(result, tuple):
            return result[0].detach(), result[1]["logits"].float(), inputs["labels"]
        return result.detach(), None, None

    def _note_evaluated(self, student: ResponseStates, terms: Terms, inputs: dict[str, Any]) -> None:
        """Notes one row of sums per example: exact means need neither equal batches nor equal ranks."""
        if "example_ids" not in inputs:
            return
        assert terms.ce_rows is not None
        text = student.per_example(terms.ce_rows * covers_text(inputs["byte_ends"])[inputs["labels"][:, 1:] != -100])
        zeros = torch.zeros_like(text)
        teacher_tokens = zeros if terms.teacher_tokens is None else terms.teacher_tokens
        columns = [terms.student_tokens, teacher_tokens, inputs["response_bytes"], text]
        values = dict(terms.sums)
        if not self.distiller.exact_means:
            # The others depend on what else is in a batch, and none has an exact mean.
            values = {name: value for name, value in values.items() if name in ("ce", "correct")}
        elif terms.added is not None:
            values["aux"] = terms.added.expand_as(text)
        self._evaluated_names = sorted(values)
        columns += [values[name] for name in self._evaluated_names]
        exact = exact_dtype(self.accelerator.device)
        self._evaluated.append(torch.stack([column.detach().to(exact) for column in columns], dim=1))

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        """
        Evaluates with exact means: each term per response token over the whole dataset.

        Adds `{prefix}_ce_loss` and the other terms, and `{prefix}_bits_per_byte`: bits that the student spends on
        the responses' text (without EOS) per UTF-8 byte, comparable across tokenizers. With
        `eval_generation_samples` also ROUGE-L and exact match of what it answers.
        """
        self.running_log.check(self.accelerator)
        self._evaluated = []
        output = super().evaluation_loop(*args, **kwargs)
        prefix = kwargs.get("metric_key_prefix", args[4] if len(args) > 4 else "eval")
        metrics = self._exact_metrics()
        if self.args.eval_generation_samples:
            dataloader = args[0] if args else kwargs["dataloader"]
            metrics |= self._answer(dataloader.dataset)
        output = output._replace(
            metrics={**(output.metrics or {}), **{f"{prefix}_{name}": value for name, value in metrics.items()}}
        )
        self.running_log.restart_clock()
        return output

    def _exact_metrics(self) -> dict[str, float]:
        if not self._evaluated:
            return {}
        rows = torch.cat(self._evaluated)
        sums = rows.sum(0).tolist()
        self._evaluated = []
        student_tokens, teacher_tokens, response_bytes, text, *values = sums
        totals = dict(zip(self._evaluated_names, values))
        # What a model adds is of a batch, not of its tokens: a mean over examples, as of the loss in Trainer.
        totals |= {"student_tokens": student_tokens, "teacher_tokens": teacher_tokens, "ranked_sums": len(rows)}
        metrics = ratios(totals, evaluated=True)
        if self.distiller.exact_means:
            metrics["loss"] = self.distiller.mean_loss(totals) + totals.get("aux", 0.0) / len(rows)
        metrics["bits_per_byte"] = bits_of_a_byte(text, response_bytes)
        return metrics

    def _answer(self, dataset: Any) -> dict[str, float]:
        """Scores greedy answers to the first prompts; each rank writes its share. Keeps them in `self.samples`."""
        tokenizer, frame = self._pair.student.tokenizer, self._pair.frames["student"]
        rank, ranks = self.accelerator.process_index, self.accelerator.num_processes
        count = self.args.eval_generation_samples
        # As accelerate and the filling for several ranks wrap a stream.
        while isinstance(dataset, (IterableDatasetShard, FilledStream)):
            dataset = dataset.dataset if isinstance(dataset, IterableDatasetShard) else dataset.stream
        if hasattr(dataset, "__len__"):
            rows = [dataset[index] for index in range(min(count, len(dataset)))]
        else:
            rows = list(dataset.take(count))
        rows = rows[rank::ranks]
        # Of a conversation the last answer.
        last = [(list(row["input_ids"]), *answer_spans(row)[-1]) for row in rows]
        prompts = [ids[:start] for ids, start, _ in last]
        references = [read_response(tokenizer, ids[start:stop], frame.end[-1:], frame)[0] for ids, start, stop in last]
        names = ("rouge_l", "exact_match", "unfinished")
        sums = torch.zeros(len(names) + 1, dtype=torch.float32, device=self.accelerator.device)
        self.samples = []
        if rows:
            with self._autocast():
                scores = score_generation(
                    self.accelerator.unwrap_model(self.model),
                    tokenizer,
                    [(prompt, [reference]) for prompt, reference in zip(prompts, references)],
                    max_length=self.args.max_length,
                    frame=frame,
                    batch_size=self.args.per_device_eval_batch_size,
                    description="answering" if rank == 0 and not self.args.disable_tqdm else None,
                )
            sums += torch.tensor([*(scores.metrics[name] * len(rows) for name in names), len(rows)]).to(sums)
            self.samples = [
                {
                    "step": self.state.global_step,
                    "prompt": response_text(tokenizer, prompt),
                    "reference": reference,
                    "response": text,
                }
                for prompt, reference, text in zip(prompts, references, scores.responses)
            ]
        *totals, answered = self.accelerator.reduce(sums, reduction="sum").tolist()
        return {name: total / answered for name, total in zip(names, totals)}
