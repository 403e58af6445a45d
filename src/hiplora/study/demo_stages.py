"""The stages of the demonstration for one method: train each set, measure, add, measure again, export."""

import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from hiplora.adapters import ExportReport, save_as_lora
from hiplora.editing import EditSet, EditTraining, evaluate_edits, train_edits
from hiplora.evaluation import BaseReference, Encoded, drift_texts, encode, heldout_loss
from hiplora.evaluation.mounting import mounted
from hiplora.files import staged_dir
from hiplora.merging import merge, save_merged
from hiplora.models import load, resolve
from hiplora.recipes.methods import METHODS
from hiplora.study.demo import BASE, DemoSettings, stage_name, stages
from hiplora.study.folder import StudyFolder
from hiplora.study.measure import allocation, base_reference, drift_dict
from hiplora.study.methods import slug
from hiplora.training.adapters import adapter_config, save_adapter
from hiplora.training.memory import peak_bytes, reset_peak
from hiplora.training.progress import TrainingBar
from hiplora.tuner import HipLoraConfig, calibrate

CALIBRATION_TOKENS = (
    2560  # sampled from the model; fewer than elsewhere, since a demonstration should not take long
)


def run_method(folder: str, settings: Mapping[str, Any], method: str) -> None:
    """Run all stages of one method that are not done yet."""
    _Method(StudyFolder(Path(folder)), DemoSettings.from_dict(settings), method).run()


class _Method:
    """One method's part of the demonstration: a bare model, and what is done with it."""

    def __init__(self, study: StudyFolder, settings: DemoSettings, method: str) -> None:
        """Load the base model; after every stage it is bare again."""
        self._study, self._settings, self._method = study, settings, method
        self._sets = settings.sets()
        self._model, self._tokenizer = load(settings.model)
        self._reference: BaseReference | None = None

    def run(self) -> None:
        """Do the stages in order; those that are done are skipped."""
        work: dict[str, Callable[[], dict[str, Any]]] = {BASE: self._measure_base}
        for stage, step in (("train", self._train), ("measure", self._measure)):
            for part in self._sets:
                work[stage_name(self._method, stage, part)] = functools.partial(step, part)
        work[stage_name(self._method, "merge")] = self._merge
        work[stage_name(self._method, "export")] = self._export
        for name in stages(self._method, self._sets):
            self._study.run(name, work[name])

    def _adapter(self, name: str) -> Path:
        return self._study.adapter(f"{slug(self._method)}-{slug(name)}")

    def _measure_base(self) -> dict[str, Any]:
        prompts = [prompt for part in self._sets for prompt in paraphrases(self._tokenizer, part)]
        return {
            "heldout_loss_before": heldout_loss(self._model, prompts),
            "success": {part.name: self._success(self._model, part) for part in self._sets},
        }

    def _train(self, part: EditSet) -> dict[str, Any]:
        from peft import get_peft_model

        chosen = self._settings
        config = METHODS[(method := chosen.ranks.settings(self._method))["name"]].model_validate(method)
        adapter = adapter_config(config)
        if isinstance(adapter, HipLoraConfig) and adapter.basis == "activation":
            calibrate(self._model, adapter, tokens=CALIBRATION_TOKENS)
        torch.manual_seed(chosen.seed)
        adapted = get_peft_model(self._model, adapter)
        training = EditTraining(chosen.steps, chosen.lr, chosen.batch_size, seed=chosen.seed)
        reset_peak()
        with TrainingBar(f"{self._method}, {part.name}") as bar:
            result = train_edits(adapted, self._tokenizer, part.edits, training, bar)
        peak = peak_bytes()
        parameters = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
        with staged_dir(self._adapter(part.name), overwrite=True) as staged:
            save_adapter(adapted, staged)
        self._model = adapted.unload()
        return {
            "trainable_parameters": parameters,
            "seconds": result.seconds,
            "tokens": result.tokens,
            "peak_memory_bytes": peak,
            "curve": list(result.curve),
        }

    def _measure(self, part: EditSet) -> dict[str, Any]:
        prompts, reference = paraphrases(self._tokenizer, part), self._base_reference()
        with mounted(self._model, self._adapter(part.name)) as adapted:
            return {
                "success": self._success(adapted, part),
                "heldout_loss": heldout_loss(adapted, prompts),
                "heldout_tokens": sum(len(prompt.scored) for prompt in prompts),
                "drift": drift_dict(adapted, reference),
            }

    def _merge(self) -> dict[str, Any]:
        merged = merge([self._adapter(part.name) for part in self._sets], "addition")
        report = save_merged(merged, self._adapter("merged"), overwrite=True)
        reference = self._base_reference()
        with mounted(self._model, self._adapter("merged")) as adapted:
            return {
                "success": {part.name: self._success(adapted, part) for part in self._sets},
                "drift": drift_dict(adapted, reference),
                "allocation": allocation(
                    merged, resolve(self._settings.model), self._settings.ranks.principal
                ),
                "export": self._exported(report),
            }

    def _export(self) -> dict[str, Any]:
        """Write each set's adapter as a plain LoRA too."""
        name = slug(self._method)
        return {
            part.name: self._exported(
                save_as_lora(
                    self._adapter(part.name),
                    self._study.path / "export" / f"{name}-{slug(part.name)}",
                    overwrite=True,
                )
            )
            for part in self._sets
        }

    def _exported(self, report: ExportReport) -> dict[str, Any]:
        return {
            "max_module_difference": report.worst[1],
            "max_logit_difference": report.logits,
            "rank": max(report.ranks.values()),
            "path": Path(report.path).relative_to(self._study.path).as_posix(),
        }

    def _success(self, model: Any, part: EditSet) -> dict[str, list[bool]]:
        """Per edit: new preferred, new written; and both again on the paraphrase."""
        asked = evaluate_edits(model, self._tokenizer, part.edits)
        again = evaluate_edits(model, self._tokenizer, part.edits, paraphrase=True)
        return {
            "preferred": [outcome.preferred for outcome in asked],
            "exact": [outcome.exact for outcome in asked],
            "paraphrase_preferred": [outcome.preferred for outcome in again],
            "paraphrase_exact": [outcome.exact for outcome in again],
        }

    def _base_reference(self) -> BaseReference:
        """The bare base on the drift texts; to be asked for while no adapter is on."""
        if self._reference is None:
            chosen = self._settings
            self._reference = base_reference(self._model, self._tokenizer, drift_texts(), chosen.drift_tokens)
        return self._reference


def paraphrases(tokenizer: Any, part: EditSet) -> list[Encoded]:
    """The new answers to prompts that were not trained on."""
    return [encode(tokenizer, edit.paraphrase, f" {edit.new}") for edit in part.edits]
