"""The evaluation callback for any LightningModule: `from tritonnn.lightning import TritonEvaluation`.

Its code lies in the package `lit_modules`, which is installed beside this one. Nothing else in tritonnn imports it, or
Lightning.
"""

import importlib.util

try:
    from lit_modules.evaluation_result import EvaluationResult
    from lit_modules.triton_evaluation import TritonEvaluation
except ModuleNotFoundError as error:
    if (error.name or "").partition(".")[0] == "lit_modules":
        other = importlib.util.find_spec("lit_modules")
        where = (other.origin or list(other.submodule_search_locations or [])) if other else "nowhere"
        raise ImportError(
            f"tritonnn.lightning needs the package lit_modules that is installed beside tritonnn, and found {where}: "
            "a package of one's own needs another name"
        ) from error
    raise

__all__ = ["EvaluationResult", "TritonEvaluation"]
