"""What the trainer leaves behind and publishes: the record, the report, the card and the push of its run."""

from __future__ import annotations

from dataclasses import asdict, fields
from datetime import UTC, datetime
from inspect import signature
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from transformers import Trainer

from ..config import DSKDConfig
from ..data.fingerprint import fingerprint
from ..redaction import without_secrets
from ..report.one import write_report
from ..report.record import Card, Data, Hardware, Models, RunRecord, differences, evaluations, note_card
from ..settings import DistillationSettings
from ..training.run_folder import RESULT_NAME
from ..utils.environment import command_line, hardware, versions
from .card import write_card, write_own_card
from .push import TRAINING, check_training, push_run


class Publishing(Trainer):
    """
    Gives a trainer its record, report, model card and push.

    This is the only place of `hub` and `report` that knows a trainer: everything else reads the folder of a run.
    """

    args: DSKDConfig
    # Set by the trainer while it is made.
    distiller: Any
    teacher: Any
    tokenization_reports: dict[str, Any]
    skipped_steps: int
    _identity: dict[str, str | None]
    _origins: dict[str, dict[str, Any]]
    _facts: dict[str, Any]
    _run_id: str | None
    # `namespace/name`, once the hub has said that it can be pushed to.
    _repository: str | None = None
    _dataset_name: str | None = None
    _wrote_result = False
    _card: dict[str, Any] = {}

    def _check_hub(self, args: DSKDConfig, token: str | None = None) -> None:
        if self._repository is None and args.process_index == 0:
            self._repository = check_training(args, self._identity, token)

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """Checks the repository, which is made with the push and not, as in [`~transformers.Trainer`], before it."""
        self._check_hub(self.args, token)
        self.hub_model_id = self._repository  # type: ignore[assignment]
        self.push_in_progress = None

    def push_to_hub(
        self,
        commit_message: str | None = None,
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        dataset_name: str | None = None,
        **kwargs: Any,
    ) -> Any:
        """
        Pushes the student, or its adapter, with tokenizer and model card, in one commit (see
        [`~hf_dskd.hub.push.push_run`]).

        The card is made of the files in the output folder: call it after the evaluation, and after an analysis.

        Args:
            commit_message, blocking, token, revision, private: As in [`~transformers.Trainer`].
            dataset_name (`str`, *optional*): Of the training data, for the card of a run that `hf-dskd` didn't start.
            kwargs: What else [`create_model_card`] takes.

        Returns:
            [`~huggingface_hub.CommitInfo`], or a `Future` of it unless `blocking`; `None` on other processes.

        Raises:
            UserError: For what stands in the way.
        """
        self._note_card(**kwargs)
        args = self.args
        # Callbacks are told of a push since transformers 5.
        getattr(self.callback_handler, "on_push_begin", lambda *args: None)(args, self.state, self.control)
        token = token or args.hub_token
        self.init_hf_repo(token=token)
        self.save_model(_internal_call=True)
        if not self.is_world_process_zero():
            return None
        self._write_result(dataset_name)
        assert self._repository is not None
        options: dict[str, Any] = {
            "token": token,
            "private": args.hub_private_repo if private is None else private,
            "auxiliary": args.push_auxiliary_to_hub,
            "revision": revision or args.hub_revision,
            "commit_message": commit_message,
            "replace": args.replace_on_hub,
            "words": TRAINING,
        }
        folder = str(args.output_dir)
        if blocking:
            return push_run(folder, self._repository, **options)
        return HfApi().run_as_future(push_run, folder, self._repository, **options)

    def create_model_card(self, *args: Any, dataset_name: str | None = None, **kwargs: Any) -> None:
        """
        Writes the model card, `README.md` with `images`, to the output folder (see [`push_to_hub`]).

        Args:
            language, license, tags, model_name, dataset_tags, dataset:
                As in [`~transformers.Trainer`]; the card has them beside or in place of what it finds itself, from
                here on. `dataset_tags`, the names on the hub, come before `dataset`.
            finetuned_from, tasks, dataset_args: Of no account: the run knows them.
            dataset_name (`str`, *optional*): Of the training data, for the card of a run that `hf-dskd` didn't start.
        """
        self._note_card(*args, **kwargs)
        if self.is_world_process_zero():
            self._write_result(dataset_name)
            folder = str(self.args.output_dir)
            write_card(folder, folder, self._repository or self.args.hub_model_id, token=self.args.hub_token)

    def _note_card(self, *args: Any, **kwargs: Any) -> None:
        """Keeps what the user has for the card, for `result.json`; given as to transformers' `create_model_card`."""
        given = signature(Trainer.create_model_card).bind(self, *args, **kwargs).arguments
        kept = {name: given.get(name) for name in ("language", "license", "model_name")}
        lists = {"tags": given.get("tags"), "datasets": given.get("dataset_tags") or given.get("dataset")}
        kept |= {name: [value] if isinstance(value, str) else value for name, value in lists.items()}
        # Not in place: the empty one is that of the class.
        self._card = self._card | {name: value for name, value in kept.items() if value}

    def write_report(self, dataset_name: str | None = None) -> Path | None:
        """
        Ends a run as `hf-dskd train` does: saves the student, and writes `result.json`, the log and the report.

        Its metrics are those of the last evaluation; `dataset_name` is that of the training data, for the card.

        Returns:
            `Path`: `report/report.html` in the output folder; `None` on other processes.
        """
        self.save_model(_internal_call=True)
        if not self.is_world_process_zero():
            return None
        self._write_result(dataset_name)
        folder = str(self.args.output_dir)
        write_own_card(folder, self._repository or self.args.hub_model_id)
        return write_report(folder)

    def _write_result(self, dataset_name: str | None) -> None:
        """Writes `result.json` of a run that `hf-dskd` didn't start; its own is more exact: only the card is added."""
        path = Path(str(self.args.output_dir)) / RESULT_NAME
        if path.is_file() and not self._wrote_result:
            if self._card:
                note_card(path, self._card)
            return
        history = evaluations(self.state.log_history)
        runtime = next((log["train_runtime"] for log in self.state.log_history[::-1] if "train_runtime" in log), None)
        last = history[max(history)] if history else {}
        self._dataset_name = dataset_name or self._dataset_name
        self.save_state()
        self.run_record(last, history, runtime, self._dataset_name).write(path)
        self._wrote_result = True

    def run_record(
        self,
        metrics: dict[str, float],
        evaluations: dict[int, dict[str, float]],
        train_runtime: float | None,
        dataset_name: str | None = None,
    ) -> RunRecord:
        """Records what the run came to, the metrics of the final model above all, and what it was made of."""
        config, state = self.args, self.state
        best = state.best_model_checkpoint if config.load_best_model_at_end else None
        splits = {name: asdict(part) for name, part in self.tokenization_reports.items()}
        settings = {setting.name: getattr(config, setting.name) for setting in fields(DistillationSettings)}
        return RunRecord(
            method=config.method,
            seed=config.seed,
            data_seed=config.data_seed,
            run_id=self._run_id,
            steps=state.global_step,
            skipped_steps=self.skipped_steps,
            best_checkpoint=Path(best).name if best else None,
            metrics=metrics,
            evaluations=evaluations,
            train_runtime=train_runtime,
            command=command_line(),
            finished=datetime.now(UTC).isoformat(timespec="seconds"),
            versions=versions(),
            hardware=Hardware(**hardware(self.accelerator.num_processes)),
            models=self._recorded_models(),
            data=Data(dataset_name, fingerprint(self.train_dataset), splits),
            settings=without_secrets(settings),
            changed_settings=differences(config),
            fitted=dict(self.distiller.objective.fitted),
            card=Card(**self._card),
        )

    def _recorded_models(self) -> Models:
        student: Any = self.model
        teacher = getattr(self.teacher, "model", None)
        origins = {f"{role}_{name}": value for role, found in self._origins.items() for name, value in found.items()}
        return Models(
            student=self._facts["student"],
            teacher=self._facts["teacher"],
            base_model=self._identity["base_model"],
            student_type=self._identity["model_type"],
            student_bits=next((bits for bits in (4, 8) if getattr(student, f"is_loaded_in_{bits}bit", False)), None),
            # Not the sum over parameters: two of four bits are packed into one byte.
            student_parameters=student.num_parameters(),
            trained_parameters=sum(weight.numel() for weight in student.parameters() if weight.requires_grad),
            teacher_parameters=None if teacher is None else teacher.num_parameters(),
            adapter=self._facts["adapter"],
            **origins,
        )
