"""The errors that solpath raises on purpose. All of them derive from `SolpathError`."""


class SolpathError(Exception):
    """The root of the errors below: `except solpath.SolpathError` catches all that is expected."""


class ConfigError(SolpathError):
    """A setting is out of its range or cannot be used. The message names the setting."""


class UnsupportedModelError(SolpathError):
    """The model cannot be searched or cut. The message says which module is at fault and why."""


class ModelInUseError(SolpathError):
    """Another call works on the model right now. The message says which, and what to wait for."""


class BatchError(SolpathError):
    """The batches are empty, on another device, or not what the model takes."""


class BudgetError(SolpathError):
    """A budget cannot be met. The message gives the range that can be reached."""


class ExportError(SolpathError):
    """A runtime cannot hold the model, or gives other outputs. The message says what to do."""


class FingerprintError(SolpathError):
    """A path, plan or checkpoint belongs to another model or run. The message says what differs."""


class FileError(SolpathError):
    """A file or folder is missing, damaged or not writable. The message names file and field."""


class NonFiniteLossError(SolpathError):
    """The loss became NaN or infinite. The message names the step."""
