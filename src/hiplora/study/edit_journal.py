"""The stages of an interrupted run of edits, kept on the disk as soon as they are finished."""

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save
from torch import Tensor

from hiplora.editing import Editor, EditOutcome, EditRecord, EditStage, LocalityOutcome
from hiplora.files import write_atomic


class EditJournal:
    """What is finished of a run: `stages`, `state` (`Editor.state`) after the last of them in a sequence, `drift`."""

    def __init__(self, folder: Path, sequential: bool):
        """Read what an interrupted run left in a folder that is its own; there may be nothing."""
        self._folder, self._sequential = folder, sequential
        self.stages: list[EditStage] = []
        self.state: dict[str, Tensor] | None = None
        self.drift: dict[str, Any] | None = None
        while (path := self._stage(len(self.stages) + 1)).is_file():
            kept = json.loads(path.read_text(encoding="utf-8"))
            self.stages.append(_stage_of(kept["stage"]))
            self.drift = kept["drift"]
        if sequential and self.stages:
            self.state = load_file(self._state(len(self.stages)))
        self._newest: EditStage | None = None

    def hear(self, stage: EditStage) -> None:
        """Take note of a stage that was measured (`on_stage`); `keep` follows."""
        self._newest = stage

    def keep(self, number: int, editor: Editor, drift: dict[str, Any] | None = None) -> None:
        """Write the stage that was heard of last, and what its editor holds now: the stage is done by that."""
        assert self._newest is not None
        if self._sequential:
            state = {name: tensor.contiguous().cpu() for name, tensor in editor.state().items()}
            write_atomic(self._state(number), save(state))
        kept = {"stage": asdict(self._newest), "drift": drift}
        write_atomic(self._stage(number), json.dumps(kept))
        self._state(number - 1).unlink(missing_ok=True)
        self.stages.append(self._newest)
        self.drift = drift

    def _stage(self, number: int) -> Path:
        return self._folder / f"stage-{number:05d}.json"

    def _state(self, number: int) -> Path:
        return self._folder / f"state-{number:05d}.safetensors"


def _stage_of(kept: Mapping[str, Any]) -> EditStage:
    """Return a stage from its `asdict` as JSON has it."""
    said = kept["locality"]
    locality = LocalityOutcome(**{key: tuple(values) for key, values in said.items()}) if said else None
    records = tuple(
        EditRecord(
            record["index"],
            record["category"],
            EditOutcome(**record["asked"]),
            EditOutcome(**record["paraphrased"]),
            tuple(record["neighbours_kept"]),
        )
        for record in kept["records"]
    )
    return EditStage(kept["number"], tuple(kept["taught"]), kept["took"], records, locality)
