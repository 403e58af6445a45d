"""The base model of an adapter: its configuration and weights, and whether the adapter fits."""

import copy
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import psutil
import torch
import transformers
from jaxtyping import Float
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from hiplora.adapters.update import AdapterUpdate
from hiplora.devices import measuring_place
from hiplora.errors import AdapterError, HipLoraError, first_line
from hiplora.models import quiet_transformers, resolve
from hiplora.positions import input_embeddings
from hiplora.spectral import factor_mismatch, weight_fingerprint
from hiplora.tuner import other_precision_limit
from hiplora.tuner.experts import unrolled

# PEFT's task → transformers' class of a model for it; the first is that of an adapter without a task.
_TASKS = {
    "CAUSAL_LM": transformers.AutoModelForCausalLM,
    "SEQ_2_SEQ_LM": transformers.AutoModelForSeq2SeqLM,
    "SEQ_CLS": transformers.AutoModelForSequenceClassification,
    "TOKEN_CLS": transformers.AutoModelForTokenClassification,
    "QUESTION_ANS": transformers.AutoModelForQuestionAnswering,
    "FEATURE_EXTRACTION": transformers.AutoModel,
}
_LARGE_FOR_CPU = 16 << 30  # bytes above which a model is loaded on the CPU only with --device cpu


@contextmanager
def quiet_loading() -> Iterator[None]:
    """Silence libraries' warnings about each other and about a base model that is not on the hub, inside the block."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=FutureWarning)
        warnings.filterwarnings("ignore", message="fan_in_fan_out is set to")  # as PEFT then sets it itself
        warnings.filterwarnings("ignore", message="Unable to fetch remote file|Could not find a config file")
        yield


class BaseWeights:
    """Configuration and weights of a base model on disk; the weights are loaded when first asked for."""

    def __init__(
        self,
        model: str,
        task: str | None = None,
        names: Iterable[str] = (),
        extras: Mapping[str, Tensor] | None = None,
    ):
        """Open a model folder or hub name, as the class that an adapter is for; AdapterError if it cannot be read.

        That is the class of PEFT's `task`, the one that wrote the checkpoint, or that of another task: the first that
        has the layers `names` and the parameters `extras`, which also say how many labels a classifier has.
        """
        self.model, extras = model, extras or {}
        with _readable(model), torch.device("meta"):
            self.config = AutoConfig.from_pretrained(resolve(model), trust_remote_code=False)
            self.skeleton: PreTrainedModel = self._skeleton(task, {*names, *extras})
            shapes = {name: parameter.shape for name, parameter in _parameters(self.skeleton).items()}
            for name, tensor in extras.items():
                config, shape = self.skeleton.config, shapes.get(name, ())
                if shape and shape[0] == config.num_labels != len(tensor) and shape[1:] == tensor.shape[1:]:
                    config.num_labels = len(tensor)
                    self.skeleton = type(self.skeleton)._from_config(config)

    @classmethod
    def of(cls, update: AdapterUpdate) -> "BaseWeights":
        """Open the base model of an adapter."""
        return cls(update.base, update.config.get("task_type"), update.modules, update.extras)

    def _skeleton(self, task: str | None, names: set[str]) -> PreTrainedModel:
        classes = [getattr(transformers, name, None) for name in self.config.architectures or []]
        classes = [kind for kind in classes if isinstance(kind, type) and issubclass(kind, PreTrainedModel)]
        skeletons, errors = [], []
        for kind in dict.fromkeys([*filter(None, [_TASKS.get(task or "")]), *classes, *_TASKS.values()]):
            config: Any = copy.deepcopy(self.config)
            try:
                is_auto = kind in _TASKS.values()
                skeleton = kind.from_config(config, trust_remote_code=False) if is_auto else kind._from_config(config)
            except (ValueError, ImportError) as error:  # most often: this task has no class for the configuration
                errors.append(error)
                continue
            skeletons.append(skeleton)
            with unrolled(skeleton):
                if names <= {*dict(skeleton.named_modules()), *_parameters(skeleton)}:
                    return skeleton
        if not skeletons:
            raise errors[0]
        return skeletons[0]

    @property
    def predicts_tokens(self) -> bool:
        """Whether the model gives logits of tokens for token ids alone."""
        return self.skeleton.main_input_name == "input_ids" and self.skeleton.get_output_embeddings() is not None

    def no_room(self, device: str = "cpu", dtype: torch.dtype | None = None) -> str:
        """Return why the model cannot be loaded on a device, and the way out; empty if it can.

        `dtype` None is that of measuring on the device; "auto" refuses a model that takes a CPU very long.
        """
        configs = self.config, self.config.get_text_config()
        if any(getattr(config, "quantization_config", None) for config in configs):
            return f"base model {self.model} is quantised; name the unquantised model as base=… (--base)"
        chosen, usual_dtype = measuring_place(device)
        needed = (dtype or usual_dtype).itemsize * sum(parameter.numel() for parameter in self.skeleton.parameters())
        on_gpu, problem = chosen.startswith("cuda"), f"base model {self.model} needs {needed / 2**30:.0f} GiB"
        if needed > (torch.cuda.mem_get_info(chosen)[0] if on_gpu else psutil.virtual_memory().available):
            advice = f" on {chosen}; pass --device cpu, or" if on_gpu else ";"
            return f"{problem}, more than is free{advice} use a machine with more memory"
        if device == "auto" and chosen == "cpu" and needed > _LARGE_FOR_CPU:
            return f"{problem} and this machine has no GPU; pass --device cpu to load it nevertheless, which is slow"
        return ""

    def load(self, device: str = "auto", dtype: torch.dtype | str | None = None) -> Any:
        """Load the model in evaluation mode; AdapterError if it cannot be. Arguments as of `no_room`.

        `dtype` "auto" is the model's own.
        """
        stored_dtype = self.config.dtype or torch.float32
        if problem := self.no_room(device, stored_dtype if isinstance(dtype, str) else dtype):
            raise AdapterError(problem)
        chosen, usual_dtype = measuring_place(device)
        with _readable(self.model), quiet_transformers(always=False):
            options: dict[str, Any] = {"config": self.skeleton.config, "dtype": dtype or usual_dtype}
            return type(self.skeleton).from_pretrained(resolve(self.model), **options).eval().to(chosen)

    @cached_property
    def whole(self) -> PreTrainedModel:
        """The model, loaded in its own precision; AdapterError if it is quantised or does not fit into memory."""
        return self.load("cpu", "auto")

    def weight(self, module: str, update: AdapterUpdate | None = None) -> Float[Tensor, "m n"]:
        """Return a linear layer's weight as (out, in), as stored; of an `update`, as `check_fit` returns it.

        AdapterError if there is no such layer.
        """
        with unrolled(self.skeleton):
            linear_layer(self.skeleton, module, self.model)
        with unrolled(self.whole):
            weight = weight_of(self.whole.get_submodule(module))
        return weight if update is None else check_fit(weight, update, module, self.model)


def linear_layer(model: nn.Module, module: str, name: str) -> nn.Module:
    """Return a layer with one weight matrix of the model that messages call `name`; AdapterError if it has none there.

    It is linear, or one that only `target_parameters` adapt, as a mixture's router.
    """
    layer = dict(model.named_modules()).get(module)
    weight = getattr(layer, "weight", None)
    if layer is None or not (isinstance(weight, nn.Parameter) and weight.dim() == 2):
        advice = "the adapter was made for another model: pass the right one as base=… (--base)"
        stacked = [parameter_name for parameter_name, parameter in model.named_parameters() if parameter.dim() == 3]
        if any(f"{module}.".startswith(f"{parameter_name}.") for parameter_name in stacked):
            advice = (
                "its experts are one parameter of a kind that hiplora cannot take apart: merge it with PEFT instead"
            )
        elif re.search(r"\.experts\.\d+\.\w+$", module):
            advice = (
                "transformers 5 has a mixture's experts as one parameter: load the adapter with "
                "peft.PeftModel.from_pretrained(base, folder), which converts it, and save it again"
            )
        raise AdapterError(f"base model {name}: has no linear layer {module}; {advice}")
    return layer


def is_product(layer: nn.Module) -> bool:
    """Whether a layer's output is its input times its weight, so that an update can be added to the output."""
    return isinstance(layer, (nn.Linear, Conv1D))


def weight_of(layer: Any) -> Float[Tensor, "m n"]:
    """Return a linear layer's weight as (out, in); GPT-2's `Conv1D` stores it as (in, out)."""
    weight = layer.weight.detach()
    return weight.T if isinstance(layer, Conv1D) else weight


def is_transposed(update: AdapterUpdate, model: nn.Module | None) -> bool:
    """Return whether the base model, None if it is not available, stores weights as (in, out)."""
    if model is None:
        return bool(update.config.get("fan_in_fan_out"))
    return any(isinstance(layer, Conv1D) for layer in model.modules())


def is_tied(model: PreTrainedModel) -> bool:
    """Return whether a model's output head shares its weight with the embeddings."""
    head, embeddings = model.get_output_embeddings(), input_embeddings(model)
    return head is not None and embeddings is not None and head.weight is embeddings.weight


@torch.no_grad()
def replace_extras(model: PreTrainedModel, update: AdapterUpdate) -> bool:
    """Copy the tensors of `modules_to_save` into a bare model, and return whether its output head was untied.

    The vocabulary is resized as the adapter's embeddings were. The head gets a weight of its own where the adapter
    changes one of two tied weights. AdapterError if a tensor does not fit.
    """
    for name, tensor in update.extras.items():
        parameter: Any = _parameters(model).get(name)
        layers = input_embeddings(model), model.get_output_embeddings()
        is_vocabulary = parameter is not None and any(parameter is getattr(layer, "weight", None) for layer in layers)
        if is_vocabulary and len(tensor) > len(parameter) and tensor.shape[1:] == parameter.shape[1:]:
            model.resize_token_embeddings(len(tensor), mean_resizing=False)
    head = model.get_output_embeddings()
    tied = {name for name, weight in _parameters(model).items() if is_tied(model) and weight is head.weight}
    stay_equal = tied <= update.extras.keys() and len({weight_fingerprint(update.extras[name]) for name in tied}) == 1
    untied = not stay_equal and bool(tied & {*(f"{module}.weight" for module in update.modules), *update.extras})
    if untied:
        head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=False)
        if not model.config.is_encoder_decoder:  # where it also ties both sides' embeddings, and may scale logits
            model.config.get_text_config().tie_word_embeddings = model.config.tie_word_embeddings = False
    parameters = _parameters(model)
    for name, tensor in update.extras.items():
        shape = tuple(parameters[name].shape) if name in parameters else "no such parameter"
        if tuple(tensor.shape) != shape:
            raise AdapterError(f"{update.source}: tensor {name} is {tuple(tensor.shape)}, the base model's {shape}")
        parameters[name].copy_(tensor)
    return untied


def _parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return all parameters by name, tied ones under each of their names."""
    return dict(model.named_parameters(remove_duplicate=False))


def check_base(model: nn.Module, update: AdapterUpdate, name: str) -> None:
    """Check that a bare model, called `name` in messages, has every adapted layer, as `check_fit` does."""
    with unrolled(model):
        for module in update.modules:
            check_fit(weight_of(linear_layer(model, module, name)), update, module, name)


def load_for(update: AdapterUpdate, device: str = "auto") -> PreTrainedModel:
    """Load an adapter's base model to measure on, as `BaseWeights.load`, after `check_base`."""
    weights = BaseWeights.of(update)
    model = weights.load(device)
    rounded = model.dtype not in (torch.float32, weights.config.dtype)  # not the weight that the adapter saw
    check_base(weights.whole if rounded else model, update, update.base)
    return model


def check_fit(weight: Tensor, update: AdapterUpdate, module: str, base: str) -> Tensor:
    """Return a weight (out, in) as the adapter saw it; AdapterError if it is not the one it was made for.

    A weight that was quantised or rounded for training is recognised by the adapter's own singular triplets.
    """
    if tuple(weight.shape) != (expected := update.shape(module)):
        raise AdapterError(
            f"layer {module}: the adapter is for {expected[0]} × {expected[1]}, the weight in {base} is "
            f"{weight.shape[0]} × {weight.shape[1]}; pass the right base model as base=… (--base)"
        )
    if module not in update.fingerprints:
        return weight
    precision, channels = update.config.get("base_precision") or "", update.channels.get(module)
    seen = in_precision(weight, update.fingerprints[module])
    if seen is None and channels is not None and precision not in ("", str(weight.dtype).removeprefix("torch.")):
        basis = update.config.get("basis", "weight")
        mismatch = factor_mismatch(weight.float(), channels.U, channels.sigma, channels.V, basis)
        seen = weight if mismatch <= other_precision_limit(precision) else None
    elif seen is None and channels is None and is_quantised(precision):  # it cannot be recognised without channels
        seen = weight
    if seen is None:
        raise AdapterError(
            f"layer {module}: the weight in {base} is not the one that this adapter was made for; pass the right base "
            "model as base=… (--base)"
        )
    return seen


def in_precision(weight: Tensor, fingerprint: str) -> Tensor | None:
    """Return a stored weight as the adapter saw it, rounded to half precision if need be; None if it is another one."""
    rounded = (weight.to(dtype) for dtype in dict.fromkeys((weight.dtype, torch.bfloat16, torch.float16)))
    return next((candidate for candidate in rounded if weight_fingerprint(candidate) == fingerprint), None)


def is_quantised(precision: str) -> bool:
    """Whether an adapter's `base_precision` names a quantiser, not a dtype."""
    return bool(precision) and not isinstance(getattr(torch, precision, None), torch.dtype)


@contextmanager
def _readable(model: str) -> Iterator[None]:
    if not model:
        raise AdapterError("the adapter names no base model; pass base=… (--base)")
    try:
        yield
    except HipLoraError:
        raise
    except Exception as error:  # whatever transformers raises for a damaged folder, or a missing quantiser's library
        raise AdapterError(
            f"base model {model}: cannot be read ({first_line(error)}); pass a folder or a hub name that this machine "
            "can reach as base=… (--base)"
        ) from error
