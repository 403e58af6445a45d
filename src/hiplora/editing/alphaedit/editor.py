"""AlphaEdit on a model: search values, spread what is missing over the layers, update each in its null space."""

import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from hiplora.editing.alphaedit.prompts import Located, essence, locate, until_subject, write_prefixes
from hiplora.editing.alphaedit.settings import AlphaEdit
from hiplora.editing.alphaedit.update import null_space, null_space_update
from hiplora.editing.alphaedit.values import search_values, subject_states
from hiplora.editing.editors import Untouched
from hiplora.editing.edits import Edit
from hiplora.tuner import input_bases


class AlphaEditor:
    """AlphaEdit as an `Editor`. The weights of a few `mlp.down_proj` change; the keys of all edits so far are kept.

    Raises (on construction):
        ConfigError: the settings do not fit the model.
        FactorError: an edited layer's inputs have no null space at this threshold.
    """

    def __init__(self, model: Any, tokenizer: Any, settings: AlphaEdit):
        self.model: nn.Module = model
        self._tokenizer, self._settings = tokenizer, settings
        self.modules, self._block = settings.modules(model)
        self._base = Untouched(model)
        model.eval()
        self._start = {name: self._weight(name).data for name in self.modules}
        bases = input_bases(model, self.modules, tokens=settings.calibration_tokens, seed=settings.seed)
        self._projectors = {
            name: null_space(basis, settings.threshold, name).to(self._weight(name).device)
            for name, basis in bases.items()
        }
        self._prefixes = write_prefixes(model, tokenizer, settings.prefixes, settings.prefix_tokens)
        self._keys: dict[str, list[Float[Tensor, "n edits"]]] = {name: [] for name in self.modules}
        self._former: dict[str, Float[Tensor, "n n"]] = {}

    def teach(self, edits: Sequence[Edit]) -> dict[str, Any]:
        """Write some edits in together; the record has each edit's last loss of the search, ranks and seconds.

        Raises:
            DataError: an edit's subject does not stand in its prompt.
        """
        began = time.perf_counter()
        prompts = [self._prompts(edit) for edit in edits]
        values, losses = self._values(edits, prompts)
        for done, name in enumerate(self.modules):
            keys, outputs = self._states(prompts)
            missing = (values - outputs) / (len(self.modules) - done)
            self._add(
                name,
                null_space_update(
                    keys[name], missing, self._projectors[name], self._former.get(name), self._settings.ridge
                ),
            )
        keys, outputs = self._states(prompts)
        for name in self.modules:
            self._remember(name, keys[name])
        left = (values - outputs).norm(dim=0) / values.norm(dim=0)
        return {
            "search_loss": losses,
            "value_error": left.tolist(),
            "null_space_rank": {name: round(P.trace().item()) for name, P in self._projectors.items()},
            "seconds": time.perf_counter() - began,
        }

    def updates(self) -> dict[str, Float[Tensor, "m n"]]:
        """Return what the edits so far added to each weight, in fp32."""
        return {name: self._weight(name).data.float() - start.float() for name, start in self._start.items()}

    def reset(self) -> None:
        """Put the base's own weights back and forget the keys of all edits."""
        for name, start in self._start.items():
            self._weight(name).data = start
        self._keys = {name: [] for name in self.modules}
        self._former.clear()

    def state(self) -> dict[str, Tensor]:
        """Return the edited weights, and the keys of every batch of edits."""
        found = {f"weight.{name}": self._weight(name).data.clone() for name in self.modules}
        return found | {
            f"keys.{number}.{name}": keys.clone()
            for name in self.modules
            for number, keys in enumerate(self._keys[name])
        }

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Take edited weights and keys, batch after batch as they came."""
        self.reset()
        batches = sum(name.startswith("keys.") for name in state) // len(self.modules)
        for name in self.modules:
            weight = self._weight(name)
            weight.data = state[f"weight.{name}"].to(weight.device)
            for number in range(batches):
                self._remember(name, state[f"keys.{number}.{name}"].to(weight.device))

    def off(self) -> AbstractContextManager[None]:
        """Have the base's own weights in the model for a while."""
        return self._base.shown()

    def close(self) -> None:
        """Leave the base behind as it was found."""
        self.reset()
        self._base.restore()

    def _weight(self, name: str) -> nn.Parameter:
        return self.model.get_submodule(name).get_parameter("weight")

    def _add(self, name: str, delta: Float[Tensor, "m n"]) -> None:
        weight = self._weight(name)
        # A tensor of its own: the base's stays as it is, to be put back.
        weight.data = (weight.data.double() + delta).to(weight.dtype)

    def _remember(self, name: str, keys: Float[Tensor, "n edits"]) -> None:
        """Keep keys of edits; what is written later leaves them alone."""
        self._keys[name].append(keys)
        K = keys.double()
        self._former[name] = self._former.get(name, 0) + K @ K.T

    def _prompts(self, edit: Edit) -> list[Located]:
        """The prompt with the new answer, bare and behind each prefix."""
        return [locate(self._tokenizer, edit, edit.new, prefix) for prefix in ("", *self._prefixes)]

    def _values(
        self, edits: Sequence[Edit], prompts: Sequence[list[Located]]
    ) -> tuple[Float[Tensor, "d edits"], list[float]]:
        found: list[Tensor] = []
        losses: list[float] = []
        for first in range(0, len(edits), self._settings.edits_at_once):
            part = slice(first, first + self._settings.edits_at_once)
            essences = [essence(self._tokenizer, edit) for edit in edits[part]]
            values, last = search_values(self.model, self._block, prompts[part], essences, self._settings)
            found.append(values)
            losses += last
        return torch.cat(found, dim=1), losses

    def _states(
        self, prompts: Sequence[list[Located]]
    ) -> tuple[dict[str, Float[Tensor, "n edits"]], Float[Tensor, "d edits"]]:
        """Each edit's keys, half the bare prompt's and half the mean of the prefixed ones, and its current value."""
        each = len(self._prefixes) + 1
        rows = until_subject([item for group in prompts for item in group])
        inputs, outputs = subject_states(self.model, self.modules, self._block, rows)
        share = torch.full((each,), 0.5 / max(each - 1, 1))
        share[0] = 0.5 if each > 1 else 1.0
        keys = {
            name: torch.einsum("nep,p->ne", states.reshape(len(states), -1, each), share.to(states))
            for name, states in inputs.items()
        }
        return keys, outputs[:, ::each]
