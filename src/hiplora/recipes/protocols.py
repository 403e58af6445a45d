"""The protocols' settings under their former name."""

from hiplora.study.protocols import Protocols
from hiplora.study.protocols.editing import ALPHAEDIT, EditedFacts
from hiplora.study.protocols.metamath import BenchmarkPoint
from hiplora.study.protocols.settings import Seed

__all__ = ["ALPHAEDIT", "BenchmarkPoint", "EditedFacts", "Protocols", "Seed"]
