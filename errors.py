"""What effcc raises. Each error says what happened, where, and what to do about it."""

from __future__ import annotations


class EffccError(Exception):
    """Base of all errors. ``where`` names the place (a source line, a file), ``remedy`` what to do."""

    def __init__(self, message: str, *, where: str = "", remedy: str = "") -> None:
        self.message, self.where, self.remedy = message, where, remedy
        parts = [message]
        if where:
            parts.append(f"  at {where}")
        if remedy:
            parts.append(f"  {remedy}")
        super().__init__("\n".join(parts))
        # Shown below a traceback, and not part of the message.
        self.add_note(f"effcc docs {type(self).__name__} says more")

    @property
    def docs(self) -> str:
        """The error's page, relative to the package: what raises it, and what to do."""
        return f"docs/errors/{type(self).__name__}.md"


class OptionError(EffccError):
    """An option's name or value is not understood."""


class VerificationError(EffccError):
    """A graph breaks a rule of the IR; the message shows the lines around the place."""


class ParseError(EffccError):
    """IR text is not well-formed; ``where`` holds line and column."""


class PlanError(EffccError):
    """A plan is damaged, inconsistent, over its budget, or made for another graph."""


class ModelFileError(EffccError):
    """A model file is missing, does not offer a model, or fails while it is loaded."""


class DeviceError(EffccError):
    """A device is unknown or not present on this machine."""


class MissingExtraError(EffccError):
    """An optional dependency is not installed; the remedy names the extra."""


class PassError(EffccError):
    """A pass failed; the remedy is the command that repeats it on the saved graph."""


class ShapeError(EffccError):
    """A symbolic size has no value, or shapes do not fit the op that uses them."""


class ScheduleError(EffccError):
    """Steps wait for each other in a circle, or depend on a step that does not exist."""


class OutputError(EffccError):
    """A file cannot be written: no space, no permission, no such folder."""


class MappingError(EffccError):
    """A memory-mapping problem or its file is malformed."""


class CaptureError(EffccError):
    """An FX node has no form in the IR; ``where`` is the user's source line."""


class ExportError(EffccError):
    """A graph cannot be turned into an FX graph: an op or a size is not known here."""


class CascadeError(EffccError):
    """A cascade is inconsistent: a rank neither kept nor reduced, a tensor read before it is written, and the like."""


class CompileError(EffccError):
    """A region cannot be compiled, and falling back to eager ops was forbidden."""


class BudgetError(EffccError):
    """A step needs more memory than its budget; the message says the least that works and what holds it."""


class KernelDataError(EffccError):
    """A file of kernels or measurements is malformed, or asks for an op that the kernel-time model does not cover."""


class SwapError(EffccError):
    """A value cannot be swapped out or brought back: no space, no such directory."""


class PlacementError(EffccError):
    """Expert routing, loads or a placement are malformed, or the numbers of experts, slots and ranks do not fit."""


class PipelineDataError(EffccError):
    """A file of measured pipelines is malformed, or lacks what a prediction needs."""


class ExpertParallelError(EffccError):
    """Experts cannot be spread over the ranks as asked, or a rank failed while they ran."""


class PipelineError(EffccError):
    """A step cannot be cut into stages or sharded, or a rank of a pipeline failed; ``where`` is rank and pass."""


class TrainStepError(EffccError):
    """A training step cannot run as asked, or has failed half-way; ``where`` names the parameter or the option."""
